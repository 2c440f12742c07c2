"""What happens to the weights of one chunk in one optimizer step, as functions of lists of tensors.

g is the loss gradient or its running average, w the weights, r the gradient of the penalty, λ the strength and c the
tolerance of the gate. Gates are 1 where the penalty is injected and 0 where it is suppressed. Every function works on
all tensors of a chunk at once with torch's multi-tensor operations, and none of them makes the host wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gcsr.core.coherence import companion
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.numerics import inner_products
from lightning_gcsr.core.penalties import Penalty

__all__ = ["average_in", "gates_by_element", "gates_by_sign", "inject", "statistics"]

Numbers = Sequence[float] | Sequence[Tensor]
"""One number for each tensor: on a CPU a plain number, elsewhere a tensor that broadcasts to it."""


def average_in(averages: list[Tensor], gradients: list[Tensor], ema_weight: float | Tensor) -> None:
    """A ← A + (g − A)·ema_weight, in place; exact where the weight is 1, and no change where it is 0.

    A weight of 0 is that of a gradient which is not finite. On a CPU such a gradient does not come here.

    Example:
        >>> averages = [torch.tensor([1.0, 2.0])]
        >>> average_in(averages, [torch.tensor([3.0, 2.0])], 0.5)
        >>> averages
        [tensor([2., 2.])]
    """
    if isinstance(ema_weight, Tensor):
        weight = ema_weight.to(averages[0].dtype.to_real())
        for average, gradient in zip(averages, gradients, strict=True):
            average.lerp_(gradient.nan_to_num(), weight)  # infinity times 0 is not 0
    else:
        torch._foreach_lerp_(averages, gradients, ema_weight)


def gates_by_element(
    gradients: list[Tensor], weights: list[Tensor], penalty: Penalty, gate: Gate, strength: float
) -> list[Tensor]:
    """For each weight 1 where sign(b)·(g + c·λr) ≥ 0, else 0; b is the companion of g, for agreement r itself.

    For L1 and agreement, where b = r = sign(w), that is sign(w)·g ≥ −c·λ; a weight at zero is open. A gradient that is
    NaN closes its gate. The result has a real floating dtype: booleans take several times as long to make and to use.

    Example:
        >>> from lightning_gcsr import L1
        >>> gates_by_element([torch.tensor([-0.2, -0.05, 3.0])], [torch.tensor([1.0, 1.0, 0.0])], L1(), Gate(), 1.0)
        [tensor([0., 1., 1.])]
    """
    easing = (gate.tolerance or 0.0) * strength
    penalty_gradients = penalty.gradients(weights)
    if gate.coherence == "agreement" and penalty.gradient_is_sign and not weights[0].is_complex():
        torch._foreach_mul_(penalty_gradients, gradients)
        return [product.ge_(-easing) for product in penalty_gradients]
    companions = [
        companion(gate.coherence, gradient, penalty_gradient, strength)
        for gradient, penalty_gradient in zip(gradients, penalty_gradients, strict=True)
    ]
    if easing:
        gradients = list(torch._foreach_add(gradients, penalty_gradients, alpha=easing))
    return gates_by_sign(gradients, companions)


def gates_by_sign(gradients: Sequence[Tensor], companions: Sequence[Tensor]) -> list[Tensor]:
    """For each weight 1 where the cosine of the two scalars, the sign of their product, is not negative, else 0.

    Example:
        >>> gates_by_sign([torch.tensor([1.0, -1.0, 0.0])], [torch.tensor([2.0, 2.0, 2.0])])
        [tensor([1., 0., 1.])]
    """
    # The product of two small numbers would vanish, and a vanished product would count as coherent.
    if gradients[0].is_complex():
        pairs = zip(gradients, companions, strict=True)
        return [(companion.sgn().conj() * gradient).real.ge_(0) for gradient, companion in pairs]
    products = torch._foreach_mul(torch._foreach_sign(list(companions)), list(gradients))
    return [product.ge_(0) for product in products]


def statistics(
    gradients: list[Tensor],
    companions: list[Tensor],
    penalty_gradients: list[Tensor],
    loss_gradients: list[Tensor],
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


def inject(
    gradients: list[Tensor], penalty_gradients: list[Tensor], gates: list[Tensor] | Numbers | None, strength: float
) -> None:
    """G ← g + λ·gate·r, in place, with one gate for each weight, one for each tensor, or none.

    Example:
        >>> gradients = [torch.zeros(3)]
        >>> inject(gradients, [torch.ones(3)], [torch.tensor([0.0, 1.0, 1.0])], 0.5)
        >>> gradients
        [tensor([0.0000, 0.5000, 0.5000])]
    """
    if gates is not None:
        penalty_gradients = list(torch._foreach_mul(penalty_gradients, gates))  # type: ignore[arg-type]
    torch._foreach_add_(gradients, penalty_gradients, alpha=strength)
