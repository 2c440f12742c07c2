"""Memory: loss gradients of earlier steps, the last one or an average, that coherence is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["AveragedGradients", "LastGradients"]


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


class AveragedGradients:
    r"""A running average of the loss gradients of each parameter, by name. Never synchronizes with the host.

    m ← m + (g − m)·(1−β)/(1−βᵗ) at step t, which is the exponential average that weighs its t gradients to a sum of 1.
    Where a number of a gradient is not finite, the average stays as it was.

    Args:
        decay: β in [0, 1); the average looks back over about 1/(1−β) steps.

    Example:
        >>> averages = AveragedGradients(decay=0.5)
        >>> averages.update("weight", torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
        >>> averages.update("weight", torch.tensor([4.0, torch.nan]))
        tensor([3., 2.])
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def update(self, name: str, gradient: Tensor) -> Tensor:
        """Take this step's gradient in, and give the average as it then is; not a copy, and not to be changed."""
        steps = self._steps[name] = self._steps.get(name, 0) + 1
        if name not in self._averages:
            self._averages[name] = torch.zeros_like(gradient)
        average = self._averages[name]
        weight = (1 - self.decay) / (1 - self.decay**steps)
        return average.lerp_(torch.where(gradient.isfinite(), gradient, average), weight)

    def clear(self) -> None:
        """Forget all gradients: the next one starts the average anew."""
        self._averages.clear()
        self._steps.clear()

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on with these parameters."""
        kept = [name for name in names if name in self._averages]
        return {
            "averages": {name: self._averages[name].clone() for name in kept},
            "steps": {name: self._steps[name] for name in kept},
        }

    def load_state_dict(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        """Take over what :meth:`state_dict` gave, each average to the device of its parameter."""
        self._averages = {
            name: average.to(devices[name], copy=True)
            for name, average in state["averages"].items()
            if name in devices  # else the resumed run leaves this parameter out
        }
        self._steps = {name: state["steps"][name] for name in self._averages}
