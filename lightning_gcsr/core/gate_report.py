"""What one step measured and decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gcsr.core.coherence import GradientStatistics

__all__ = ["GateReport"]


@dataclass(frozen=True)
class GateReport:
    """What one step measured and decided: 0-dim tensors on the parameters' device, made when they are asked for.

    Reading a value (``float(report.coherence)``) synchronizes with the host, making it does not.
    """

    names: tuple[str, ...]
    """The n parameters that took part, in the order in which the step treats them."""
    sizes: tuple[int, ...]
    """The number of weights of each that took part."""
    statistics: GradientStatistics
    """The sums over each parameter."""
    injected_weights: Tensor
    """The number of weights of each parameter that got the penalty, shape (n,)."""
    current_strength: float
    """The strength λ of this step, as a number."""
    measured: bool
    """Whether there is a gate, and with it a coherence measure."""

    @property
    def coherence(self) -> Tensor:
        """The coherence over all regularized weights of the optimizer, in [−1, 1] at every scope; NaN without one."""
        return self._or_nan(self.statistics.coherence)

    @property
    def injected(self) -> Tensor:
        """The share of these weights that got the penalty, in [0, 1]."""
        return self.injected_weights.sum() / max(1, sum(self.sizes))

    @property
    def strength(self) -> Tensor:
        """The strength λ of this step, after delay, warm-up and stop; the largest one where a mapping gives several."""
        return torch.full_like(self.statistics.coherence, self.current_strength)

    @property
    def grad_norm(self) -> Tensor:
        """‖g‖, the norm of the loss gradient over these weights, without loss scale and penalty."""
        return self.statistics.loss_gradient_square.sum().sqrt()

    @property
    def penalty_grad_norm(self) -> Tensor:
        """‖λr‖, the norm of the penalty gradient as it would be injected with every gate open."""
        return self.statistics.penalty_square.sum().sqrt() * self.current_strength

    @property
    def finite(self) -> Tensor:
        """Whether the loss gradient was finite; where it was not, nothing is injected."""
        return self.statistics.finite

    @property
    def coherence_by_parameter(self) -> Tensor:
        """The coherence of each parameter, in the order of the names, shape (n,)."""
        return self._or_nan(self.statistics.coherence_by_parameter)

    @property
    def injected_by_parameter(self) -> Tensor:
        """The share of each parameter's weights that got the penalty, likewise."""
        return self.injected_weights / self.injected_weights.new_tensor(self.sizes)

    def _or_nan(self, coherence: Tensor) -> Tensor:
        return coherence if self.measured else torch.full_like(coherence, torch.nan)
