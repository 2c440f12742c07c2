"""Memory: loss gradients of earlier steps, the last one or an average, that coherence is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["GradientMemory", "remember"]


def remember(memory: Tensor, gradient: Tensor, share: Tensor) -> None:
    """Take a gradient into what is remembered, in place: m ← m + share·(g − m); with a share of 0 m stays as it is.

    Exact where the share is 1, and where it is 0 even of a gradient that is not finite.

    Args:
        memory: What is remembered, m.
        gradient: The gradient g, of the same shape.
        share: What g counts, in [0, 1], a tensor that broadcasts to them.

    Example:
        >>> memory = torch.tensor([1.0, 2.0])
        >>> remember(memory, torch.tensor([3.0, torch.nan]), torch.tensor(0.0))
        >>> remember(memory, torch.tensor([3.0, 2.0]), torch.tensor(0.5))
        >>> memory
        tensor([2., 2.])
    """
    # Infinity times 0 is not 0; torch.where would take several times as long on a CPU.
    memory.lerp_(gradient.nan_to_num(), share)


class GradientMemory:
    r"""A running average of the loss gradients of each parameter, by name. Never synchronizes with the host in a step.

    m ← m + (g − m)·(1−β)/(1−βᵗ) at the t-th finite gradient, which is the exponential average that weighs its t
    gradients to a sum of 1; with β = 0 the last finite gradient. A step whose gradients are not finite leaves it as if
    it had not been.

    Args:
        decay: β in [0, 1); the average looks back over about 1/(1−β) steps.

    Example:
        >>> memory, names = GradientMemory(decay=0.5), ["weight"]
        >>> for gradient in ([1.0, 2.0], [3.0, torch.nan], [4.0, 2.0]):
        ...     gradient = torch.tensor(gradient)
        ...     [share] = memory.count(names, gradient.isfinite().all().expand(1))
        ...     remember(memory.recall("weight", gradient), gradient, share)
        >>> memory.recall("weight", gradient)
        tensor([3., 2.])
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._gradients: dict[str, Tensor] = {}
        # How many finite gradients each has met: known on the device only, since so is whether one was finite.
        self._positions: dict[str, int] = {}
        self._counts = torch.zeros(0, dtype=torch.int64)

    def recall(self, name: str, gradient: Tensor) -> Tensor:
        """What is remembered of this parameter, to be updated in place: zeros like the gradient at first."""
        if name not in self._gradients:
            self._gradients[name] = torch.zeros_like(gradient)
        return self._gradients[name]

    def _known_positions(self, names: Sequence[str], device: torch.device) -> list[int]:
        self._counts = self._counts.to(device)
        if new := [name for name in names if name not in self._positions]:
            self._positions |= {name: i for i, name in enumerate(new, start=len(self._positions))}
            self._counts = torch.cat([self._counts, self._counts.new_zeros(len(new))])
        return [self._positions[name] for name in names]

    def known(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Which of these parameters have met a finite gradient: booleans, shape (n,)."""
        positions = self._known_positions(names, device)
        return _at(self._counts, positions) > 0

    def count(self, names: Sequence[str], finite: Tensor) -> Tensor:
        """Count a gradient of these parameters where it is finite, and say what it is to count in the average.

        Args:
            names: The n parameters.
            finite: Whether the gradient of each is finite, booleans of shape (n,).

        Returns:
            The share of each gradient, 0 of one that is not finite, shape (n,), in float64 (float32 on MPS).
        """
        positions = self._known_positions(names, finite.device)
        counts = _at(self._counts, positions) + finite
        if positions == list(range(len(self._counts))):
            self._counts = counts
        else:
            for position, count in zip(positions, counts.unbind(), strict=True):
                self._counts[position] = count
        exact = counts.clamp(min=1).to(torch.float32 if counts.device.type == "mps" else torch.float64)
        return (1 - self.decay) / (1 - self.decay**exact) * finite

    def clear(self) -> None:
        """Forget all gradients: the next one starts anew."""
        self._gradients.clear()
        self._positions.clear()
        self._counts = torch.zeros(0, dtype=torch.int64)

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on with these parameters."""
        kept = [name for name in names if name in self._gradients]
        counts = self._counts.tolist()
        return {
            "averages": {name: self._gradients[name].clone() for name in kept},
            "steps": {name: counts[self._positions[name]] for name in kept},
        }

    def load_state_dict(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        """Take over what :meth:`state_dict` gave, each average to the device of its parameter."""
        self.clear()
        # A resumed run may leave a parameter out.
        names = [name for name in state["averages"] if name in devices]
        self._gradients = {name: state["averages"][name].to(devices[name], copy=True) for name in names}
        self._positions = {name: i for i, name in enumerate(names)}
        counts = [state["steps"][name] for name in names]
        self._counts = torch.tensor(counts, dtype=torch.int64, device=devices[names[0]] if names else None)


def _at(counts: Tensor, positions: list[int]) -> Tensor:
    """The counts at these positions; without a list on the device, which would have to be copied there."""
    if positions == list(range(len(counts))):
        return counts
    return torch.stack([counts[position] for position in positions]) if positions else counts[:0]
