"""Penalties: what is added to the loss, as value, gradient and proximal map of one weight tensor.

A penalty is a small object without state of its own. Every method takes one weight tensor and works elementwise or
groupwise on it, on any device and in any floating or complex dtype, without synchronizing with the host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gcsr.core.numerics import wide
from lightning_gcsr.validation import argument_error, check_finite_number, check_integer, did_you_mean

__all__ = ["L1", "L2", "ElasticNet", "GroupLasso", "Penalty", "PenaltyName", "resolve_penalty"]

PenaltyName = Literal["l1", "l2", "elastic_net", "group_lasso"]


class Penalty(ABC):
    """A penalty Ω(w) on one weight tensor w, given by three maps.

    A penalty of your own implements the three methods; it is then accepted wherever a built-in one is.

    Example:
        >>> import torch
        >>> from lightning_gcsr import L1
        >>> weight = torch.tensor([2.0, -0.5, 0.0])
        >>> L1().value(weight), L1().gradient(weight), L1().prox(weight, 1.0)
        (tensor(2.5000), tensor([ 1., -1.,  0.]), tensor([1., 0., 0.]))
    """

    elementwise: bool = False
    """Whether Ω is a sum over single weights, each penalized alike in whatever tensor it lies.

    Such a penalty is cheaper, since tensors can be cut up and joined at will.
    """
    gradient_is_sign: bool = False
    """Whether the gradient of real weights consists of −1, 0 and 1, which saves a look at its signs."""
    coupled: bool = False
    """Whether the weights of a group lie in several tensors, which are penalized as one."""

    @property
    def makes_zeros(self) -> bool:
        """Whether the proximal map makes weights exactly zero; of a penalty of your own True, unless it says otherwise.

        Without zeros there can be no target sparsity.
        """
        return True

    @property
    def at_once(self) -> int:
        """How many of what a sparsity counts become zero at once, at most: the groups of a block."""
        return 1

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """Ω(w), a 0-dim real tensor; its autograd gradient is :meth:`gradient` wherever Ω is differentiable."""

    @abstractmethod
    def gradient(self, weight: Tensor) -> Tensor:
        """A (sub)gradient r of Ω at w, shaped like w; 0 where w and with it the choice is 0.

        It may be w itself, and is not changed by those who ask.
        """

    @abstractmethod
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        """The proximal map, the v that minimizes ½‖v − w‖² + step·Ω(v), a new tensor.

        Args:
            weight: The weights w.
            step: The size s ≥ 0 of the step: a float, a 0-dim tensor, or one number for each weight. A step of 0
                leaves a weight as it is.
        """

    def shrink_(self, weight: Tensor, step: float | Tensor, gate: Tensor | None = None) -> Tensor:
        """W ← prox(w), in place, where the gate of a weight is 1 and not 0; ``None`` is open everywhere."""
        return weight.copy_(self.prox(weight, step if gate is None else step * gate.to(weight.dtype.to_real())))

    def unshrunk(self, weight: Tensor, step: Tensor, latent: Tensor) -> Tensor:
        """The z of which these weights w are the proximal map, z = w + step·r(w).

        Args:
            weight: The weights w, some of which somebody replaced.
            step: The size of the proximal step, one number for each weight.
            latent: The z before that. It is kept where w is still its proximal map.
        """
        replaced = self.prox(wide(latent), step).to(latent.dtype) != weight.to(latent.dtype)
        follows = weight + self.group_mean(step) * self.gradient(weight)
        return torch.where(self._with_their_groups(replaced), follows.to(latent.dtype), latent)

    def _with_their_groups(self, chosen: Tensor) -> Tensor:
        """These weights, and all others that are penalized together with one of them."""
        return chosen if self.elementwise else chosen.any()

    def group_mean(self, values: Tensor) -> Tensor:
        """Numbers for each weight, averaged over the weights that are penalized together; shaped as they are.

        A group shrinks as a whole, however many of its weights have an open gate. An :attr:`elementwise` penalty
        averages over nothing.
        """
        return values

    def signed(self, gradient: Tensor, compared: Tensor) -> Tensor:
        """For each weight a new number with the sign of the cosine of the two scalars, which is that of their product.

        Weights that are decided on together share one number.
        """
        # The product of two small numbers would vanish, and a vanished product would count as coherent.
        if gradient.is_complex():
            return (compared.sgn().conj() * gradient).real
        return compared.sign().mul_(gradient)

    def units(self, holds: Tensor) -> Tensor:
        """Whether something holds for what a sparsity counts: for each weight, or for each whole coupled group."""
        return holds

    def whole_units(self, holds: Tensor) -> Tensor:
        """:meth:`units`, for each weight."""
        return holds

    def splits_along(self, dim: int, dims: int) -> bool:
        """Whether the parts of a weight that is cut along this dimension can be penalized apart, as shards are.

        True for an :attr:`elementwise` penalty. A penalty of your own says False unless it says otherwise, and then
        weights sharded over processes are refused.

        Args:
            dim: The dimension, from 0.
            dims: The number of dimensions of the weight.
        """
        return self.elementwise

    @override
    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def _sign(weight: Tensor) -> Tensor:
    # On real tensors `sgn` gives the same and takes ten times as long on a CPU.
    return weight.sgn() if weight.is_complex() else weight.sign()


def _inside(weight: Tensor, step: float | Tensor) -> Tensor:
    """The weights, limited to [−step, step]. Limits that are numbers make it three times as fast on a CPU."""
    limit = step.to(weight) if isinstance(step, Tensor) else step
    return weight.clamp(-limit, limit)  # type: ignore[arg-type]


def _soft_threshold(weight: Tensor, step: float | Tensor) -> Tensor:
    if weight.is_complex():
        return _sign(weight) * (weight.abs() - step).clamp_min(0)
    # This gives an exact +0 inside the band; sign(w)·relu(|w|−s) would leave −0 there.
    inside = _inside(weight, step)
    return torch.sub(weight, inside, out=inside)


def _half_sum_of_squares(weight: Tensor) -> Tensor:
    return wide(weight).abs().square().sum() / 2


class L1(Penalty):
    r"""The L1 norm Ω(w) = Σ\|w\|: a constant pull toward zero, exact zeros with ``update="proximal"``.

    Gradient sign(w) (for complex weights w/\|w\|); proximal map: the soft threshold by ``step``.

    Example:
        >>> import torch
        >>> L1().prox(torch.tensor([0.3, -0.1]), 0.2)
        tensor([0.1000, 0.0000])
    """

    elementwise = True
    gradient_is_sign = True

    @override
    def value(self, weight: Tensor) -> Tensor:
        return wide(weight).abs().sum()

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return _sign(weight)

    @override
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return _soft_threshold(weight, step)

    @override
    def shrink_(self, weight: Tensor, step: float | Tensor, gate: Tensor | None = None) -> Tensor:
        if weight.is_complex():
            return super().shrink_(weight, step, gate)
        inside = _inside(weight, step)
        return weight.sub_(inside) if gate is None else weight.addcmul_(inside, gate, value=-1.0)


class L2(Penalty):
    """Half the squared L2 norm, Ω(w) = ½ Σ w²: a pull in proportion to the weight, never an exact zero.

    Gradient w; proximal map w / (1 + step).

    Example:
        >>> import torch
        >>> L2().prox(torch.tensor([3.0, -1.5]), 0.5)
        tensor([ 2., -1.])
    """

    elementwise = True

    @property
    @override
    def makes_zeros(self) -> bool:
        return False

    @override
    def value(self, weight: Tensor) -> Tensor:
        return _half_sum_of_squares(weight)

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return weight

    @override
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return weight / (1 + step)


class ElasticNet(Penalty):
    r"""A mixture of :class:`L1` and :class:`L2`: Ω(w) = a·Σ\|w\| + (1−a)·½ Σ w².

    Gradient a·sign(w) + (1−a)·w; proximal map: soft threshold by step·a, then division by 1 + step·(1−a).

    Args:
        l1_ratio: The share a of L1, in [0, 1], as in scikit-learn's ``ElasticNet``.

    Raises:
        ValueError: If ``l1_ratio`` is not a number in [0, 1].

    Example:
        >>> import torch
        >>> ElasticNet(l1_ratio=0.5).gradient(torch.tensor([2.0, -4.0]))
        tensor([ 1.5000, -2.5000])
    """

    elementwise = True

    def __init__(self, l1_ratio: float = 0.5) -> None:
        check_finite_number("l1_ratio", l1_ratio, minimum=0.0, maximum=1.0)
        self.l1_ratio = l1_ratio

    @property
    @override
    def makes_zeros(self) -> bool:
        return self.l1_ratio > 0

    @override
    def value(self, weight: Tensor) -> Tensor:
        return self.l1_ratio * wide(weight).abs().sum() + (1 - self.l1_ratio) * _half_sum_of_squares(weight)

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return _sign(weight).mul_(self.l1_ratio).add_(weight, alpha=1 - self.l1_ratio)

    @override
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return _soft_threshold(weight, step * self.l1_ratio) / (1 + step * (1 - self.l1_ratio))


class GroupLasso(Penalty):
    """The group lasso Ω(w) = Σ_g √n_g ‖w_g‖ over the slices along one dimension: whole units become zero.

    A group g is one index of dimension ``dim``: with ``dim=0`` an output unit of a ``Linear`` or an output channel of
    a ``Conv2d``; with ``dim=1`` an input. n_g is the number of weights in it.
    Gradient √n_g · w_g/‖w_g‖ (0 for a zero group); proximal map: the block soft threshold,
    w_g · max(0, 1 − step·√n_g/‖w_g‖).
    On the sparse gradient of an embedding only the touched rows take part, so use ``dim=0`` there.

    Args:
        dim: The dimension whose indices are the groups; negative counts from the end.

    Raises:
        TypeError: If ``dim`` is not an integer.
        ValueError: On use, if the weight has no such dimension.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
        >>> GroupLasso(dim=0).prox(weight, 1 / 2**0.5)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """

    def __init__(self, dim: int = 0) -> None:
        check_integer("dim", dim)
        self.dim = dim

    @override
    def splits_along(self, dim: int, dims: int) -> bool:
        return dim == self.dim % dims

    def _norms(self, weight: Tensor) -> Tensor:
        """‖w_g‖ of every group, shaped to broadcast against the weight."""
        if not -weight.dim() <= self.dim < weight.dim():
            raise argument_error(
                "dim",
                self.dim,
                f"must name a dimension of every regularized weight, of which one has the shape {tuple(weight.shape)}",
                "Use dim=0, or leave that weight out with `exclude`.",
            )
        others = [d for d in range(weight.dim()) if d != self.dim % weight.dim()]
        if not others:  # a vector: every group is one weight
            return wide(weight).abs()
        norms: Tensor = torch.linalg.vector_norm(wide(weight), dim=others, keepdim=True)
        return norms

    @override
    def _with_their_groups(self, chosen: Tensor) -> Tensor:
        return self.group_mean(chosen.float()) > 0

    @override
    def group_mean(self, values: Tensor) -> Tensor:
        others = [d for d in range(values.dim()) if d != self.dim % values.dim()]
        return values.mean(others, keepdim=True).expand_as(values) if others else values

    def _root_size(self, weight: Tensor) -> float:
        return math.sqrt(weight.numel() / max(1, weight.shape[self.dim]))

    @override
    def value(self, weight: Tensor) -> Tensor:
        return self._norms(weight).sum() * self._root_size(weight)

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        norms = self._norms(weight)
        # √n_g/‖w_g‖ would overflow for the smallest weights; w_g/‖w_g‖ cannot.
        return (torch.where(norms > 0, weight / norms, 0.0) * self._root_size(weight)).to(weight.dtype)

    @override
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        norms = self._norms(weight)
        excess = norms - step * self._root_size(weight)
        # Where the group survives its norm is positive; elsewhere the quotient may be 0/0 and is not looked at.
        return torch.where(excess > 0, weight * (excess / norms), 0.0).to(weight.dtype)


_BY_NAME: dict[str, type[Penalty]] = {"l1": L1, "l2": L2, "elastic_net": ElasticNet, "group_lasso": GroupLasso}


def resolve_penalty(penalty: Union[Penalty, PenaltyName]) -> Penalty:
    """The penalty object for an object or one of the names ``"l1"``, ``"l2"``, ``"elastic_net"``, ``"group_lasso"``.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a :class:`Penalty`.

    Example:
        >>> resolve_penalty("elastic_net")
        ElasticNet(l1_ratio=0.5)
    """
    if isinstance(penalty, Penalty):
        return penalty
    if isinstance(penalty, str):
        if penalty in _BY_NAME:
            return _BY_NAME[penalty]()
        raise argument_error("penalty", penalty, f"must be one of {list(_BY_NAME)}", did_you_mean(penalty, _BY_NAME))
    hint = f"Write {penalty.__name__}() instead." if isinstance(penalty, type) else "Subclass `Penalty`, or use a name."
    raise argument_error("penalty", penalty, "must be a name or a Penalty", hint, TypeError)
