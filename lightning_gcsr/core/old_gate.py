r"""Coherence: do the loss gradients stay coherent in the presence of the penalty, and is it injected or suppressed?

Every measure is the cosine of the loss gradient g with a *companion* of g:

============= ================== ==============================================================================
measure       companion          reads as
============= ================== ==============================================================================
direction     g + λr             does the regularized gradient still point where the loss gradient points
agreement     r                  do loss and penalty pull the same way
temporal      g of the last step do successive loss gradients stay aligned
============= ================== ==============================================================================

where r is the gradient of the penalty and λ the strength. The cosine is taken over all regularized weights
(``scope="model"``), over each tensor (``"parameter"``) or, as the sign of a product, at each weight (``"element"``).
The gradient g may be that of this step or a running average. At each weight, agreement may be asked with a
*tolerance* c: cos(g + c·λr, r), so that a gradient which opposes the penalty by no more than that share of it counts
as coherent. A weight that the penalty is to release must then be worth c·λ to the loss, and not only more than nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gcsr.core.penalties import wide
from lightning_gcsr.validation import argument_error, check_choice, check_finite_number

__all__ = [
    "CoherenceMeasure",
    "Gate",
    "MeasureName",
    "ScopeName",
    "Sums",
    "by_row",
    "cosine",
    "element_coherent",
    "inner",
    "inner_by_row",
    "rough_square",
]

MeasureName = Literal["direction", "agreement", "temporal"]
ScopeName = Literal["model", "parameter", "element"]

# cos(g, g + λr) is positive until the penalty outweighs an opposing gradient altogether; 0.1 closes just before.
_DEFAULT_THRESHOLDS = {"direction": 0.1, "agreement": 0.0, "temporal": 0.0}

# In a chunk of this many numbers the product stays in the processor's cache and its float32 sum is exact to 1e-7.
_CHUNK = 1 << 16


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product Re⟨a, b⟩ of two tensors of one shape, as a 0-dim float64 tensor (float32 on MPS).

    Products are summed in float32 (float64 for float64 input) over short chunks and these sums in float64: a plain
    float32 dot product of 10 million equal numbers is off by 0.1 %. Does not synchronize with the host.

    Example:
        >>> import torch
        >>> inner(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
        tensor(1., dtype=torch.float64)
    """
    a, b = _real(wide(a)).reshape(-1), _real(wide(b)).reshape(-1)
    if a.device.type == "mps":  # has no float64
        return (a * b).sum()
    if a.device.type != "cpu" or a.numel() <= _CHUNK:
        return (a * b).sum(dtype=torch.float64)
    products = a.new_empty(_CHUNK)
    chunks = zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True)
    sums = [torch.mul(x, y, out=products[: x.numel()]).sum() for x, y in chunks]
    return torch.stack(sums).sum(dtype=torch.float64)


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


