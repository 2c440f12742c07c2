"""The methods that the study compares, each as the callbacks and the optimizer it needs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from pytorch_optimizer.base.optimizer import BaseOptimizer
from torch import nn

from lightning_gcsr import GradientCoherentRegularization, KeepZeros
from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.validation import argument_error, check_choice, check_finite_number, check_integer

_PENALTY = {"penalty", "strength", "update"}
_OVER_TIME = {"strength_scale", "warmup", "polish"}
SETTINGS: dict[str, tuple[set[str], set[str]]] = {
    "none": (set(), set()),
    "plain": (_PENALTY, _OVER_TIME),
    "delayed": (_PENALTY | {"delay"}, _OVER_TIME),
    "coherent": (
        _PENALTY | {"coherence", "scope"},
        _OVER_TIME | {"delay", "threshold", "tolerance", "averaging"},
    ),
    "cautious_weight_decay": ({"strength"}, set()),
    "magnitude_pruning": ({"compression"}, {"prunings"}),
}
"""The settings that each method needs, and those that it may have."""
PENALTY_TITLES = {"l1": "L1", "l2": "L2", "elastic_net": "elastic net", "group_lasso": "group lasso"}
PRUNED_AFTER = 0.7
"""The share of the training after which gradual magnitude pruning has reached its sparsity and only trains on."""


@dataclass(frozen=True)
class Method:
    """One method and its settings. What a method does not use must be left out.

    ``delay``, ``warmup`` and ``polish`` are shares of the training: without penalty at the start, with a rising one
    after that, and without penalty but with zeros kept at the end. ``strength`` is that of the penalty;
    ``compression`` is what magnitude pruning prunes down to, weights over nonzeros, and ``prunings`` in how many steps;
    left out, at the end of each epoch as Lightning's callback does.
    """

    method: str = "none"
    penalty: Optional[str] = None
    strength: Optional[float] = None
    coherence: Optional[str] = None
    scope: Optional[str] = None
    threshold: Optional[float] = None
    tolerance: float = 0.0
    averaging: float = 0.0
    update: Optional[str] = None
    strength_scale: str = "uniform"
    delay: float = 0.0
    warmup: float = 0.0
    polish: float = 0.0
    compression: Optional[float] = None
    prunings: Optional[int] = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, SETTINGS)
        needed, optional = SETTINGS[self.method]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(field.default, float) or "float" in str(field.type):
                value = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
                object.__setattr__(self, field.name, value)  # 10 and 10.0 are one run
            given = value != field.default
            if given is (field.name in needed) or (given and field.name in optional):
                continue
            if given or field.name in needed:
                rule = "must be left out" if given else "must be given"
                raise argument_error(field.name, value, f"{rule} with method={self.method!r}")
        for name in ("delay", "warmup", "polish"):
            check_finite_number(name, getattr(self, name), 0, 1, "It is a share of the training.")
        if self.compression is not None:
            check_finite_number("compression", self.compression, 1)
        if self.prunings is not None:
            check_integer("prunings", self.prunings, 1)
        if self.strength is not None:
            check_finite_number("strength", self.strength, 0)
        if self.penalty is not None:
            # The callback knows its own rules; a bad setting must not wait for its turn in a long study.
            self._regularization()

    @property
    def title(self) -> str:
        """What the study calls it: all settings but the strength."""
        if self.method == "none":
            return "no penalty"
        if self.method == "magnitude_pruning":
            return f"ModelPruning, {f'in {self.prunings} steps' if self.prunings else 'at epoch ends'}"
        if self.method == "cautious_weight_decay":
            return "L2 cautious weight decay"
        words = [PENALTY_TITLES[self.penalty or ""]]
        if self.method == "coherent":
            words.append(f"{self.coherence}/{self.scope}")
            words += [f"≥ {self.threshold:g}"] if self.threshold is not None else []
        else:
            words.append(self.method)
        words.append(self.update or "")
        words += [self.strength_scale] if self.strength_scale != "uniform" else []
        numbers = {"averaging": self.averaging, "tolerance": self.tolerance}
        shares = {"delay": self.delay, "warm-up": self.warmup, "polish": self.polish}
        extras = [f"{name} {number:g}" for name, number in numbers.items() if number]
        extras += [f"{name} {100 * share:g}%" for name, share in shares.items() if share]
        return ", ".join([" ".join(words), *extras])

    def callbacks(self, module: nn.Module, epochs: int) -> list[Callback]:
        """Fresh callbacks for one training of so many epochs."""
        if self.method == "magnitude_pruning":
            return [self._pruning(module, epochs)]
        if self.penalty is None:
            return []
        return [self._regularization(), KeepZeros()] if self.polish else [self._regularization()]

    def optimizer(self, module: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
        """SGD; for cautious weight decay, SGD with that."""
        if self.method != "cautious_weight_decay":
            return torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
        decayed = list(select_parameters(module).values())
        others = [parameter for parameter in module.parameters() if not any(parameter is p for p in decayed)]
        assert self.strength is not None
        decay = self.strength / (1 - momentum)  # as the proximal update: momentum amplifies a steady gradient
        groups: list[dict[str, Any]] = [{"params": decayed, "cautious_decay": decay}, {"params": others}]
        return CautiousSGD(groups, lr=lr, momentum=momentum)

    def _regularization(self) -> GradientCoherentRegularization:
        arguments: dict[str, Any] = {
            "strength": self.strength,
            "coherence": self.coherence,
            "scope": self.scope or "element",
            "threshold": self.threshold,
            "tolerance": self.tolerance,
            "averaging": self.averaging,
            "update": self.update,
            "strength_scale": self.strength_scale,
            "delay_steps": float(self.delay),
            "warmup_steps": float(self.warmup),
            "stop_steps": 1.0 - self.polish if self.polish else None,
        }
        return GradientCoherentRegularization(self.penalty, **arguments)  # type: ignore[arg-type]

    def _pruning(self, module: nn.Module, epochs: int) -> GradualPruning:
        """Lightning's callback on the weights that a penalty may reach, on the usual cubic schedule."""
        assert self.compression is not None
        selected = select_parameters(module)
        wanted = [
            (owner, "weight")
            for owner in module.modules()
            if any(getattr(owner, "weight", None) is parameter for parameter in selected.values())
        ]
        times = self.prunings or max(1, math.floor(PRUNED_AFTER * epochs))
        return GradualPruning(wanted, 1 - 1 / self.compression, times, at_epoch_ends=self.prunings is None)


