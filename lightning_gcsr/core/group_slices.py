"""A group of weights that lie in several tensors, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["CoupledGroup", "GroupSlice", "in_blocks"]


@dataclass(frozen=True)
class GroupSlice:
    """Some indices of one dimension of a parameter."""

    name: str
    """The name of the parameter."""
    dim: int
    """The dimension."""
    indices: tuple[int, ...]
    """The indices along it."""
    role: Literal["makes", "reads"]
    """Whether the unit is what these weights make, or what they read."""


@dataclass(frozen=True)
class CoupledGroup:
    """One unit of a network: a channel, a hidden unit, a head of attention."""

    slices: tuple[GroupSlice, ...]
    """Where it is in the parameters."""

    def __str__(self) -> str:
        parts = (f"{part.name}[{':, ' * part.dim}{list(part.indices)}]" for part in self.slices)
        return ", ".join(parts)

    @property
    def made_by(self) -> set[str]:
        """The names of the parameters that make the unit."""
        return {part.name for part in self.slices if part.role == "makes"}

    @property
    def width(self) -> int:
        """The number of neighbouring indices of the unit: 1 for a channel, more for a head.

        The smallest number along any dimension, since one unit may be several indices of a layer that flattens, or
        computes values and gates, or queries, keys and values.
        """
        return min(len(part.indices) for part in self.slices)


def in_blocks(groups: Iterable[CoupledGroup], size: int) -> tuple[CoupledGroup, ...]:
    """Groups that lie in the same tensors joined until they are ``size`` wide; the last ones may be less.

    Example:
        >>> rows = [CoupledGroup((GroupSlice("weight", 0, (row,), "makes"),)) for row in range(5)]
        >>> for block in in_blocks(rows, 2):
        ...     print(block)
        weight[[0, 1]]
        weight[[2, 3]]
        weight[[4]]
    """
    open_blocks: dict[tuple[tuple[str, int, str], ...], int] = {}
    blocks: list[CoupledGroup] = []
    for group in groups:
        tensors = tuple((part.name, part.dim, part.role) for part in group.slices)
        at = open_blocks.get(tensors)
        if at is None or blocks[at].width >= size:
            open_blocks[tensors] = len(blocks)
            blocks.append(group)
        else:
            blocks[at] = _joined(blocks[at], group)
    return tuple(blocks)


def _joined(one: CoupledGroup, other: CoupledGroup) -> CoupledGroup:
    pairs = zip(one.slices, other.slices, strict=True)
    return CoupledGroup(tuple(replace(a, indices=a.indices + b.indices) for a, b in pairs))
