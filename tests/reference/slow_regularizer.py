"""What a ``CoherentRegularizer`` should do in each step, told from the weights and gradients that it meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reference import oracle

StepSize = Callable[[float, Sequence[Tensor]], float]
"""lr·κ from lr and the finite loss gradients of a tensor so far, oldest first."""


@dataclass
class SlowRegularizer:
    """One tensor at a time, in float64, with all gradients so far instead of running averages.

    Args:
        spec: The penalty, as the oracle writes it.
        strengths: The full strength of each tensor by name.
        update: ``"gradient"``, ``"proximal"`` or ``"dual_averaging"``.
        measure: The coherence measure; ``None`` without a gate.
        scope: What one decision covers.
        threshold: The least coherence at which the penalty is injected.
        tolerance: The tolerance of the gate.
        averaging: The decay with which gradients are averaged.
    """

    spec: oracle.Spec
    strengths: Mapping[str, float]
    update: str
    measure: str | None = "agreement"
    scope: str = "element"
    threshold: float = 0.0
    tolerance: float = 0.0
    averaging: float = 0.0
    history: dict[str, list[Tensor]] = field(default_factory=dict)
    """The finite loss gradients so far, by name."""
    latents: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    step: oracle.Step | None = None
    """What the last step decided."""
    names: Sequence[str] = ()
    """The tensors that took part in it."""
    factor: float = 0.0
    """The factor of the schedule in it."""

    def before(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], factor: float = 1.0
    ) -> oracle.Step:
        """Decide, from weights and loss gradients, and put latent weights in place."""
        self.names, self.factor = list(gradients), factor
        previous = [self.history[name][-1] if self.history.get(name) else None for name in gradients]
        if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            for name, gradient in gradients.items():
                self.history.setdefault(name, []).append(gradient.clone())
        averages = None
        if self.averaging:
            averages = [
                oracle.average(self.history[name], self.averaging)
                if self.history.get(name)
                else torch.zeros_like(gradient, dtype=torch.float64)
                for name, gradient in gradients.items()
            ]
        self.step = oracle.regularized_step(
            self.spec,
            [weights[name] for name in gradients],
            list(gradients.values()),
            previous,
            [self.strengths[name] for name in gradients],
            self.measure,
            self.scope,
            self.threshold,
            self.tolerance,
            averages,
            factor,
        )
        if self.update == "dual_averaging" and factor > 0:
            for name in gradients:
                self.latents.setdefault(name, weights[name].detach().clone())
                self.thresholds.setdefault(name, torch.zeros_like(weights[name], dtype=torch.float64))
        return self.step

    def after(self, stepped: Mapping[str, Tensor], lrs: Mapping[str, float], step_size: StepSize) -> dict[str, Tensor]:
        """The weights that follow, from those that the optimizer has made."""
        assert self.step is not None
        result = {name: stepped[name].detach().clone() for name in self.names}
        for name, gate in zip(self.names, self.step.gates, strict=True):
            size = step_size(lrs[name], self.history[name]) * self.factor * self.strengths[name]
            steps = gate.to(torch.float64) * size
            if self.update == "proximal":
                result[name] = torch.where(gate, oracle.prox(self.spec, stepped[name], steps), stepped[name])
            elif name in self.latents and self.update == "dual_averaging":
                self.latents[name] = stepped[name].detach().clone()
                self.thresholds[name] = self.thresholds[name] + oracle.group_mean(self.spec, steps)
                result[name] = oracle.prox(self.spec, self.latents[name], self.thresholds[name])
        return result
