"""The three encodings of a tensor: dense, bitmask and rows.

Sizes are given for n entries of v bytes, of which k are not zero, in r rows of c columns. A row is an index of the
first dimension; a tensor with fewer than two dimensions is one row.

==========  ======================================================================  ====================================
encoding    parts                                                                   bytes
==========  ======================================================================  ====================================
dense       ``values``: the tensor                                                  n·v
bitmask     ``mask``: one bit for each entry in row-major order, the lowest bit     ⌈n/8⌉ + k·v
            of a byte first, padded with zeros; ``values``: the nonzero entries
rows        ``starts``: how many values precede each row, and the end;              (r+1)·p + k·i + k·v
            ``columns``: the column of each value, increasing within a row;
            ``values``: the nonzero entries (compressed sparse rows)
==========  ======================================================================  ====================================

p and i are the sizes of the smallest unsigned integer types that hold k and c−1. Bitmask and rows leave out every
entry that equals zero: −0.0 comes back as 0.0, and every other entry with the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gcsr.storage.dtypes import NATIVE_DTYPES, as_bits, as_native, from_native, nonzero_entries
from lightning_gcsr.storage.tensor_memory import row_major

__all__ = [
    "ENCODINGS",
    "Bitmask",
    "Dense",
    "Encoding",
    "EncodingName",
    "Rows",
    "StoredBytes",
    "encode",
    "index_bytes",
    "plain",
    "stored_bytes",
]

EncodingName = Literal["dense", "bitmask", "rows"]
PartTypes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

_INDICES = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def index_bytes(largest: int) -> int:
    """The size of the smallest unsigned integer type that holds 0 to ``largest``: 1, 2, 4 or 8."""
    return next(size for size in (1, 2, 4, 8) if largest < 1 << (8 * size))


class Encoding(ABC):
    """One way to write a tensor down as a few named parts, and to read it back."""

    name: EncodingName

    @abstractmethod
    def size(self, shape: Sequence[int], nonzeros: int, value_bytes: int) -> int:
        """The bytes of all parts together."""

    @abstractmethod
    def part_types(self, shape: Sequence[int], dtype: torch.dtype, nonzeros: int) -> PartTypes:
        """The type and shape of each part. The number of nonzeros is irrelevant to a dense tensor."""

    @abstractmethod
    def encode(self, tensor: Tensor, nonzero: Tensor) -> dict[str, Tensor]:
        """The parts of a :func:`plain` tensor whose :func:`nonzero_entries` are given."""

    @abstractmethod
    def decode(self, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor of these parts, which have the types and shapes of :meth:`part_types`.

        Raises:
            ValueError: If the parts contradict each other or the shape.
        """


