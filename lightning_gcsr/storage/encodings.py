"""One tensor in the smallest of the three stored forms, bit by bit, and back.

==========  =====================================================================================================
form        parts
==========  =====================================================================================================
dense       ``values``: the tensor
bitmask     ``mask``: one bit an entry in row-major order, the lowest bit of a byte first, the rest of the last byte 0;
            ``values``: the entries whose bit is set
rows        ``starts``: for each row, and for the end, how many values come before it; ``columns``: the column of each
            value, increasing within a row; ``values``. A row is an index of the first dimension, a tensor of fewer
            than two dimensions is one row
==========  =====================================================================================================

An entry is left out if all of its bits are zero: −0.0 is stored, as every NaN is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_gcsr.sparsity.counting import index_bytes, stored_bytes

__all__ = [
    "DTYPES",
    "PLAIN",
    "Form",
    "decode",
    "encode",
    "packed_strides",
    "part_types",
    "plain",
    "row_major",
    "stored_entries",
]

Form = Literal["dense", "bitmask", "rows"]
PartTypes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

PLAIN: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What every safetensors of 0.6 or newer reads into torch, and its name there. Of other types the bytes are stored."""
_AS_BYTES = (torch.complex128, torch.complex64, torch.complex32, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_NEWER = ("float8_e8m0fnu", "float4_e2m1fn_x2")  # of torch 2.7 and 2.8; the last one holds two numbers in an entry

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*PLAIN, *_AS_BYTES, *(getattr(torch, name) for name in _NEWER if hasattr(torch, name)))
}
"""The types that can be stored, by name."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_INDICES = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def _bits(tensor: Tensor) -> Tensor:
    """The entries of a contiguous tensor as integers of the same bits: (n,), or (n, 2) for values of 16 bytes."""
    integers = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    return integers.view(-1, 2) if tensor.element_size() == 16 else integers


def _stored(tensor: Tensor) -> Tensor:
    """The tensor itself, or its bytes in one more dimension where its type is not one that every reader knows."""
    return tensor if tensor.dtype in PLAIN else tensor.unsqueeze(-1).view(torch.uint8)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """The number of rows and columns."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(1, rows)


