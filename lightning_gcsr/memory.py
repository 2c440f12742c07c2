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
    r"""A running average of the loss gradients of each parameter, by name. Never synchronizes with the host in a step.

    m ← m + (g − m)·(1−β)/(1−βᵗ) at the t-th finite gradient, which is the exponential average that weighs its t
    gradients to a sum of 1. A step whose gradients are not finite leaves it as if it had not been.

    Args:
        decay: β in [0, 1); the average looks back over about 1/(1−β) steps.

    Example:
        >>> averages, yes = AveragedGradients(decay=0.5), torch.tensor(True)
        >>> averages.update("weight", torch.tensor([1.0, 2.0]), finite=yes)
        tensor([1., 2.])
        >>> averages.update("weight", torch.tensor([3.0, torch.nan]), finite=~yes)
        tensor([1., 2.])
        >>> averages.update("weight", torch.tensor([4.0, 2.0]), finite=yes)
        tensor([3., 2.])
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        # Known on the device only, since so is whether a gradient was finite.
        self._steps: dict[str, Tensor] = {}

    def update(self, name: str, gradient: Tensor, finite: Tensor) -> Tensor:
        """Take this step's gradient in, if the step's gradients were finite.

        Returns:
            The average as it then is; not a copy, and not to be changed.
        """
        if name not in self._averages:
            self._averages[name] = torch.zeros_like(gradient)
            self._steps[name] = torch.zeros((), dtype=torch.int64, device=gradient.device)
        average, steps = self._averages[name], self._steps[name]
        steps += finite
        exact = steps.clamp(min=1).to(torch.float32 if steps.device.type == "mps" else torch.float64)
        weight = (1 - self.decay) / (1 - self.decay**exact)
        return average.lerp_(torch.where(finite, gradient, average), weight.to(average.dtype))

    def clear(self) -> None:
        """Forget all gradients: the next one starts the average anew."""
        self._averages.clear()
        self._steps.clear()

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on with these parameters."""
        kept = [name for name in names if name in self._averages]
        return {
            "averages": {name: self._averages[name].clone() for name in kept},
            "steps": {name: int(self._steps[name]) for name in kept},
        }

    def load_state_dict(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        """Take over what :meth:`state_dict` gave, each average to the device of its parameter."""
        self.clear()
        for name, average in state["averages"].items():
            if name in devices:  # else the resumed run leaves this parameter out
                self._averages[name] = average.to(devices[name], copy=True)
                self._steps[name] = torch.tensor(state["steps"][name], device=devices[name])
