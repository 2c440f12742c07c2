"""What a sparsity controller has to know of the weights after a step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.latent_weights import count_weights
from lightning_gcsr.core.pull import kappa
from lightning_gcsr.core.sharding import sum_over_processes
from lightning_gcsr.core.sparsity_controller import WeightCounts
from lightning_gcsr.core.step_plan import StepPlan

__all__ = ["counts_after_step"]


def counts_after_step(plan: StepPlan, reach: float) -> WeightCounts:
    """Count zeros, open weights, and weights within reach of zero, over all processes. Synchronizes with the host.

    Args:
        plan: The step that was made.
        reach: How far the thresholds would move, over κ; see :class:`WeightCounts`.
    """
    numbers = []
    for positions, chunk in zip(plan.positions_of, plan.chunks, strict=True):
        distance = kappa(chunk) * (abs(reach) * chunk.relative)
        if isinstance(distance, Tensor) and distance.dim() > 0:
            distance = chunk.spread(distance)
        counts = torch.stack(count_weights(chunk, plan.penalty, distance, _gate(plan, chunk), reach < 0))
        numbers.append(counts.to(plan.device, torch.float64) * plan.replication[positions[0]])
    total = torch.stack(numbers).sum(0)
    zeros, nonzeros, near = (sum_over_processes(total) if plan.sharded else total).round().tolist()
    groups = getattr(plan.penalty, "groups", None)
    weights = sum(member.parameter.numel() for member in plan.members) if groups is None else len(groups)
    return WeightCounts(weights, int(zeros), int(nonzeros), int(near))


def _gate(plan: StepPlan, chunk: Chunk) -> Tensor | None:
    """1 where a weight was open in the step and 0 where it was not; ``None`` where all count as open."""
    if not plan.by_element:
        opened = None if chunk.opened is None else chunk.spread(chunk.opened.to(torch.float32), "gate")
        return None if opened is None else torch.as_tensor(opened, device=chunk.device)
    return chunk.gate() if chunk.rows is None else None
