"""Group lasso over what can be removed together: value, gradient and proximal map across tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Optional, Union

import torch
from torch import Tensor

from lightning_gcsr.core.numerics import wide
from lightning_gcsr.core.sharding import is_sharded
from lightning_gcsr.structured.coupled_groups import CoupledGroup
from lightning_gcsr.validation import argument_error, check_choice

__all__ = ["CoupledGroupLasso"]

Tensors = Union[Mapping[str, Tensor], Iterable[tuple[str, Tensor]]]


class CoupledGroupLasso:
    r"""The group lasso Ω(w) = Σ_g √n_g ‖w_g‖ over coupled groups, whose weights lie in several tensors.

    w_g is all that makes the unit g: rows of weights, their biases, and the entries of norms. n_g is the number of
    these entries. Gradient √n_g · w_g/‖w_g‖ (0 for a zero group); proximal map: the block soft threshold,
    w_g · max(0, 1 − step·√n_g/‖w_g‖). A group is zero in all of its tensors or in none, and
    :func:`~lightning_gcsr.shrink_units` removes one that is zero.

    With ``members="all"`` the weights that read the unit belong to its group as well. Groups then overlap, since a
    weight between two hidden layers makes one unit and reads another. The factors of both multiply such a weight; this
    is no longer the proximal map of Ω, but zero groups are exactly zero as well.

    Tensors are passed by name, as ``module.named_parameters()`` or a dict, and never kept. Works without Lightning and
    without synchronizing with the host. Every process of DDP computes the same; sharded weights are refused.

    Args:
        groups: The groups, from :func:`~lightning_gcsr.structured.coupled_groups.coupled_groups`.
        members: ``"makes"`` for what makes a unit, ``"all"`` for what reads it, too.

    Raises:
        ValueError: If there are no groups, or ``members`` is neither.

    Example:
        >>> from torch import nn
        >>> from lightning_gcsr.structured.coupled_groups import coupled_groups
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
        >>> penalty = CoupledGroupLasso(coupled_groups(net, torch.randn(1, 3)))
        >>> _ = nn.init.constant_(net[0].weight, 0.1), nn.init.constant_(net[0].bias, 0.1)
        >>> _ = nn.init.constant_(net[0].weight[0], 1.0)
        >>> penalty.prox_(net.named_parameters(), step=0.2)
        >>> net[0].weight.norm(dim=1) > 0
        tensor([ True, False])
    """

    def __init__(self, groups: Sequence[CoupledGroup], members: Literal["makes", "all"] = "makes") -> None:
        check_choice("members", members, ("makes", "all"))
        if not groups:
            advice = "None of the units of the module can be removed; `shrink_units` says why."
            raise argument_error("groups", groups, "must not be empty", advice)
        self.groups = list(groups)
        self.members = members
        self._slices: dict[tuple[str, int], Tensor] = {}
        """For each index of a dimension, the number of its group; the last number for none."""
        ends: dict[tuple[str, int], int] = {}
        parts = [(i, part) for i, group in enumerate(self.groups) for part in group.slices if self._takes(part.role)]
        for _, part in parts:
            key = part.name, part.dim
            ends[key] = max(ends.get(key, 0), max(part.indices) + 1)
        for key, end in ends.items():
            self._slices[key] = torch.full((end,), len(self.groups))
        for i, part in parts:
            self._slices[part.name, part.dim][list(part.indices)] = i

    def _takes(self, role: str) -> bool:
        return self.members == "all" or role == "makes"

    def __repr__(self) -> str:
        return f"CoupledGroupLasso(<{len(self.groups)} groups>, members={self.members!r})"

    def group_sizes(self, tensors: Tensors) -> Tensor:
        """The number n_g of entries of each group."""
        return self._sums(self._checked(tensors), lambda tensor: torch.ones_like(wide(tensor).abs()))

    def group_norms(self, tensors: Tensors) -> Tensor:
        """The norm ‖w_g‖ of each group, a tensor on the device of the first weight."""
        return self._norms(self._checked(tensors))

    def value(self, tensors: Tensors) -> Tensor:
        """Ω(w), a 0-dim tensor; its autograd gradient is :meth:`gradient` wherever Ω is differentiable."""
        checked = self._checked(tensors)
        return (self.group_sizes(checked).sqrt() * self._norms(checked)).sum()

    def gradient(self, tensors: Tensors) -> dict[str, Tensor]:
        """A (sub)gradient of Ω, by name."""
        checked = self._checked(tensors)
        norms = self._norms(checked)
        factors = torch.where(norms > 0, self.group_sizes(checked).sqrt() / norms, 0.0)
        gradients: dict[str, Tensor] = {}
        for name, dim in self._slices:
            part = checked[name] * self._spread(factors, checked[name], name, dim, 0.0)
            gradients[name] = gradients[name] + part if name in gradients else part
        return gradients

    def scale_factors(self, tensors: Tensors, step: Union[float, Tensor]) -> Tensor:
        """What the proximal map multiplies each group by, max(0, 1 − step·√n_g/‖w_g‖); 0 for a zero group.

        Args:
            tensors: The weights by name.
            step: The size s ≥ 0 of the step: a number, or a tensor with one for each group, 0 where its gate is closed.
        """
        checked = self._checked(tensors)
        norms = self._norms(checked)
        excess = (
            norms - torch.as_tensor(step, dtype=norms.dtype, device=norms.device) * self.group_sizes(checked).sqrt()
        )
        return torch.where(excess > 0, excess / norms, 0.0)

    @torch.no_grad()
    def multiply_(self, tensors: Tensors, factors: Tensor) -> None:
        """Multiply the weights of each group by a factor, in place."""
        checked = self._checked(tensors)
        for name, dim in self._slices:
            checked[name].mul_(self._spread(factors, checked[name], name, dim, 1.0))

    @torch.no_grad()
    def prox_(self, tensors: Tensors, step: Union[float, Tensor]) -> None:
        """Apply the proximal map in place, as after a step of the optimizer, with ``step`` = learning rate × strength.

        Args:
            tensors: The weights by name.
            step: The size of the step, as in :meth:`scale_factors`.
        """
        checked = self._checked(tensors)
        self.multiply_(checked, self.scale_factors(checked, step))

    def _norms(self, tensors: dict[str, Tensor]) -> Tensor:
        return self._sums(tensors, lambda tensor: wide(tensor).abs().square()).sqrt()

    def _sums(self, tensors: dict[str, Tensor], entries: Callable[[Tensor], Tensor]) -> Tensor:
        total: Optional[Tensor] = None
        for name, dim in self._slices:
            tensor = tensors[name]
            part = entries(tensor).movedim(dim, 0).reshape(tensor.shape[dim], -1).sum(1)
            if total is None:
                total = part.new_zeros(len(self.groups) + 1)
            groups = self._groups_along(name, dim, tensor.shape[dim], total.device)
            total = total.index_add(0, groups, part.to(total.device, total.dtype))
        assert total is not None  # there is a group
        return total[:-1]

    def _spread(self, factors: Tensor, tensor: Tensor, name: str, dim: int, outside: float) -> Tensor:
        """The factor of the group of each index, shaped to broadcast against a tensor."""
        padded = torch.cat([factors, factors.new_full((1,), outside)])
        spread = padded[self._groups_along(name, dim, tensor.shape[dim], factors.device)].to(
            tensor.device, tensor.dtype
        )
        return spread.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])

    def _groups_along(self, name: str, dim: int, size: int, device: torch.device) -> Tensor:
        groups = self._slices[name, dim]
        if len(groups) < size or groups.device != device:
            beyond = groups.new_full((size - len(groups),), len(self.groups))
            self._slices[name, dim] = groups = torch.cat([groups, beyond]).to(device)
        return groups

    def _checked(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors by name, each with the indices that the groups name."""
        named = dict(tensors)
        for (name, dim), groups in self._slices.items():
            if name not in named:
                raise ValueError(
                    f"`tensors` must hold every tensor of the groups, and {name!r} is not among them. Leave out whole"
                    " groups instead of some of their tensors."
                )
            tensor = named[name]
            if is_sharded(tensor):
                raise ValueError(f"`tensors` must not be sharded, and {name!r} is. Use DDP, which keeps weights whole.")
            if tensor.dim() <= dim or tensor.shape[dim] < len(groups):
                raise ValueError(
                    f"`tensors` must have the shapes that the groups were made for, and {name!r} has the shape"
                    f" {tuple(tensor.shape)}. Call `coupled_groups` again, on the module as it is now."
                )
        return named
