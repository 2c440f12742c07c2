"""Blocks of coupled groups: units of one layer that become zero together, however they are ordered in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gcsr.core.group_slices import CoupledGroup

__all__ = ["GroupBlocks"]


@dataclass(frozen=True)
class GroupBlocks:
    """Which groups are in one block, once it is known how far each is from zero.

    The groups of a layer are sorted by their distance to zero, the farthest first, and cut into blocks. So a block has
    groups that are alike, the groups nearest to zero are in the last one, and only the last one may be smaller.

    Example:
        >>> from lightning_gcsr.core.group_slices import GroupSlice
        >>> rows = [CoupledGroup((GroupSlice("weight", 0, (row,), "makes"),)) for row in range(5)]
        >>> blocks = GroupBlocks.of(rows, 2)
        >>> numbers = torch.tensor([4.0, 0.5, 3.0, 0.4, 0.3])
        >>> blocks.norms(numbers, numbers)
        [tensor([5.0000, 0.6403, 5.0000, 0.6403, 0.3000])]
    """

    layers: Tensor
    """The layer of each group, as a number."""
    lengths: Tensor
    """How many groups each block has."""
    block_of_place: Tensor
    """The block of each group, of groups that are sorted by :meth:`order`."""
    largest: int
    """The number of groups in the largest block."""

    @classmethod
    def of(cls, groups: Sequence[CoupledGroup], size: int) -> GroupBlocks:
        """Blocks of these groups that are ``size`` indices wide. A group that is at least as wide is a block alone."""
        alike: dict[tuple[tuple[str, int, str], ...], list[int]] = {}
        for number, group in enumerate(groups):
            alike.setdefault(_tensors(group), []).append(number)
        layers, lengths = torch.empty(len(groups), dtype=torch.long), []
        for layer, numbers in enumerate(alike.values()):
            layers[numbers] = layer
            together = math.ceil(size / groups[numbers[0]].width)
            lengths += [min(together, len(numbers) - start) for start in range(0, len(numbers), together)]
        sizes = torch.tensor(lengths)
        return cls(layers, sizes, torch.arange(len(lengths)).repeat_interleave(sizes), max(lengths))

    def to(self, device: torch.device) -> GroupBlocks:
        """These blocks, on another device."""
        return replace(
            self,
            layers=self.layers.to(device),
            lengths=self.lengths.to(device),
            block_of_place=self.block_of_place.to(device),
        )

    def order(self, distance: Tensor) -> Tensor:
        """The groups layer by layer, and in each layer by their distance to zero, the farthest first."""
        falling = torch.argsort(distance, descending=True, stable=True)
        return falling[torch.argsort(self.layers[falling], stable=True)]

    def norms(self, distance: Tensor, *numbers: Tensor) -> list[Tensor]:
        """Numbers for each group, each replaced by the Euclidean norm over the block; the same on all processes.

        Args:
            distance: How far each group is from zero.
            numbers: What the norms are of, a number for each group.
        """
        order = self.order(distance)
        block = self.block_of_place[torch.argsort(order)]
        squares = [torch.segment_reduce(n[order].square(), "sum", lengths=self.lengths, unsafe=True) for n in numbers]
        return [square.sqrt()[block] for square in squares]


def _tensors(group: CoupledGroup) -> tuple[tuple[str, int, str], ...]:
    """The tensors and dimensions in which a group lies; all units of a layer have the same."""
    return tuple((part.name, part.dim, part.role) for part in group.slices)
