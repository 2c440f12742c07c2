"""How tensors lie in memory: which of them share it, and in which order their entries stand there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_gcsr.core.sharding import local_part

__all__ = ["distinct_tensors", "memory_place", "packed_strides", "row_major"]


def memory_place(tensor: Tensor) -> tuple[object, ...]:
    """A key that two tensors share exactly if they cover the same entries of memory, in whatever shape and order."""
    tensor = local_part(tensor)
    address = tensor.untyped_storage().data_ptr()
    if not address:  # empty and meta tensors all lie there; they are the same only if they are the same object
        return (id(tensor),)
    steps: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if steps and stride == steps[-1][0] * steps[-1][1]:  # continues where the last dimension ends: one run
            steps[-1] = (steps[-1][0], steps[-1][1] * size)
        else:
            steps.append((stride, size))
    return (address, tensor.storage_offset(), *steps)


def distinct_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by name; of those that share the same memory (tied weights) only the first.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, 3)
        >>> list(distinct_tensors([("embedding", weight), ("head", weight.t()), ("bias", torch.ones(2))]))
        ['embedding', 'bias']
    """
    distinct: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in tensors:
        place = memory_place(tensor)
        if place not in seen:
            seen.add(place)
            distinct[name] = tensor
    return distinct


def packed_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of the same entries, in the same order in memory, without gaps between them.

    ``None`` if entries overlap, as those of an expanded tensor do.

    Example:
        >>> packed_strides((3, 4), (1, 10)), packed_strides((3, 4), (0, 1))
        ((1, 3), None)
    """
    packed = [1] * len(shape)
    entries, reach = 1, 0
    for stride, size, dim in sorted(zip(strides, shape, range(len(shape)), strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return None
        packed[dim] = entries
        entries *= size
        reach += stride * (size - 1)
    return tuple(packed)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The packed strides of a contiguous tensor of this shape.

    Example:
        >>> row_major((2, 1, 5))
        (5, 1, 1)
    """
    return tuple(1 if size == 1 else math.prod(shape[dim + 1 :]) for dim, size in enumerate(shape))