def part_types(form: Form, shape: Sequence[int], dtype: torch.dtype, nonzeros: int) -> PartTypes:
    """The type and shape of each part; of a dense tensor the number of nonzeros does not matter.

    Example:
        >>> part_types("rows", (2, 300), torch.float32, nonzeros=5)
        {'starts': (torch.uint8, (3,)), 'columns': (torch.uint16, (5,)), 'values': (torch.float32, (5,))}
    """
    values_shape = tuple(shape) if form == "dense" else (nonzeros,)
    values = (dtype, values_shape) if dtype in PLAIN else (torch.uint8, (*values_shape, dtype.itemsize))
    if form == "dense":
        return {"values": values}
    if form == "bitmask":
        return {"mask": (torch.uint8, (-(-math.prod(shape) // 8),)), "values": values}
    rows, columns = _rows(shape)
    return {
        "starts": (_INDICES[index_bytes(nonzeros)], (rows + 1,)),
        "columns": (_INDICES[index_bytes(max(0, columns - 1))], (nonzeros,)),
        "values": values,
    }


def plain(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, of row-major strides, without a gradient; where it can be, the same memory."""
    # A subclass that only carries a tag becomes the tensor it is.
    tensor = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().cpu().contiguous()
    # To torch any strides are contiguous where there is one entry or none, but `view(dtype)` is particular.
    return tensor.as_strided(tensor.shape, row_major(tensor.shape))


def stored_entries(tensor: Tensor) -> Tensor:
    """Which entries of a :func:`plain` tensor have a bit set, and are stored: (n,), in row-major order.

    Example:
        >>> stored_entries(torch.tensor([0.0, -0.0, 1.0]))
        tensor([False,  True,  True])
    """
    bits = _bits(tensor)
    return bits != 0 if bits.dim() == 1 else (bits != 0).any(1)


def encode(tensor: Tensor) -> tuple[Form, dict[str, Tensor]]:
    """The smallest form and its parts; of equals the simplest. A dense part is the tensor's own memory.

    Args:
        tensor: A :func:`plain` tensor, of one of :data:`DTYPES`.

    Example:
        >>> form, parts = encode(torch.tensor([0.0, 0.0, 7.0, 0.0]))
        >>> form, parts["mask"].tolist(), parts["values"].tolist()
        ('bitmask', [4], [7.0])
    """
    bits = _bits(tensor)
    nonzero = stored_entries(tensor)
    count = int(nonzero.sum())
    form = stored_bytes(tensor.shape, count, tensor.element_size()).best_form
    if form == "dense":
        return form, {"values": _stored(tensor)}
    values = _stored(bits[nonzero].view(tensor.dtype).reshape(count))
    if form == "bitmask":
        return form, {"mask": _packed(nonzero), "values": values}
    rows, columns = _rows(tensor.shape)
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(nonzero.view(rows, columns).sum(1), 0, out=starts[1:])
    types = part_types(form, tensor.shape, tensor.dtype, count)
    return form, {
        "starts": starts.to(types["starts"][0]),
        "columns": (nonzero.nonzero().squeeze(1) % columns).to(types["columns"][0]),
        "values": values,
    }


def decode(form: Form, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor of these parts, which have the types and shapes of :func:`part_types`. Of a dense one it is the part.

    Raises:
        ValueError: If the parts contradict each other or the shape.

    Example:
        >>> parts = {"mask": torch.tensor([4], dtype=torch.uint8), "values": torch.tensor([7.0])}
        >>> decode("bitmask", (2, 2), torch.float32, parts)
        tensor([[0., 0.],
                [7., 0.]])
    """
    values = parts["values"] if dtype in PLAIN else parts["values"].view(dtype).squeeze(-1)
    if form == "dense":
        return values
    entries = math.prod(shape)
    where = _unpacked(parts["mask"], entries) if form == "bitmask" else _positions(parts, *_rows(shape))
    if form == "bitmask" and int(where.sum()) != len(values):
        raise ValueError(f"{int(where.sum())} bits of its mask are set, but it has {len(values)} values")
    tensor = torch.zeros(entries * dtype.itemsize, dtype=torch.uint8).view(dtype)
    _bits(tensor)[where] = _bits(values)
    return tensor.view(tuple(shape))


def _packed(mask: Tensor) -> Tensor:
    """Eight bits to a byte."""
    padded = torch.nn.functional.pad(mask.view(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    packed = padded[:, 0].clone()
    for bit in range(1, 8):
        packed |= padded[:, bit] << bit
    return packed


def _unpacked(packed: Tensor, entries: int) -> Tensor:
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    mask = ((packed.unsqueeze(1) & weights) != 0).view(-1)
    if mask[entries:].any():
        raise ValueError("its mask has bits set beyond its last entry")
    return mask[:entries]


def _positions(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    """The row-major position of each value."""
    starts, column = parts["starts"].to(torch.int64), parts["columns"].to(torch.int64)
    counts = starts.diff()
    if starts[0] != 0 or starts[-1] != len(column) or ((starts[1:] < 0) | (counts < 0)).any():
        raise ValueError(f"the starts of its rows do not rise from 0 to its {len(column)} values")
    if ((column < 0) | (column >= columns)).any():  # the largest of 64 bits are negative here
        raise ValueError(f"it has a column index outside its {columns} columns")
    positions = torch.arange(rows).repeat_interleave(counts, output_size=len(column)) * columns + column
    if (positions.diff() <= 0).any():
        raise ValueError("the column indices within a row do not increase")
    return positions


def packed_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of the same entries, in the same order in memory, once nothing lies between them.

    ``None`` where entries lie over each other, as those of an expanded tensor do.

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