class Dense(Encoding):
    """All entries, one after the other. The part is the memory of the tensor itself."""

    name = "dense"

    @override
    def size(self, shape: Sequence[int], nonzeros: int, value_bytes: int) -> int:
        return math.prod(shape) * value_bytes

    @override
    def part_types(self, shape: Sequence[int], dtype: torch.dtype, nonzeros: int) -> PartTypes:
        return {"values": _values_type(dtype, shape)}

    @override
    def encode(self, tensor: Tensor, nonzero: Tensor) -> dict[str, Tensor]:
        return {"values": as_native(tensor)}

    @override
    def decode(self, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
        return from_native(parts["values"], dtype)


class Bitmask(Encoding):
    """One bit for each entry, then the nonzero entries.

    Example:
        >>> parts = {"mask": torch.tensor([4], dtype=torch.uint8), "values": torch.tensor([7.0])}
        >>> Bitmask().decode((2, 2), torch.float32, parts)
        tensor([[0., 0.],
                [7., 0.]])
    """

    name = "bitmask"

    @override
    def size(self, shape: Sequence[int], nonzeros: int, value_bytes: int) -> int:
        return -(-math.prod(shape) // 8) + nonzeros * value_bytes

    @override
    def part_types(self, shape: Sequence[int], dtype: torch.dtype, nonzeros: int) -> PartTypes:
        mask = (torch.uint8, (-(-math.prod(shape) // 8),))
        return {"mask": mask, "values": _values_type(dtype, (nonzeros,))}

    @override
    def encode(self, tensor: Tensor, nonzero: Tensor) -> dict[str, Tensor]:
        padded = torch.nn.functional.pad(nonzero.view(torch.uint8), (0, -len(nonzero) % 8)).view(-1, 8)
        mask = padded[:, 0].clone()
        for bit in range(1, 8):
            mask |= padded[:, bit] << bit
        return {"mask": mask, "values": _selected(tensor, nonzero)}

    @override
    def decode(self, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
        bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
        mask = ((parts["mask"].unsqueeze(1) & bits) != 0).view(-1)
        entries = math.prod(shape)
        if mask[entries:].any():
            raise ValueError("its mask has bits set beyond its last entry")
        ones = int(mask.sum())
        if ones != len(parts["values"]):
            raise ValueError(f"{ones} bits of its mask are set, but it has {len(parts['values'])} values")
        return _placed(shape, dtype, mask[:entries], parts["values"])


class Rows(Encoding):
    """Compressed sparse rows: where each row begins, then column and value of each nonzero entry.

    Example:
        >>> Rows().part_types((2, 300), torch.float32, nonzeros=5)
        {'starts': (torch.uint8, (3,)), 'columns': (torch.uint16, (5,)), 'values': (torch.float32, (5,))}
    """

    name = "rows"

    @override
    def size(self, shape: Sequence[int], nonzeros: int, value_bytes: int) -> int:
        rows, columns = _rows_and_columns(shape)
        return (rows + 1) * index_bytes(nonzeros) + nonzeros * (index_bytes(max(0, columns - 1)) + value_bytes)

    @override
    def part_types(self, shape: Sequence[int], dtype: torch.dtype, nonzeros: int) -> PartTypes:
        rows, columns = _rows_and_columns(shape)
        return {
            "starts": (_INDICES[index_bytes(nonzeros)], (rows + 1,)),
            "columns": (_INDICES[index_bytes(max(0, columns - 1))], (nonzeros,)),
            "values": _values_type(dtype, (nonzeros,)),
        }

    @override
    def encode(self, tensor: Tensor, nonzero: Tensor) -> dict[str, Tensor]:
        rows, columns = _rows_and_columns(tensor.shape)
        values = _selected(tensor, nonzero)
        starts = torch.zeros(rows + 1, dtype=torch.int64)
        torch.cumsum(nonzero.view(rows, columns).sum(1), 0, out=starts[1:])
        types = self.part_types(tensor.shape, tensor.dtype, len(values))
        return {
            "starts": starts.to(types["starts"][0]),
            "columns": (nonzero.nonzero().squeeze(1) % columns).to(types["columns"][0]),
            "values": values,
        }

    @override
    def decode(self, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = _rows_and_columns(shape)
        starts, column = parts["starts"].to(torch.int64), parts["columns"].to(torch.int64)
        counts = starts.diff()
        if starts[0] != 0 or starts[-1] != len(column) or ((starts[1:] < 0) | (counts < 0)).any():
            raise ValueError(f"the starts of its rows do not rise from 0 to its {len(column)} values")
        if ((column < 0) | (column >= columns)).any():  # the largest of 64 bits are negative here
            raise ValueError(f"it has a column index outside its {columns} columns")
        positions = torch.arange(rows).repeat_interleave(counts, output_size=len(column)) * columns + column
        if (positions.diff() <= 0).any():
            raise ValueError("the column indices within a row do not increase")
        return _placed(shape, dtype, positions, parts["values"])


ENCODINGS: dict[EncodingName, Encoding] = {encoding.name: encoding for encoding in (Dense(), Bitmask(), Rows())}
"""By name, the simplest first."""


@dataclass(frozen=True)
class StoredBytes:
    """The bytes of one tensor in each encoding."""

    dense: int
    bitmask: int
    rows: int

    @property
    def best(self) -> int:
        """The bytes in the smallest encoding."""
        return min(self.dense, self.bitmask, self.rows)

    @property
    def best_encoding(self) -> EncodingName:
        """The name of the smallest encoding; the simplest one if several are equally small."""
        return min(ENCODINGS, key=lambda name: int(getattr(self, name)))


def stored_bytes(shape: Sequence[int], nonzeros: int, value_bytes: int) -> StoredBytes:
    """The bytes of a tensor in each encoding, see :mod:`lightning_gcsr.storage.encodings`.

    Args:
        shape: Its shape.
        nonzeros: The number of entries that are not zero.
        value_bytes: The bytes of one value, ``tensor.element_size()``.

    Example:
        >>> stored_bytes((100, 200), nonzeros=500, value_bytes=4)
        StoredBytes(dense=80000, bitmask=4500, rows=2702)
    """
    return StoredBytes(**{name: encoding.size(shape, nonzeros, value_bytes) for name, encoding in ENCODINGS.items()})


def plain(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, with row-major strides and without a gradient; the same memory if possible."""
    # A subclass that only carries a tag becomes the tensor it is.
    tensor = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().cpu().contiguous()
    # To torch any strides are contiguous where there is one entry or none, but `view(dtype)` is particular.
    return tensor.as_strided(tensor.shape, row_major(tensor.shape))


def encode(tensor: Tensor) -> tuple[EncodingName, dict[str, Tensor]]:
    """The smallest encoding of a :func:`plain` tensor and its parts; the simplest one if several are equally small.

    Example:
        >>> name, parts = encode(torch.tensor([0.0, -0.0, 7.0, 0.0]))
        >>> name, parts["mask"].tolist(), parts["values"].tolist()
        ('bitmask', [4], [7.0])
    """
    nonzero = nonzero_entries(tensor)
    name = stored_bytes(tensor.shape, int(nonzero.sum()), tensor.element_size()).best_encoding
    return name, ENCODINGS[name].encode(tensor, nonzero)


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(1, rows)


def _values_type(dtype: torch.dtype, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    return (dtype, tuple(shape)) if dtype in NATIVE_DTYPES else (torch.uint8, (*shape, dtype.itemsize))


def _selected(tensor: Tensor, nonzero: Tensor) -> Tensor:
    return as_native(as_bits(tensor)[nonzero].view(tensor.dtype).reshape(-1))


def _placed(shape: Sequence[int], dtype: torch.dtype, where: Tensor, values: Tensor) -> Tensor:
    """A tensor of zeros, with the values where the mask or the positions say."""
    tensor = torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype)
    as_bits(tensor)[where] = as_bits(from_native(values, dtype))
    return tensor.view(tuple(shape))
