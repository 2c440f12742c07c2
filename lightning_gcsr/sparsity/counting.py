"""Sparsity: exact counts of zeros, and the bytes that tensors take in three stored forms.

==========  =====================================================================================================
form        bytes, for n entries of which k are not zero, in r rows of c columns, with v bytes a value
==========  =====================================================================================================
dense       n·v
bitmask     ⌈n/8⌉ + k·v: one bit an entry, then the values
rows        (r+1)·p + k·i + k·v: where each row begins, then column and value of each; p and i are the sizes of the
            smallest unsigned integer types that hold k and c−1 (compressed sparse rows; a row is an index of the
            first dimension)
==========  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gcsr.core.sharding import is_sharded, local_part, replication_factors, sum_over_processes
from lightning_gcsr.validation import check_finite_number

__all__ = ["StoredBytes", "TensorCount", "count_tensors", "distinct_tensors", "module_bytes", "stored_bytes"]


def index_bytes(largest: int) -> int:
    """The size of the smallest unsigned integer type that holds 0 to ``largest``: 1, 2, 4 or 8."""
    return next(size for size in (1, 2, 4, 8) if largest < 1 << (8 * size))


@dataclass(frozen=True)
class StoredBytes:
    """The bytes that one tensor takes in each stored form."""

    dense: int
    bitmask: int
    rows: int

    @property
    def best(self) -> int:
        """The bytes of the smallest form."""
        return min(self.dense, self.bitmask, self.rows)

    @property
    def best_form(self) -> Literal["dense", "bitmask", "rows"]:
        """The name of the smallest form; the simplest one of equals."""
        forms: tuple[Literal["dense", "bitmask", "rows"], ...] = ("dense", "bitmask", "rows")
        return min(forms, key=lambda form: int(getattr(self, form)))


def stored_bytes(shape: Sequence[int], nonzeros: int, value_bytes: int) -> StoredBytes:
    """The bytes of a tensor in each stored form.

    Args:
        shape: Its shape.
        nonzeros: How many of its entries are stored as values.
        value_bytes: The bytes of one value, as ``tensor.element_size()`` gives them.

    Example:
        >>> stored_bytes((100, 200), nonzeros=500, value_bytes=4)
        StoredBytes(dense=80000, bitmask=4500, rows=2702)
    """
    entries = 1
    for size in shape:
        entries *= size
    row_count = shape[0] if len(shape) > 1 else 1
    columns = entries // max(1, row_count)
    return StoredBytes(
        dense=entries * value_bytes,
        bitmask=-(-entries // 8) + nonzeros * value_bytes,
        rows=(row_count + 1) * index_bytes(nonzeros) + nonzeros * (index_bytes(max(0, columns - 1)) + value_bytes),
    )


@dataclass(frozen=True)
class TensorCount:
    """The counts of one tensor."""

    name: str
    shape: tuple[int, ...]
    value_bytes: int
    zeros: int
    """Entries that are exactly zero."""
    near_zeros: int
    r"""Entries with \|w\| ≤ threshold, the zeros among them."""

    @property
    def entries(self) -> int:
        """The number of entries."""
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> StoredBytes:
        """The bytes in each stored form, when the near zeros are stored as zeros."""
        return stored_bytes(self.shape, self.entries - self.near_zeros, self.value_bytes)


def memory_place(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common exactly if they hold the same entries of memory, in whatever shape and order."""
    tensor = local_part(tensor)
    address = tensor.untyped_storage().data_ptr()
    if not address:  # empty and meta tensors all lie there; they are the same only if they are the same object
        return (id(tensor),)
    steps: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if steps and stride == steps[-1][0] * steps[-1][1]:  # goes on where the last dimension ends: one run
            steps[-1] = (steps[-1][0], steps[-1][1] * size)
        else:
            steps.append((stride, size))
    return (address, tensor.storage_offset(), *steps)


def distinct_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by name, of those that share the same memory (tied weights) only the first.

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