class GradualPruning(ModelPruning):
    """Lightning's pruning of the smallest weights of the whole network, on the usual cubic schedule.

    Args:
        parameters: Modules, and the names of their parameters.
        sparsity: The share of zeros at the end.
        times: After how many prunings that is reached.
        at_epoch_ends: Whether to prune at the end of each epoch; else at even distances over the first part of the
            training.
    """

    def __init__(
        self, parameters: list[tuple[nn.Module, str]], sparsity: float, times: int, at_epoch_ends: bool
    ) -> None:
        super().__init__(
            "l1_unstructured",
            parameters_to_prune=parameters,
            amount=lambda epoch: self.next_amount(epoch),
            apply_pruning=at_epoch_ends,
            use_global_unstructured=True,
            use_lottery_ticket_hypothesis=False,  # Lightning's default sets the weights back to their start
        )
        self.final_sparsity, self.times, self.at_epoch_ends = sparsity, times, at_epoch_ends

    def next_amount(self, pruned: int) -> float:
        """After so many prunings, the share to prune of what is left, since torch counts from there."""
        before, after = (
            self.final_sparsity * (1 - (1 - min(count / self.times, 1.0)) ** 3) for count in (pruned, pruned + 1)
        )
        return (after - before) / (1 - before)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.at_epoch_ends:
            return
        steps = int(PRUNED_AFTER * trainer.estimated_stepping_batches)
        done, due = ((step * self.times) // steps for step in (trainer.global_step - 1, trainer.global_step))
        for pruned in range(done, min(due, self.times)):
            self.apply_pruning(self.next_amount(pruned))


class CautiousSGD(torch.optim.SGD):
    """SGD with cautious weight decay (arXiv:2510.12402): only where the step moves the weight towards zero, too.

    The rule is that of the package pytorch-optimizer, which has it for one optimizer of its own. Here it follows the
    step, on the weights as the step left them.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            if decay := group.get("cautious_decay"):
                for parameter in group["params"]:
                    update = self.state[parameter].get("momentum_buffer", parameter.grad)
                    if update is not None:
                        BaseOptimizer.apply_cautious_weight_decay(parameter, update, group["lr"], decay)
        return loss
