"""Memory: the loss gradients of the last step, which the temporal measure compares with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LastGradients"]


class LastGradients:
    """The last finite loss gradient of each parameter, by name. Never synchronizes with the host.

    Example:
        >>> memory = LastGradients()
        >>> memory.remember("weight", torch.tensor([1.0, 2.0]), finite=torch.tensor(True))
        >>> memory.remember("weight", torch.tensor([3.0, torch.nan]), finite=torch.tensor(False))
        >>> memory.recall("weight")
        tensor([1., 2.])
    """

    def __init__(self) -> None:
        # Whether there was a finite gradient yet is known on the device only, so a flag is kept beside each.
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def recall(self, name: str) -> Tensor | None:
        """The last gradient of this parameter; ``None`` in its first step, zeros if there was no finite one yet."""
        return self._gradients[name][0] if name in self._gradients else None

    def known(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Which of these parameters have a last gradient to compare with: booleans, shape (n,)."""
        result = torch.zeros(len(names), dtype=torch.bool, device=device)
        for i, name in enumerate(names):
            if name in self._gradients:
                result[i] = self._gradients[name][1]
        return result

    def remember(self, name: str, gradient: Tensor, finite: Tensor) -> None:
        """Keep a copy of this gradient for the next step, if the step's gradients were finite."""
        if name in self._gradients:
            last, known = self._gradients[name]
            self._gradients[name] = last.copy_(torch.where(finite, gradient, last)), known | finite
        else:
            self._gradients[name] = torch.where(finite, gradient, 0.0), finite

    def clear(self) -> None:
        """Forget all gradients: the next step has no predecessor."""
        self._gradients.clear()
