"""What happens to the weights of one chunk in one optimizer step, as functions of tensors.

g is the loss gradient or its running average, w the weights, r the gradient of the penalty, λ the strength and c the
tolerance of the gate. Gates are 1 where the penalty is injected and 0 where it is suppressed. None of these functions
makes the host wait, and each may be wrapped in ``torch.compile``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gcsr.core.coherence import companion
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.numerics import accumulation_dtype, on_device
from lightning_gcsr.core.penalties import Penalty

__all__ = ["average_in", "close", "element_gate", "ema_weight", "inject", "unscaled"]


def ema_weight(decay: float, count: int | Tensor, finite: bool | Tensor) -> float | Tensor:
    """What the newest gradient weighs in a running average whose weights sum to 1: (1−β)/(1−βᵗ); 0 if not finite.

    Args:
        decay: β.
        count: t, the number of finite gradients so far, with this one.
        finite: Whether this one is finite.

    Example:
        >>> ema_weight(0.5, 1, True), ema_weight(0.5, 2, True), ema_weight(0.5, 2, False)
        (1.0, 0.6666666666666666, 0.0)
    """
    if isinstance(count, int):
        return (1 - decay) / (1 - decay**count) if finite else 0.0
    return (1 - decay) / (1 - decay ** count.clamp(min=1).to(accumulation_dtype(count.device))) * finite


def unscaled(gradients: Tensor, loss_scale: float | Tensor) -> Tensor:
    """Gradients, or norms of them, without loss scale.

    Example:
        >>> import torch
        >>> unscaled(torch.tensor([64.0]), 32.0)
        tensor([2.])
    """
    if isinstance(loss_scale, Tensor) or loss_scale != 1:
        return gradients / on_device(loss_scale, gradients.device)
    return gradients


def average_in(average: Tensor, gradient: Tensor, weight: float | Tensor) -> None:
    """A ← A + (g − A)·weight, in place; exact where the weight is 1, and no change where it is 0.

    Example:
        >>> import torch
        >>> average = torch.tensor([1.0, 2.0])
        >>> average_in(average, torch.tensor([3.0, 2.0]), 0.5)
        >>> average
        tensor([2., 2.])
    """
    if isinstance(weight, Tensor):  # which is 0 for a gradient that is not finite, and infinity times 0 is not 0
        average.lerp_(gradient.nan_to_num(), weight.to(average.device, average.dtype))
    elif weight > 0:
        average.lerp_(gradient, weight)


def element_gate(
    gradient: Tensor,
    weight: Tensor,
    penalty: Penalty,
    gate: Gate,
    strength: float,
    easing: float | Tensor = 0.0,
    previous: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """For each weight 1 where sign(b)·(g + e·r) ≥ 0, else 0; b is the companion of g, for agreement r itself.

    For coupled groups it is the sum of b·(g + e·r) over the group.

    For L1 and agreement, where b = r = sign(w), that is sign(w)·g ≥ −e; a weight at zero is open. A gradient that is
    NaN closes its gate. The result is no boolean: on a CPU these take several times as long to make.

    Args:
        gradient: The loss gradient g or its average.
        weight: The weights w.
        penalty: The penalty.
        gate: The gate.
        strength: λ.
        easing: e ≥ 0, by how much of r a gradient may oppose the penalty: c·λ with the gate's tolerance c.
        previous: For ``"temporal"``, the last gradient.
        out: Where to put the result.

    Example:
        >>> import torch
        >>> from lightning_gcsr import L1
        >>> element_gate(torch.tensor([-0.2, -0.05, 3.0]), torch.tensor([1.0, 1.0, 0.0]), L1(), Gate(), 1.0, 0.1)
        tensor([0., 1., 1.])
    """
    if previous is not None:
        signed = penalty.signed(gradient, previous)
    elif gate.coherence == "agreement" and penalty.gradient_is_sign and not weight.is_complex():
        signed = penalty.gradient(weight).mul_(gradient)
        return torch.ge(signed, -easing, out=signed if out is None else out)
    else:
        penalty_gradient = penalty.gradient(weight)
        compared = companion(gate.coherence, gradient, penalty_gradient, strength)
        if isinstance(easing, Tensor) or easing > 0:
            gradient = gradient + penalty_gradient * easing
        signed = penalty.signed(gradient, compared)
    return torch.ge(signed, 0, out=signed if out is None else out)


def inject(gradient: Tensor, penalty_gradient: Tensor, gate: float | Tensor, strength: float | Tensor) -> None:
    """G ← g + λ·gate·r, in place, with one gate for each weight, or one for all.

    Example:
        >>> import torch
        >>> gradient = torch.zeros(3)
        >>> inject(gradient, torch.ones(3), torch.tensor([0.0, 1.0, 1.0]), 0.5)
        >>> gradient
        tensor([0.0000, 0.5000, 0.5000])
    """
    if isinstance(strength, Tensor):
        gate, strength = gate * strength.to(gradient.dtype.to_real()), 1.0
    if isinstance(gate, Tensor):
        gradient.addcmul_(penalty_gradient, gate.to(gradient.dtype), value=strength)
    else:
        gradient.add_(penalty_gradient, alpha=gate * strength)


def close(gate: Tensor, opened: bool | Tensor) -> None:
    """Close all gates, in place, where this is false.

    Example:
        >>> import torch
        >>> gate = torch.ones(2)
        >>> close(gate, False)
        >>> gate
        tensor([0., 0.])
    """
    if isinstance(opened, Tensor):
        gate.mul_(opened.to(gate.device))
    elif not opened:
        gate.zero_()
