"""A group of weights that lie in several tensors, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CoupledGroup", "GroupSlice"]


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
