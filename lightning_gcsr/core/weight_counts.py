"""What a sparsity controller has to know of the weights after a step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.latent_weights import open_share
from lightning_gcsr.core.numerics import wide
from lightning_gcsr.core.pull import kappa
from lightning_gcsr.core.sharding import sum_over_processes
from lightning_gcsr.core.sparsity_controller import WeightCounts
from lightning_gcsr.core.step_plan import StepPlan

__all__ = ["counts_after_step"]


def counts_after_step(plan: StepPlan, reach: float) -> WeightCounts:
    """Count zeros, weights that may turn, and those within reach, over all processes. Synchronizes with the host.

    Of coupled groups, groups are counted.

    Args:
        plan: The step that was made.
        reach: How far the thresholds would move, over κ; see :class:`WeightCounts`.
    """
    numbers = [
        _counts(plan, chunk, reach).to(plan.device, torch.float64) * plan.replication[place.start]
        for place, chunk in zip(plan.places, plan.chunks, strict=True)
    ]
    total = torch.stack(numbers).sum(0)
    zeros, movable, near = (sum_over_processes(total) if plan.sharded else total).round().tolist()
    if plan.penalty.coupled:
        weights = len(plan.penalty.groups)  # type: ignore[attr-defined]  # of CoupledGroupLasso
    else:
        weights = sum(member.parameter.numel() for member in plan.members)
    return WeightCounts(weights, int(zeros), int(movable), int(near), plan.penalty.at_once)


def _counts(plan: StepPlan, chunk: Chunk, reach: float) -> Tensor:
    """The numbers of zeros, of weights that some reach would turn, and of those that this one would, shape (3,)."""
    penalty, gate = plan.penalty, _gate(plan, chunk)
    latent, threshold = wide(chunk.kept["latent"]), chunk.kept["threshold"]
    distance = chunk.spread(kappa(chunk) * (reach * chunk.relative))
    if reach < 0:
        moved = (threshold + distance).clamp_(min=0)
    else:
        moved = threshold + (distance if gate is None else open_share(gate, penalty, threshold.dtype) * distance)
    zero, then = (penalty.units(penalty.prox(latent, t) == 0) for t in (threshold, moved))
    if reach < 0:  # a zero whose latent weight is zero does not come back, whatever the threshold
        movable = zero & ~penalty.units(latent == 0)
    else:
        movable = ~zero if gate is None else ~zero & penalty.units(gate > 0)
    stays = torch.as_tensor(distance == 0, device=latent.device)  # κ is 0 of tensors whose gradients all were
    movable &= ~penalty.units(stays.expand(latent.shape))
    return torch.stack([zero.sum(), movable.sum(), (zero ^ then).sum()])


def _gate(plan: StepPlan, chunk: Chunk) -> Tensor | None:
    """1 where a weight was open in the step and 0 where it was not; ``None`` where all count as open."""
    if plan.by_element:
        return chunk.kept["gate"] if chunk.rows is None else None
    opened = None if chunk.opened is None else chunk.spread(chunk.opened.to(torch.float32), "gate")
    return None if opened is None else torch.as_tensor(opened, device=chunk.device)