def by_row(numbers: Tensor, rows: int) -> Sequence[Tensor]:
    """The sum of each of the rows into which the numbers are cut in their order, 0-dim tensors.

    In the numbers' own precision on a CPU, where torch sums pairwise, and in float64 on a GPU; meant for less than a
    million numbers at a time. Does not synchronize with the host.
    """
    dtype = None if numbers.device.type in ("cpu", "mps") else torch.float64
    if rows == 1:
        return [numbers.sum(dtype=dtype)]
    return numbers.reshape(rows, numbers.numel() // rows).sum(1, dtype=dtype).unbind()


def inner_by_row(a: Tensor, b: Tensor, rows: int) -> Sequence[Tensor]:
    """The inner products of the rows of two tensors of one shape, see :func:`by_row`.

    Example:
        >>> import torch
        >>> inner_by_row(torch.arange(4.0), torch.ones(4), rows=2)
        (tensor(1.), tensor(5.))
    """
    return by_row(_real(a) * _real(b), rows)


def rough_square(a: Tensor) -> Tensor:
    """⟨a,a⟩ in the quickest way, a 0-dim tensor: good for nothing but to see whether it is finite."""
    flat = _real(a).reshape(-1)
    return torch.dot(flat, flat)


def element_coherent(gradient: Tensor, companion: Tensor, limit: float | Tensor = 0.0) -> Tensor:
    """Where the cosine of two scalars, the sign of their product, is not negative: 1 there and 0 elsewhere.

    A gradient that is NaN is not coherent. The result is of the real dtype that belongs to the tensors': a boolean one
    takes several times as long to make and to use. With NaN for a limit nothing is coherent.

    Example:
        >>> import torch
        >>> element_coherent(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, 2.0, 2.0]))
        tensor([1., 0., 1.])
    """
    # The product of two small numbers would vanish, and a vanished product would count as coherent.
    if gradient.is_complex():
        return (companion.sgn().conj() * gradient).real.ge_(limit)
    return companion.sign().mul_(gradient).ge_(limit)


class Sums(NamedTuple):
    """The sums a decision rests on, one float64 number for each of n tensors: vectors of shape (n,).

    g is the loss gradient without loss scale, or its average, b its companion and r the penalty gradient.
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
    """A coherence measure of your own: the cosine of the loss gradient and what you compare it with.

    Hand an instance to ``coherence``, wherever one of the names is accepted; scope and threshold mean the same. As the
    gradients come in parts of tensors, or in several at once, the companion must be made number by number.

    Example:
        >>> import torch
        >>> class Halfway(CoherenceMeasure):
        ...     "cos(g, g + λr/2): closes only where the penalty is twice as strong as the gradient that opposes it."
        ...     def companion(self, gradient, penalty_gradient, strength):
        ...         return gradient + 0.5 * strength * penalty_gradient
        >>> Gate(Halfway(), "model").companion(torch.ones(2), torch.tensor([-1.0, 1.0]), strength=1.0)
        tensor([0.5000, 1.5000])
    """

    threshold: float = 0.0
    """The least coherence at which the penalty is injected, where no other is given."""

    @abstractmethod
    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        """The vector b of which coherence is cos(g, b), a tensor like the gradient; its arguments stay as they are.

        Args:
            gradient: The loss gradient g, or its average; 16-bit numbers in float32.
            penalty_gradient: The penalty gradient r at the weights, without strength.
            strength: What r is multiplied by when it is injected: λ of this step and this parameter.
        """

    @override
    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def _check_measure(measure: object) -> None:
    if not isinstance(measure, CoherenceMeasure):
        if isinstance(measure, type) and issubclass(measure, CoherenceMeasure):
            raise argument_error("coherence", measure, "must be an instance", f"Write {measure.__name__}().", TypeError)
        check_choice("coherence", measure, [*_DEFAULT_THRESHOLDS, None])
        return
    gradient = torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    for numbers in (gradient, gradient[0]):
        companion = measure.companion(numbers.clone(), numbers.neg(), 0.1)
        if not isinstance(companion, Tensor) or companion.shape != numbers.shape:
            found = tuple(companion.shape) if isinstance(companion, Tensor) else type(companion).__name__
            advice = f"Of numbers of shape {tuple(numbers.shape)} it gave {found}."
            raise argument_error("coherence", measure, "must have a companion shaped like the gradient", advice)


class Gate:
    """The rule that decides where the penalty is injected: where coherence ≥ threshold.

    Args:
        coherence: The measure: ``"direction"``, ``"agreement"``, ``"temporal"``, one of your own, or ``None`` for an
            open gate.
        scope: What one decision covers: ``"model"``, ``"parameter"`` or ``"element"``.
        threshold: The least coherence, in [−1, 1], at which the penalty is injected. ``None`` chooses 0.1 for
            ``"direction"`` and 0 for the others. At element scope, where coherence is a sign, it has no meaning.
        tolerance: c in [0, 1], for agreement at element scope: the share of the penalty gradient by which a loss
            gradient may oppose it and still count as coherent.

    Raises:
        ValueError: If an argument is not one of its choices, if the threshold lies outside [−1, 1] or the
            tolerance outside [0, 1], or if one is given where it has no meaning.
        TypeError: If threshold or tolerance is not a number.

    Example:
        >>> Gate("direction", "model").threshold
        0.1
    """

    def __init__(
        self,
        coherence: CoherenceMeasure | MeasureName | None,
        scope: ScopeName,
        threshold: float | None = None,
        tolerance: float = 0.0,
    ) -> None:
        _check_measure(coherence)
        check_choice("scope", scope, ["model", "parameter", "element"])
        if threshold is not None:
            if coherence is None:
                rule = "must be None where coherence=None"
                raise argument_error("threshold", threshold, rule, "Name a coherence measure, or leave it out.")
            if scope == "element":
                rule = "must be None at scope='element', where coherence is a sign"
                raise argument_error("threshold", threshold, rule, "Use scope='parameter' or 'model', or leave it out.")
            check_finite_number("threshold", threshold, minimum=-1.0, maximum=1.0)
        check_finite_number("tolerance", tolerance, 0.0, 1.0, "It is a share of the penalty gradient; use 0 for none.")
        if tolerance > 0 and not (coherence == "agreement" and scope == "element"):
            rule = "must be 0 but with coherence='agreement' and scope='element'"
            raise argument_error("tolerance", tolerance, rule, "Elsewhere `threshold` says how strict the gate is.")
        self.coherence = coherence
        self.scope = scope
        self.tolerance = float(tolerance)
        if threshold is None:
            if isinstance(coherence, CoherenceMeasure):
                threshold = coherence.threshold
            else:
                threshold = _DEFAULT_THRESHOLDS.get(coherence or "", 0.0)
        self.threshold = float(threshold)

    @property
    def uses_previous_gradient(self) -> bool:
        """Whether the measure compares with the gradient of the last step, which then must be kept."""
        return self.coherence == "temporal"

    @property
    def needs_sums(self) -> bool:
        """Whether decisions rest on sums over whole tensors, which sharded ones must add up over processes."""
        return self.coherence is not None and self.scope != "element"

    @property
    def by_element(self) -> bool:
        """Whether every weight has a decision of its own, made by :func:`element_coherent`."""
        return self.coherence is not None and self.scope == "element"

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        """The vector whose cosine with the gradient is the coherence, unless that is the last gradient.

        For ``"direction"`` g+λr, of a measure of your own what it says, else the penalty gradient.
        """
        if isinstance(self.coherence, CoherenceMeasure):
            return self.coherence.companion(gradient, penalty_gradient, strength)
        if self.coherence == "direction":
            return torch.add(gradient, penalty_gradient, alpha=strength)
        return penalty_gradient

    def decide(self, sums: Sums) -> Tensor:
        """One boolean for each tensor, shape (n,); the same for all of them at model scope. No host synchronization.

        A gradient that is not finite anywhere closes every gate.
        """
        coherence = sums.coherence if self.scope == "model" else sums.coherence_by_parameter
        return (coherence >= self.threshold) & sums.finite & torch.ones_like(sums.product, dtype=torch.bool)