@torch.no_grad()
def count_tensors(tensors: Mapping[str, Tensor], zero_threshold: float = 0.0) -> list[TensorCount]:
    """Count zeros and near zeros of each tensor; tied ones once, under the first name. Synchronizes once a device.

    Where tensors are sharded over processes (``DTensor``), all processes must call this: it adds up.

    Args:
        tensors: The tensors by name, on any device, of any dtype. NaN is not zero, −0 is.
        zero_threshold: The magnitude up to which an entry counts as near zero.

    Raises:
        ValueError: If ``zero_threshold`` is negative or not finite.

    Example:
        >>> import torch
        >>> [count] = count_tensors({"weight": torch.tensor([[0.0, 1e-5, 0.7]])}, zero_threshold=1e-3)
        >>> count.zeros, count.near_zeros, count.bytes.best_form
        (1, 2, 'bitmask')
    """
    check_finite_number("zero_threshold", zero_threshold, minimum=0.0)
    distinct = distinct_tensors(tensors.items())
    counts = _to_host(zero_counts(list(distinct.values()), zero_threshold))
    return [
        TensorCount(name, tuple(tensor.shape), local_part(tensor).element_size(), zeros, near)
        for (name, tensor), (zeros, near) in zip(distinct.items(), counts, strict=True)
    ]


def zero_counts(tensors: Sequence[Tensor], zero_threshold: float = 0.0) -> list[Tensor]:
    """The number of exact zeros and of near zeros of each whole tensor: (2,) integer tensors, on the devices.

    Where tensors are sharded over processes (``DTensor``), all processes must call this: it adds up.
    """
    counts = [near_and_exact_zeros(local_part(tensor.detach()), zero_threshold) for tensor in tensors]
    if not any(map(is_sharded, tensors)):
        return counts
    table = [
        count.to(counts[0].device).double() * part
        for count, part in zip(counts, replication_factors(tensors), strict=True)
    ]
    return list(sum_over_processes(torch.stack(table)).round().long().unbind())


def near_and_exact_zeros(tensor: Tensor, zero_threshold: float = 0.0) -> Tensor:
    r"""The number of exact zeros and of entries with \|w\| ≤ threshold: a (2,) integer tensor on the device.

    Example:
        >>> import torch
        >>> near_and_exact_zeros(torch.tensor([0.0, -0.2, 1.0]), 0.5)
        tensor([1, 2])
    """
    zero_threshold = float(zero_threshold)  # an integer would wrap around among unsigned ones
    tensor = countable(tensor)
    zeros = tensor.numel() - torch.count_nonzero(tensor)
    if zero_threshold == 0:
        near = zeros
    elif tensor.is_complex():
        near = torch.count_nonzero(tensor.abs() <= zero_threshold)
    else:  # integers and booleans have no magnitude, or not each of them
        near = torch.count_nonzero((tensor >= -zero_threshold) & (tensor <= zero_threshold))
    return torch.stack([zeros, near])


def countable(tensor: Tensor) -> Tensor:
    """The tensor, or where torch cannot count in its type, one with the same zeros and magnitudes.

    Example:
        >>> import torch
        >>> countable(torch.tensor([0, 7], dtype=torch.uint16))
        tensor([0., 7.], dtype=torch.float64)
    """
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return tensor.double()
    if str(tensor.dtype).startswith("torch.float8"):
        return tensor.float()
    if str(tensor.dtype) == "torch.float4_e2m1fn_x2":  # two numbers in an entry, which is as large as the larger one
        codes = tensor.view(torch.uint8)
        magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=tensor.device)
        return magnitudes[torch.maximum(codes & 7, codes >> 4 & 7).int()]
    return tensor


def _to_host(pairs: list[Tensor]) -> list[list[int]]:
    """The pairs as integers, with one transfer for each device instead of one for each pair."""
    result: list[list[int]] = [[0, 0]] * len(pairs)
    for device in {pair.device for pair in pairs}:
        indices = [i for i, pair in enumerate(pairs) if pair.device == device]
        for i, numbers in zip(indices, torch.stack([pairs[i] for i in indices]).tolist(), strict=True):
            result[i] = numbers
    return result


def module_bytes(module: nn.Module, zero_threshold: float = 0.0) -> tuple[int, int]:
    """The bytes of all parameters of a module, biases and norms too: dense, and each in its smallest stored form.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 64)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> module_bytes(layer)
        (16640, 321)
    """
    counts = count_tensors(dict(module.named_parameters(remove_duplicate=False)), zero_threshold)
    return sum(count.bytes.dense for count in counts), sum(count.bytes.best for count in counts)
