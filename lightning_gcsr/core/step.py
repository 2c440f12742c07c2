"""What happens to the weights of one chunk in one optimizer step, as functions of tensors.

g is the loss gradient or its running average, w the weights, r the gradient of the penalty, λ the strength and c the
tolerance of the gate. Gates are 1 where the penalty is injected and 0 where it is suppressed. None of these functions
makes the host wait, and each may be wrapped in ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_gcsr.core.coherence import companion
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.numerics import accumulation_dtype, inner_products
from lightning_gcsr.core.penalties import Penalty

__all__ = ["average_in", "close", "element_gate", "ema_weight", "inject", "statistics"]


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
        average.lerp_(gradient.nan_to_num(), weight.to(average.dtype))
    elif weight > 0:
        average.lerp_(gradient, weight)


def element_gate(
    gradient: Tensor, weight: Tensor, penalty: Penalty, gate: Gate, strength: float, easing: float | Tensor
) -> Tensor:
    """For each weight 1 where sign(b)·(g + e·r) ≥ 0, else 0; b is the companion of g, for agreement r itself.

    For coupled groups it is the sum of b·(g + e·r) over the group.

    For L1 and agreement, where b = r = sign(w), that is sign(w)·g ≥ −e; a weight at zero is open. A gradient that is
    NaN closes its gate. The result has a real floating dtype: booleans take several times as long to make and to use.

    Args:
        gradient: The loss gradient g or its average.
        weight: The weights w.
        penalty: The penalty.
        gate: The gate.
        strength: λ.
        easing: e ≥ 0, by how much of r a gradient may oppose the penalty: c·λ with the gate's tolerance c.

    Example:
        >>> import torch
        >>> from lightning_gcsr import L1
        >>> element_gate(torch.tensor([-0.2, -0.05, 3.0]), torch.tensor([1.0, 1.0, 0.0]), L1(), Gate(), 1.0, 0.1)
        tensor([0., 1., 1.])
    """
    penalty_gradient = penalty.gradient(weight)
    if gate.coherence == "agreement" and penalty.gradient_is_sign and not weight.is_complex():
        return penalty_gradient.mul_(gradient).ge_(-easing)
    compared = companion(gate.coherence, gradient, penalty_gradient, strength)
    if isinstance(easing, Tensor) or easing > 0:
        gradient = gradient + penalty_gradient * easing
    return penalty.coherent(gradient, compared)


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


def statistics(
    gradients: Sequence[Tensor],
    companions: Sequence[Tensor],
    penalty_gradients: Sequence[Tensor],
    loss_gradients: Sequence[Tensor],
    relative: float,
) -> list[list[Tensor]]:
    """The sums ⟨g,g⟩, ⟨g,b⟩, ⟨b,b⟩, ⟨r,r⟩ and ⟨g,g⟩ of this step's gradient, each a list with one for each tensor.

    Args:
        gradients: What coherence is measured on: this step's gradients or their averages.
        companions: The companions b; where they are the penalty gradients, these are multiplied by ``relative``.
        penalty_gradients: The penalty gradients r, without strength.
        loss_gradients: This step's gradients.
        relative: The strength of these tensors over that of the model.
    """
    squares = inner_products(gradients, gradients)
    loss_squares = squares if loss_gradients is gradients else inner_products(loss_gradients, loss_gradients)
    products = inner_products(gradients, companions)
    penalty_squares = [square * relative**2 for square in inner_products(penalty_gradients, penalty_gradients)]
    if companions is penalty_gradients:
        products = [product * relative for product in products]
        return [squares, products, penalty_squares, penalty_squares, loss_squares]
    return [squares, products, inner_products(companions, companions), penalty_squares, loss_squares]


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
        gate.mul_(opened)
    elif not opened:
        gate.zero_()
