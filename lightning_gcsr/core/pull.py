"""How hard the penalty pulls in one step, and how far a pull of 1 moves a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.numerics import host_number, on_device
from lightning_gcsr.core.optimizers import (
    learning_rate,
    momentum_factor,
    rescales_gradients,
    smallest_weight_scale,
)

__all__ = ["Pull", "kappa", "step_size"]


@dataclass(frozen=True)
class Pull:
    """How hard the penalty pulls in one step."""

    strength: float
    """λ of this step."""
    growth: float | None = None
    """With a target sparsity, what thresholds grow by, over κ; they do not follow λ then."""
    moves_zeros: bool = False
    """With a target sparsity, whether only the thresholds of zeros move."""
    tolerance: float = 0.0
    """With a target sparsity, by how much a gradient may oppose the penalty, over its root mean square."""

    @property
    def acts(self) -> bool:
        """Whether there is a penalty in this step."""
        return self.strength > 0 or self.growth is not None

    @property
    def shrinks(self) -> bool:
        """Whether weights that are not zero are pulled in this step."""
        return self.strength > 0 if self.growth is None else self.growth > 0 and not self.moves_zeros


def kappa(chunk: Chunk) -> float | Tensor:
    """κ, what a steady gradient of size 1 moves a weight by, per unit of lr: one number, or one for each tensor.

    (1 − dampening)/(1 − momentum) under SGD, and one over the root mean square of the tensor's gradient under an
    optimizer that rescales gradients, times that of its weights where steps are relative to them, as Adafactor's are.
    Where that is not known or zero, κ is 0: the penalty waits.
    """
    factor: float | Tensor = momentum_factor(chunk.group)
    if not rescales_gradients(chunk.group):
        return factor
    if chunk.mean_square is None:
        return 0.0
    if (least := smallest_weight_scale(chunk.group)) is not None:
        factor = factor * _weight_scales(chunk).clamp_min(least)
    inverse = chunk.mean_square.rsqrt().nan_to_num_(0.0, 0.0, 0.0)
    return inverse if isinstance(factor, float) and factor == 1 else inverse * factor


def _weight_scales(chunk: Chunk) -> Tensor:
    """The root mean square of each tensor's weights, of a sharded one as far as this process holds it."""
    weights = [member.weight.detach() for member in chunk.members]
    return torch.stack(torch._foreach_norm(weights, 2, dtype=torch.float32)) / chunk.sizes_tensor.clamp(min=1).sqrt()


def step_size(chunk: Chunk) -> float | Tensor:
    """lr·κ of a proximal step of strength 1: one number, or one for each tensor of the chunk."""
    rate = learning_rate(chunk.group)
    return kappa(chunk) * (on_device(host_number(rate), chunk.device) if isinstance(rate, Tensor) else float(rate))
