"""The layout: how the weights of a step are cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk, Scratch
from lightning_gcsr.core.members import Member
from lightning_gcsr.core.penalties import Penalty

__all__ = ["cut"]

CPU_SIZE = 1 << 18
"""The number of weights in a chunk on a CPU: half a dozen such tensors fit its cache."""
SIZE_ELSEWHERE = 1 << 25
"""On a GPU, where there should be few calls: a buffer of such a chunk takes 128 MB."""


def size_limit(device: torch.device) -> int:
    """The number of weights that a chunk should have on this device."""
    return CPU_SIZE if device.type == "cpu" else SIZE_ELSEWHERE


def cut(members: Iterable[Member], penalty: Penalty, scratch: Scratch, counts: Mapping[str, int]) -> list[Chunk]:
    """The chunks in which these parameters are treated.

    Args:
        members: The parameters, which have a gradient in this step.
        penalty: The penalty, which says whether weights may be joined and cut.
        scratch: The buffers that the chunks share.
        counts: The numbers of steps that some of the parameters have been through, by name; joined are equal ones.
    """
    if penalty.coupled:
        return [Chunk(list(members), scratch)]
    chunks: list[Chunk] = []
    small: dict[object, list[Member]] = {}
    for member in members:
        weight, gradient = member.weight, member.gradient
        limit = size_limit(weight.device)
        # The sizes over all processes, which add up their sums in the order of the chunks: it has to be the same there.
        if member.rows is None and penalty.elementwise and 2 * member.parameter.numel() <= limit:
            key = (
                id(member.group),
                member.relative,
                weight.dtype,
                gradient.dtype,
                weight.device,
                str(getattr(member.parameter, "placements", "")),  # how it is spread over processes
                counts.get(member.name),
            )
            small.setdefault(key, []).append(member)
        else:
            spans = [] if member.rows is not None else _spans(weight, gradient, penalty, limit)
            chunks += [Chunk([member], scratch, *span) for span in spans] or [Chunk([member], scratch)]
    for alike in small.values():
        together: list[list[Member]] = [[]]
        total, limit = 0, size_limit(alike[0].parameter.device)
        for member in alike:
            if total >= limit:
                together.append([])
                total = 0
            together[-1].append(member)
            total += member.parameter.numel()
        chunks += [Chunk(members, scratch) for members in together]
    return chunks


def _spans(weight: Tensor, gradient: Tensor, penalty: Penalty, limit: int) -> list[tuple[tuple[int, int], bool]]:
    """The spans in which a tensor is cut, and whether they are of the flattened tensor; none if it stays whole."""
    if weight.numel() <= limit or not penalty.splits_along(0, weight.dim()):
        return []
    row = weight.numel() // len(weight)
    flat = row > limit and penalty.elementwise and weight.is_contiguous() and gradient.is_contiguous()
    length, at_once = (weight.numel(), limit) if flat else (len(weight), max(1, limit // row))
    return [((start, min(at_once, length - start)), flat) for start in range(0, length, at_once)]
