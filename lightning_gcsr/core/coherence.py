r"""Coherence: do the loss gradients stay coherent in the presence of the penalty?

Every measure is the cosine of the loss gradient g with a *companion* of g:

============= ================== ==============================================================================
measure       companion          reads as
============= ================== ==============================================================================
direction     g + λr             does the regularized gradient still point where the loss gradient points
agreement     r                  do loss and penalty pull the same way
temporal      g of the last step do successive loss gradients stay aligned
============= ================== ==============================================================================

where r is the gradient of the penalty and λ the strength. Which numbers one cosine covers, and what follows from it, is
the matter of a :class:`~lightning_gcsr.Gate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, Optional, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gcsr.validation import argument_error, check_choice

__all__ = ["CoherenceMeasure", "GradientStatistics", "MeasureName", "check_measure", "companion", "cosine"]

MeasureName = Literal["direction", "agreement", "temporal"]


def cosine(gradient_square: Tensor, product: Tensor, companion_square: Tensor) -> Tensor:
    """⟨g,b⟩ / (‖g‖·‖b‖) from ⟨g,g⟩, ⟨g,b⟩, ⟨b,b⟩, clamped to [−1, 1]; 0 where one of the two vectors is zero.

    Example:
        >>> import torch
        >>> cosine(torch.tensor(4.0), torch.tensor(-3.0), torch.tensor(9.0))
        tensor(-0.5000)
    """
    # The product of two norms neither overflows nor vanishes where the product of two squares might.
    norms = gradient_square.sqrt() * companion_square.sqrt()
    return torch.where(norms == 0, 0.0, product / norms).clamp(-1.0, 1.0)


class GradientStatistics(NamedTuple):
    """The sums that a coherence is computed from, one number for each of n tensors: vectors of shape (n,).

    g is the loss gradient without loss scale, or its running average, b its companion and r the penalty gradient.
    """

    gradient_square: Tensor
    """⟨g,g⟩"""
    product: Tensor
    """⟨g,b⟩"""
    companion_square: Tensor
    """⟨b,b⟩"""
    penalty_square: Tensor
    """⟨r,r⟩"""
    loss_gradient_square: Tensor
    """⟨g,g⟩ of this step's gradient, where g above is an average."""

    @property
    def coherence(self) -> Tensor:
        """The coherence over all tensors together, 0-dim."""
        return cosine(self.gradient_square.sum(), self.product.sum(), self.companion_square.sum())

    @property
    def coherence_by_parameter(self) -> Tensor:
        """The coherence of each tensor, shape (n,)."""
        return cosine(self.gradient_square, self.product, self.companion_square)

    @property
    def finite(self) -> Tensor:
        """Whether every loss gradient of this step is finite, a 0-dim boolean."""
        return self.loss_gradient_square.sum().isfinite()


class CoherenceMeasure(ABC):
    """A coherence measure of your own: the cosine of the loss gradient and a companion that you define.

    An instance is accepted wherever ``Gate(coherence=...)`` takes a name; scope and threshold mean the same. Gradients
    arrive in parts of tensors, so every number of the companion must depend on its own position only.

    Example:
        >>> import torch
        >>> class Halfway(CoherenceMeasure):
        ...     "cos(g, g + λr/2): closes only where the penalty is twice as strong as the gradient that opposes it."
        ...     def companion(self, gradient, penalty_gradient, strength):
        ...         return gradient + 0.5 * strength * penalty_gradient
        >>> Halfway().companion(torch.ones(2), torch.tensor([-1.0, 1.0]), strength=1.0)
        tensor([0.5000, 1.5000])
    """

    threshold: float = 0.0
    """The least coherence at which the penalty is injected, unless the gate says otherwise."""

    @abstractmethod
    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        """The vector b of which coherence is cos(g, b): a tensor shaped like the gradient. Change no argument.

        Args:
            gradient: The loss gradient g, or its running average; 16-bit numbers in float32.
            penalty_gradient: The penalty gradient r at the weights, without strength.
            strength: The factor with which r would be injected: λ of this step and this parameter.
        """

    @override
    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def check_measure(measure: object) -> None:
    """Raise unless this is the name of a measure, or a measure whose companions are shaped like the gradient."""
    if measure is None:
        rule = "must be a coherence measure"
        raise argument_error("coherence", None, rule, "For plain strong regularization, use gate=None.")
    if not isinstance(measure, CoherenceMeasure):
        if isinstance(measure, type) and issubclass(measure, CoherenceMeasure):
            raise argument_error("coherence", measure, "must be an instance", f"Write {measure.__name__}().", TypeError)
        check_choice("coherence", measure, ["direction", "agreement", "temporal"])
        return
    gradient = torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    for numbers in (gradient, gradient[0]):
        found = measure.companion(numbers.clone(), numbers.neg(), 0.1)
        if not isinstance(found, Tensor) or found.shape != numbers.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            advice = f"For a gradient of shape {tuple(numbers.shape)} it returned {shape}."
            raise argument_error("coherence", measure, "must have a companion shaped like the gradient", advice)


def companion(
    measure: Union[CoherenceMeasure, MeasureName, None],
    gradient: Tensor,
    penalty_gradient: Tensor,
    strength: float,
    previous: Optional[Tensor] = None,
) -> Tensor:
    """The companion of a gradient: g+λr for ``"direction"``, the last g for ``"temporal"``, your measure's, or r."""
    if isinstance(measure, CoherenceMeasure):
        return measure.companion(gradient, penalty_gradient, strength)
    if measure == "direction":
        return torch.add(gradient, penalty_gradient, alpha=strength)
    return penalty_gradient if previous is None else previous
