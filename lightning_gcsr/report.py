"""What one step measured and decided."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["GateReport"]


@dataclass(frozen=True)
class GateReport:
    """What one step measured and decided: tensors on the parameters' device; reading one synchronizes with the host."""

    coherence: Tensor
    """The coherence over all regularized weights of the optimizer, in [−1, 1] at every scope; NaN without a measure."""
    injected: Tensor
    """The share of these weights that got the penalty, in [0, 1]."""
    strength: Tensor
    """The strength λ of this step, after delay, warm-up and stop; the largest one where a mapping gives several."""
    grad_norm: Tensor
    """‖g‖, the norm of the loss gradient over these weights, without loss scale and penalty."""
    penalty_grad_norm: Tensor
    """‖λr‖, the norm of the penalty gradient as it would be injected with every gate open."""
    finite: Tensor
    """Whether the loss gradient was finite; where it was not, nothing is injected."""
    names: tuple[str, ...]
    """The n parameters that took part, in the order of the two vectors below."""
    coherence_by_parameter: Tensor
    """The coherence of each parameter, shape (n,)."""
    injected_by_parameter: Tensor
    """The share of each parameter's weights that got the penalty, shape (n,)."""
