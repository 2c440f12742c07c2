"""The metadata of a compressed file: writing them, and reading them from a file that nobody vouches for.

The entry ``lightning_gcsr.compressed`` of the ``__metadata__`` of the safetensors file is JSON like this::

    {"version": 2, "tensors": [
        {"name": "bias", "shape": [10], "crc32": 24680},
        {"name": "head.weight", "form": "bitmask", "shape": [10, 64], "crc32": 123456789},
        {"name": "tied.weight", "form": "tied", "shape": [64, 10], "strides": [1, 64], "to": "head.weight",
         "crc32": 987654321}
    ]}

===========  ======================================================================================================
``form``     the encoding: ``dense`` (if left out), ``bitmask`` or ``rows`` (see
             :mod:`lightning_gcsr.storage.encodings`), or ``tied``
``dtype``    ``float32`` if left out
``parts``    the name in the file of each part; if left out, that of the tensor itself for a dense tensor, and names
             like ``head.weight::mask`` for others
``to``       of a tied tensor: the tensor before it whose entries it shares
``strides``  of a tensor that shares its entries: its strides, unless they are row-major; a dimension of one entry has
             stride 1
``crc32``    of the entry without this key but with the keys that were left out, as JSON in ASCII with sorted keys and
             without spaces, and of the bytes of its parts, in alphabetical order of their keys
===========  ======================================================================================================

Version 1 leaves no key out. If no tensor is smaller in another encoding, the metadata are ``{"version": 2, "crc32":
…}``: every tensor is dense, and the checksum is that of all entries, in alphabetical order of their names, one after
the other.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_gcsr.storage.dtypes import DTYPES
from lightning_gcsr.storage.encodings import ENCODINGS, EncodingName
from lightning_gcsr.storage.tensor_memory import packed_strides

__all__ = [
    "METADATA_KEY",
    "Entry",
    "about",
    "checksum",
    "parse_metadata",
    "plain_checksum",
    "plain_metadata",
    "read_entries",
    "write_entries",
]

METADATA_KEY = "lightning_gcsr.compressed"
_VERSION = 2
_READABLE_VERSIONS = (1, 2)


class Entry(NamedTuple):
    """How one tensor is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: EncodingName | None = None
    """``None`` for a tied tensor."""
    parts: Mapping[str, str] = {}
    to: str = ""
    strides: tuple[int, ...] | None = None
    crc32: int = 0

    @property
    def bytes(self) -> int:
        """The bytes of memory that the tensor takes; none for a tied tensor."""
        return 0 if self.encoding is None else math.prod(self.shape) * self.dtype.itemsize

    def record(self) -> dict[str, Any]:
        """The entry as JSON has it, with every key."""
        record: dict[str, Any] = {"name": self.name, "form": self.encoding or "tied", "shape": list(self.shape)}
        record |= {"dtype": str(self.dtype).removeprefix("torch."), "crc32": self.crc32}
        record |= {"to": self.to} if self.encoding is None else {"parts": dict(self.parts)}
        return record if self.strides is None else record | {"strides": list(self.strides)}


