"""What a regularization callback sends to loggers: its numbers, its settings, and which of its keys belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_gcsr.callbacks.reporting.tensorboard_layout import Charts
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.core.schedule import Schedule

__all__ = ["GateLog", "settings_by_name"]


class GateLog:
    r"""Keeps the reports of the last step until Lightning logs, and turns them into numbers by key.

    ============================= ================================================================================
    ``{name}/coherence``          the coherence over all regularized weights, in [−1, 1]; not with ``gate=None``
    ``{name}/threshold``          the coherence from which on the penalty is injected; not at element scope
    ``{name}/injected``           the share of the regularized weights that got the penalty, in [0, 1]
    ``{name}/strength``           the strength after delay, warm-up and stop; the largest where a dict gives several
    ``{name}/grad_norm``          ‖g‖ over the regularized weights, without loss scale and penalty
    ``{name}/penalty_grad_norm``  ‖λr‖, as it would be injected with every gate open
    ``{name}/penalty``            the penalty Σ Ω(w) over the weights that are trained, without strength
    ``{name}/zero_groups``        the share of coupled groups that are zero; only of a penalty over coupled groups
    ``{name}/nonfinite_steps``    the number of steps so far whose loss gradient was not finite
    ============================= ================================================================================

    With several optimizers that step regularized weights, the first five begin with ``{name}/optimizer_0/`` and so on.
    With ``log_per_parameter=True``, ``{name}/coherence/{parameter}`` and ``{name}/injected/{parameter}`` as well.

    Args:
        name: The prefix of all keys.
        gate: The gate that the reports are about.
        per_parameter: Whether each parameter is logged too.
        coupled: Whether the penalty is over coupled groups.
    """

    def __init__(self, name: str, gate: Optional[Gate], per_parameter: bool, coupled: bool) -> None:
        self.name, self.gate, self.per_parameter, self.coupled = name, gate, per_parameter, coupled
        self._reports: dict[int, GateReport] = {}
        self._done: dict[int, float | Tensor] = {}
        self._last = 0
        self.last_injected = 0.0
        """The injected fraction in the last step that was turned into numbers."""

    def __bool__(self) -> bool:
        return bool(self._reports)

    def keep(self, index: int, report: GateReport) -> None:
        """Keep what the last step of the optimizer with this index reported."""
        self._reports[index] = report
        self._done.pop(index, None)
        self._last = index

    def mark_done(self, index: int, done: float | Tensor) -> None:
        """Say whether what this optimizer's report calls injected has happened: 1, or 0 where its step was skipped."""
        self._done[index] = done

    def clear(self) -> None:
        """Forget the reports."""
        self._reports.clear()
        self._done.clear()

    def numbers(
        self, regularizer: CoherentRegularizer, several: bool, more: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """What to log, with one transfer from the device, and for coupled groups one more.

        Args:
            regularizer: The regularizer at work.
            several: Whether several optimizers step regularized weights, so that keys name the optimizer.
            more: Numbers that are wanted but not logged.

        Returns:
            The numbers by key, the injected fraction of each parameter, and the values of ``more``.
        """
        measured = self.gate is not None
        numbers: dict[str, Tensor] = {}
        fractions: dict[str, Tensor] = {}
        for index, report in self._reports.items():
            prefix = f"{self.name}/optimizer_{index}" if several else self.name
            done = self._done.get(index, 1.0)
            if measured:
                numbers[f"{prefix}/coherence"] = report.coherence
            numbers[f"{prefix}/injected"] = report.injected * done
            numbers[f"{prefix}/strength"] = report.strength
            numbers[f"{prefix}/grad_norm"] = report.grad_norm
            numbers[f"{prefix}/penalty_grad_norm"] = report.penalty_grad_norm
            fractions |= dict(zip(report.names, (report.injected_by_parameter * done).unbind(), strict=True))
            if self.per_parameter and measured:
                keys = [f"{self.name}/coherence/{parameter}" for parameter in report.names]
                numbers |= dict(zip(keys, report.coherence_by_parameter.unbind(), strict=True))
        if self.per_parameter:
            numbers |= {f"{self.name}/injected/{parameter}": value for parameter, value in fractions.items()}
        numbers[f"{self.name}/penalty"] = torch.as_tensor(regularizer.penalty_value())
        if self.coupled:
            numbers[f"{self.name}/zero_groups"] = torch.as_tensor(regularizer.sparsity())
        numbers[f"{self.name}/nonfinite_steps"] = torch.as_tensor(regularizer.nonfinite_steps)
        parts = [numbers, fractions, dict(more)]
        device = next(iter(numbers.values())).device
        values = iter(torch.stack([v.to(device, torch.float64) for part in parts for v in part.values()]).tolist())
        logged, by_parameter, others = ({key: next(values) for key in part} for part in parts)
        prefix = f"{self.name}/optimizer_{self._last}" if several else self.name
        self.last_injected = logged.get(f"{prefix}/injected", 0.0)
        return logged | self.threshold(), by_parameter, others

    def threshold(self) -> dict[str, float]:
        """Logged at each step, so that a chart can show the coherence against it."""
        if self.gate is None or self.gate.threshold is None:
            return {}
        return {f"{self.name}/threshold": self.gate.threshold}

    def charts(self) -> Charts:
        """The keys that belong together, for TensorBoard's Custom Scalars."""
        name, optimizer = re.escape(self.name), "(optimizer_[0-9]+/)?"
        gate = {f"{self.name}: share of weights that got the penalty": [f"{name}/{optimizer}injected"]}
        if self.gate is not None:
            about = {
                "model": "and its threshold",
                "parameter": "over all weights, and the threshold of each tensor",
                "element": "over all weights, each of which has its own gate",
            }
            title = f"{self.name}: coherence {about[self.gate.scope]}"
            gate[title] = [f"{name}/{optimizer}coherence", *[re.escape(key) for key in self.threshold()]]
        charts = {
            "gate": gate,
            "strength": {
                f"{self.name}: strength": [f"{name}/{optimizer}strength"],
                f"{self.name}: norms of the two gradients": [
                    f"{name}/{optimizer}grad_norm",
                    f"{name}/{optimizer}penalty_grad_norm",
                ],
                f"{self.name}: penalty": [f"{name}/penalty"],
            },
        }
        if self.coupled:
            charts["sparsity"] = {f"{self.name}: share of groups that are zero": [f"{name}/zero_groups"]}
        if self.per_parameter:
            charts["layers"] = {f"{self.name}: share that got the penalty, by layer": [f"{name}/injected/.+"]}
        return charts


def settings_by_name(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for loggers, ``{name}/{setting}``; a gate or a schedule by its fields, ``{name}/gate.scope``.

    What is ``None`` is written as ``"None"``, so that all runs have the same settings and stand in one table.

    Example:
        >>> settings_by_name("gcsr", {"strength": 0.1, "schedule": Schedule(delay=5, warmup=0)})
        {'gcsr/strength': 0.1, 'gcsr/schedule.delay': 5, 'gcsr/schedule.warmup': 0, 'gcsr/schedule.stop': 'None'}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        kind = {"gate": Gate, "schedule": Schedule}.get(key)
        if kind is not None:
            flat |= {f"{key}.{field.name}": getattr(value, field.name, None) for field in fields(kind)}
        else:
            flat[key] = value
    plain = (bool, int, float, str)
    return {f"{name}/{key}": value if isinstance(value, plain) else repr(value) for key, value in flat.items()}


def settings_without_penalty() -> dict[str, Any]:
    """The settings of a run that nothing regularizes, under the names of one regularization."""
    names = ("penalty", "target_sparsity", "gate", "schedule", "update", "strength_scale", "include", "exclude")
    return settings_by_name("gcsr", {"strength": 0.0} | dict.fromkeys(names))
