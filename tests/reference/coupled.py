"""Group lasso over coupled groups, entry by entry and in double precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_gcsr import CoupledGroup

Entry = tuple[str, tuple[int, ...]]


class SlowCoupledGroupLasso:
    """The penalty of named tensors, as sums over single entries."""

    def __init__(self, groups: Sequence[CoupledGroup], all_groups: Sequence[CoupledGroup] | None = None) -> None:
        self.groups = groups
        self.all_groups = all_groups or groups

    def entries(self, tensors: Mapping[str, Tensor], group: CoupledGroup) -> list[Entry]:
        """The entries of all that makes a group."""
        found: list[Entry] = []
        for part in group.slices:
            if part.role == "makes":
                where = torch.zeros(tensors[part.name].shape, dtype=torch.bool)
                where.index_fill_(part.dim, torch.tensor(part.indices), True)
                found += [(part.name, tuple(index)) for index in where.nonzero().tolist()]
        return found

    def members(self, tensors: Mapping[str, Tensor], group: CoupledGroup) -> Tensor:
        """The entries of a group as a vector."""
        return torch.stack([tensors[name][index] for name, index in self.entries(tensors, group)]).double()

    def factor(self, tensors: Mapping[str, Tensor], group: CoupledGroup) -> float:
        """c_g = √(r_g · mean of n/r over all groups)."""

        def rows(one: CoupledGroup) -> int:
            makes = [part for part in one.slices if part.role == "makes" and tensors[part.name].dim() > 1]
            return sum(len(part.indices) for part in makes)

        lengths = [len(self.entries(tensors, one)) / rows(one) for one in self.all_groups]
        return float((rows(group) * sum(lengths) / len(lengths)) ** 0.5)

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Ω, differentiable."""
        return torch.stack([self.factor(tensors, g) * self.members(tensors, g).norm() for g in self.groups]).sum()

    def gradient(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of the value, by autograd; 0 where groups are zero."""
        leaves = {name: tensor.detach().double().clone().requires_grad_() for name, tensor in tensors.items()}
        alive = [group for group in self.groups if bool(self.members(leaves, group).detach().any())]
        value = SlowCoupledGroupLasso(alive, self.groups).value(leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))

    def prox(self, tensors: Mapping[str, Tensor], steps: Sequence[float]) -> dict[str, Tensor]:
        """The proximal map, with a step for each group."""
        results = {name: tensor.detach().double().clone() for name, tensor in tensors.items()}
        for group, step in zip(self.groups, steps, strict=True):
            where, factor = self.entries(tensors, group), self.factor(tensors, group)
            norm = float(self.members(tensors, group).detach().norm())
            for name, index in where:
                results[name][index] *= max(0.0, 1 - step * factor / norm) if norm else 0.0
        return results

    def open(self, gradients: Mapping[str, Tensor], tensors: Mapping[str, Tensor], easing: float) -> list[bool]:
        """For each group whether ⟨g + easing·r, r⟩ ≥ 0, with r the gradient of the penalty."""
        pulls = self.gradient(tensors)
        decisions = []
        for group in self.groups:
            g, r = self.members(gradients, group), self.members(pulls, group)
            decisions.append(bool(torch.dot(g + easing * r, r) >= 0))
        return decisions