def _defaults(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that version 2 leaves out where they have these values."""
    form, name = record.get("form", "dense"), record["name"]
    defaults: dict[str, Any] = {"form": "dense", "dtype": "float32"}
    if isinstance(form, str) and form in ENCODINGS:
        keys = ENCODINGS[form].part_types((), torch.float32, 0)
        defaults["parts"] = {key: name if form == "dense" else f"{name}::{key}" for key in keys}
    return defaults


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """Put the subject before the message of a ``ValueError``, and turn errors of safetensors into one."""
    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{subject}: {error}") from error


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def checksum(entry: Entry, parts: Mapping[str, Tensor], start: int = 0) -> int:
    """The CRC-32 of an entry and its parts, which are contiguous; ``start`` is that of what precedes them.

    Example:
        >>> checksum(Entry("a", (2,), torch.float32, to="b"), {})
        449875063
    """
    record = entry.record()
    del record["crc32"]
    crc = zlib.crc32(_compact(record).encode(), start)
    for _, part in sorted(parts.items()):
        crc = zlib.crc32(part.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def plain_checksum(tensors: Mapping[str, Tensor]) -> int:
    """The CRC-32 of a file in which every tensor is dense and under its own name."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = checksum(Entry(name, tuple(tensor.shape), tensor.dtype, "dense", {"values": name}), {"": tensor}, crc)
    return crc


def plain_metadata(tensors: Mapping[str, Tensor]) -> str:
    """The metadata of a file in which every tensor is dense and under its own name."""
    return _compact({"version": _VERSION, "crc32": plain_checksum(tensors)})


def write_entries(entries: Iterable[Entry]) -> str:
    """The metadata of any other file.

    Example:
        >>> print(write_entries([Entry("a", (2,), torch.float32, "dense", {"values": "a"}, crc32=7)]))
        {"tensors":[{"crc32":7,"name":"a","shape":[2]}],"version":2}
    """
    records = []
    for entry in entries:
        record = entry.record()
        defaults = _defaults(record)
        records.append({key: value for key, value in record.items() if defaults.get(key) != value})
    return _compact({"version": _VERSION, "tensors": records})


def parse_metadata(text: str | None) -> dict[str, Any]:
    """The metadata of this text: either a whole ``crc32``, or a list of ``tensors``.

    Raises:
        ValueError: If there are none, or they are damaged or of a later version.
    """
    if text is None:
        raise ValueError(
            "this is a plain safetensors file, not one that `save_compressed` wrote. Load it with"
            " safetensors.torch.load_file."
        )
    try:
        contents = json.loads(text, parse_constant=lambda constant: constant)  # a string is no number, as NaN is not
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata are damaged: {error}") from error
    if not isinstance(contents, dict) or not _is_whole(contents.get("version")):
        raise ValueError("its metadata are damaged: they have no version")
    version = contents["version"]
    if version not in _READABLE_VERSIONS:
        raise ValueError(
            f"its format has version {version}, and this version of lightning-gcsr reads versions 1 and 2. Update"
            " lightning-gcsr."
        )
    if version == _VERSION and set(contents) == {"version", "crc32"} and _is_whole(contents["crc32"]):
        return contents
    if set(contents) != {"version", "tensors"} or not isinstance(contents["tensors"], list):
        raise ValueError("its metadata are damaged: they have no list of tensors")
    return contents


def read_entries(contents: Mapping[str, Any]) -> list[Entry]:
    """The entries of metadata with a list of tensors, each of them possible in itself and beside the others.

    Raises:
        ValueError: If one is not.

    Example:
        >>> text = write_entries([Entry("a", (2,), torch.float32, "dense", {"values": "a"})])
        >>> [entry] = read_entries(parse_metadata(text))
        >>> entry.name, entry.encoding, entry.bytes
        ('a', 'dense', 8)
    """
    entries: dict[str, Entry] = {}
    parts: set[str] = set()
    for index, record in enumerate(contents["tensors"]):
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            raise ValueError(f"its metadata are damaged: their tensor {index} has no name")
        with about(f"tensor {record['name']!r}"):
            entry = _entry(record if contents["version"] == 1 else _defaults(record) | record)
            if entry.name in entries:
                raise ValueError("it is there twice")
            if parts.intersection(entry.parts.values()) or len(set(entry.parts.values())) < len(entry.parts):
                raise ValueError("it has a part that belongs to another one")
            if entry.encoding is None:
                _check_tie(entry, entries.get(entry.to))
            entries[entry.name] = entry
            parts.update(entry.parts.values())
    return list(entries.values())


def _is_whole(value: object) -> bool:
    """Whether a value from a file is an integer from 0 to 2⁶³ − 1; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _are_whole(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_whole, values))


def _fits(shape: list[int], value_bytes: int) -> bool:
    """Whether the strides of such a tensor do not overflow, without forming a product that does."""
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
    if form not in (*ENCODINGS, "tied"):
        raise ValueError(f"its encoding {form!r:.50} is not known")
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
    if not tied and set(parts) != set(ENCODINGS[form].part_types(shape, DTYPES[dtype], 0)):
        raise ValueError(f"its parts are not those of the encoding {form}")
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
    """Refuse a tie to a tensor that does not come before, is tied itself, or has other entries."""
    if first is None or first.encoding is None:
        raise ValueError(f"it is tied to {entry.to!r}, which is not a tensor before it that is stored itself")
    if entry.dtype != first.dtype or math.prod(entry.shape) != math.prod(first.shape):
        raise ValueError(f"it is tied to {entry.to!r}, whose type or number of entries is another")
