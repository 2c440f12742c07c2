"""What the metadata of a compressed file say of its tensors: written, and read from a file that nobody vouches for.

The entry ``lightning_gcsr.compressed`` of the ``__metadata__`` of the safetensors file is JSON like this::

    {"version": 1, "tensors": [
        {"name": "head.weight", "form": "bitmask", "shape": [10, 64], "dtype": "float32",
         "parts": {"mask": "head.weight::mask", "values": "head.weight::values"}, "crc32": 123456789},
        {"name": "tied.weight", "form": "tied", "shape": [64, 10], "dtype": "float32", "strides": [1, 64],
         "to": "head.weight", "crc32": 987654321}
    ]}

===========  ======================================================================================================
``form``     ``dense``, ``bitmask`` or ``rows`` (see :mod:`lightning_gcsr.storage.encodings`), or ``tied``
``parts``    for each part of the form its name in the file
``to``       of a tied tensor the one, further up, whose entries it shares
``strides``  of a tensor that shares its entries, where it is not in row-major order in their memory; a dimension of
             one entry has stride 1
``crc32``    of the rest of the entry, as JSON in ASCII with sorted keys and without spaces, and the bytes of its
             parts, in alphabetical order of their keys
===========  ======================================================================================================
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_gcsr.storage.encodings import DTYPES, Form, packed_strides, part_types

__all__ = ["METADATA_KEY", "Entry", "about", "checksum", "read_contents", "write_contents"]

METADATA_KEY = "lightning_gcsr.compressed"
_VERSION = 1


class Entry(NamedTuple):
    """How one tensor is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Form | None = None
    """``None`` of a tied tensor."""
    parts: Mapping[str, str] = {}
    to: str = ""
    strides: tuple[int, ...] | None = None
    crc32: int = 0

    @property
    def bytes(self) -> int:
        """The bytes of memory that it takes, of a tied tensor none."""
        return 0 if self.form is None else math.prod(self.shape) * self.dtype.itemsize

    def record(self) -> dict[str, Any]:
        """What is written of it."""
        record: dict[str, Any] = {"name": self.name, "form": self.form or "tied", "shape": list(self.shape)}
        record |= {"dtype": str(self.dtype).removeprefix("torch."), "crc32": self.crc32}
        record |= {"to": self.to} if self.form is None else {"parts": dict(self.parts)}
        return record if self.strides is None else record | {"strides": list(self.strides)}


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """Put what it is about before the message of a ``ValueError``, and turn errors of safetensors into one."""
    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{subject}: {error}") from error


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def checksum(entry: Entry, parts: Mapping[str, Tensor]) -> int:
    """The CRC-32 of an entry and its parts, which are contiguous.

    Example:
        >>> checksum(Entry("a", (2,), torch.float32, to="b"), {})
        449875063
    """
    record = entry.record()
    del record["crc32"]
    crc = zlib.crc32(_compact(record).encode())
    for _, part in sorted(parts.items()):
        crc = zlib.crc32(part.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def write_contents(entries: Iterable[Entry]) -> str:
    """The text of the metadata."""
    return _compact({"version": _VERSION, "tensors": [entry.record() for entry in entries]})


def read_contents(text: str | None) -> list[Entry]:
    """The entries of a file whose metadata are this text, of which each is possible in itself and with the others.

    Raises:
        ValueError: If they are not.

    Example:
        >>> [entry] = read_contents(write_contents([Entry("a", (2,), torch.float32, "dense", {"values": "a"})]))
        >>> entry.name, entry.form, entry.bytes
        ('a', 'dense', 8)
    """
    if text is None:
        raise ValueError(
            "this is a safetensors file, but not one that `save_compressed` wrote. Use safetensors.torch.load_file."
        )
    try:
        contents = json.loads(text, parse_constant=lambda constant: constant)  # a string is no number, as NaN is not
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata are damaged: {error}") from error
    if not isinstance(contents, dict) or not _is_whole(contents.get("version")):
        raise ValueError("its metadata are damaged: they have no version")
    if contents["version"] != _VERSION:
        raise ValueError(
            f"it is of version {contents['version']} of the format, and this package reads version {_VERSION}."
            " Update the package."
        )
    records = contents.get("tensors")
    if set(contents) != {"version", "tensors"} or not isinstance(records, list):
        raise ValueError("its metadata are damaged: they have no list of tensors")
    entries: dict[str, Entry] = {}
    parts: set[str] = set()
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            raise ValueError(f"its metadata are damaged: their tensor {index} has no name")
        with about(f"tensor {record['name']!r}"):
            entry = _entry(record)
            if entry.name in entries:
                raise ValueError("it is there twice")
            if parts.intersection(entry.parts.values()) or len(set(entry.parts.values())) < len(entry.parts):
                raise ValueError("it has a part that belongs to another one")
            if entry.form is None:
                _check_tie(entry, entries.get(entry.to))
            entries[entry.name] = entry
            parts.update(entry.parts.values())
    return list(entries.values())


def _is_whole(value: object) -> bool:
    """Whether this is a number that can count something; of a file, ``True`` is not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _are_whole(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_whole, values))


def _fits(shape: list[int], value_bytes: int) -> bool:
    """Whether strides in such a tensor do not overflow; it multiplies no further than it has to."""
    for size in shape:
        value_bytes *= max(1, size)
        if value_bytes >= 1 << 63:
            return False
    return True


def _entry(record: dict[str, Any]) -> Entry:
    form: Any = record.get("form")
    shape: Any = record.get("shape")
    dtype: Any = record.get("dtype")
    strides: Any = record.get("strides")
    if form not in (*get_args(Form), "tied"):
        raise ValueError(f"its form {form!r:.50} is not known")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"its type {dtype!r:.50} is not known to this package and this version of torch")
    if not _are_whole(shape) or not _fits(shape, DTYPES[dtype].itemsize):
        raise ValueError("its shape is not one that a tensor can have")
    tied = form == "tied"
    keys = {"name", "form", "shape", "dtype", "crc32", "to" if tied else "parts"}
    if set(record) - {"strides"} != keys or not _is_whole(record["crc32"]):
        raise ValueError(f"its metadata are damaged: they must be {', '.join(sorted(keys))}")
    if "strides" in record and not (
        _are_whole(strides) and len(strides) == len(shape) and packed_strides(shape, strides) == tuple(strides)
    ):
        raise ValueError("its strides leave entries out or put them over each other")
    parts = {} if tied else record["parts"]
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError("its parts are not given by name")
    if not tied and set(parts) != set(part_types(form, shape, DTYPES[dtype], 0)):
        raise ValueError(f"its parts are not those of the form {form}")
    if tied and not isinstance(record["to"], str):
        raise ValueError("it is tied to nothing")
    return Entry(
        record["name"],
        tuple(shape),
        DTYPES[dtype],
        None if tied else form,
        parts,
        record.get("to", ""),
        tuple(strides) if "strides" in record else None,
        record["crc32"],
    )


def _check_tie(entry: Entry, first: Entry | None) -> None:
    """Refuse a tie to a tensor that is not further up, or is tied itself, or is not of the same entries."""
    if first is None or first.form is None:
        raise ValueError(f"it is tied to {entry.to!r}, which is not a tensor before it that is stored itself")
    if entry.dtype != first.dtype or math.prod(entry.shape) != math.prod(first.shape):
        raise ValueError(f"it is tied to {entry.to!r}, whose type or number of entries is another")
