"""The compressed file: every tensor in its smallest encoding.

The file is a safetensors file. A dense tensor has its own name in it, so that any reader of such files finds it; the
parts of the other encodings (see :mod:`lightning_gcsr.storage.encodings`) have names like ``layer.weight::mask``. The
metadata say how they belong together (see :mod:`lightning_gcsr.storage.manifest`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_gcsr.storage.atomic_write import check_target, replace_file
from lightning_gcsr.storage.dtypes import NATIVE_DTYPES
from lightning_gcsr.storage.encodings import ENCODINGS, encode, plain
from lightning_gcsr.storage.manifest import (
    METADATA_KEY,
    Entry,
    about,
    checksum,
    parse_metadata,
    plain_checksum,
    plain_metadata,
    read_entries,
    write_entries,
)
from lightning_gcsr.storage.storable import storable_tensors
from lightning_gcsr.storage.tensor_memory import memory_place, packed_strides, row_major
from lightning_gcsr.validation import argument_error, check_integer, near_names

__all__ = ["check_bytes", "is_compressed", "load_compressed", "mapped_tensors", "save_compressed"]

_SMALL = 1 << 30
_GROWTH = 1000


@torch.no_grad()
def save_compressed(module_or_state_dict: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Save each tensor in its smallest encoding, as one safetensors file.

    Loading returns every entry with the same bits, except that −0.0 becomes 0.0 in the encodings that leave zeros out.
    The file takes the bytes of :func:`~lightning_gcsr.stored_bytes` and a header of about 200 bytes per tensor. If a
    plain safetensors file of the same tensors is smaller, as for a small network without zeros, the tensors are saved
    that way; loading then returns them in alphabetical order.

    Tensors over exactly the same memory (tied weights, also transposed or in another shape) are stored once and are
    tied again when loaded. Tensors that share only a part of their memory are stored separately. Strides,
    ``requires_grad`` and devices are not kept.

    The file replaces an existing one only when it is complete, see
    :func:`lightning_gcsr.storage.atomic_write.replace_file`. During writing, its bytes are in memory twice, in addition
    to the tensors, since safetensors copies them. Tensors on an accelerator are copied to the host one by one.

    Args:
        module_or_state_dict: A module, whose state dict is saved, or tensors by name, such as a part of a state dict:
            of any floating-point, integer, boolean or complex type, on any device.
        path: Where to write. The usual suffix is ``.safetensors``.

    Raises:
        TypeError: If a value is not a tensor (such as an ``_extra_state``) or a name is not a string.
        ValueError: If a tensor is sharded, sparse, quantized or on the meta device, or if there is something other than
            a file at ``path``.
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(100, 100)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed(layer, f"{folder}/layer.safetensors")
        ...     size = os.path.getsize(f"{folder}/layer.safetensors")
        ...     state_dict = load_compressed(f"{folder}/layer.safetensors")
        >>> layer.load_state_dict(state_dict), size < 2000
        (<All keys matched successfully>, True)
    """
    tensors = storable_tensors(module_or_state_dict)
    check_target(path)
    ties = _ties(tensors)
    data = _encoded(tensors, ties)
    if _can_be_plain(tensors, ties) and sum(tensor.nbytes for tensor in tensors.values()) < len(data):
        dense = _without_overlaps({name: plain(tensor) for name, tensor in tensors.items()})
        data = min(data, save(dense, {METADATA_KEY: plain_metadata(dense)}), key=len)
    replace_file(path, data)


def _can_be_plain(tensors: Mapping[str, Tensor], ties: Mapping[str, tuple[str, object]]) -> bool:
    """Whether a safetensors file can hold these tensors as they are."""
    untied = all(name == first for name, (first, _) in ties.items())
    return untied and "__metadata__" not in tensors and all(t.dtype in NATIVE_DTYPES for t in tensors.values())


def _encoded(tensors: Mapping[str, Tensor], ties: Mapping[str, tuple[str, tuple[int, ...] | None]]) -> bytes:
    """The bytes of a file with each tensor in its smallest encoding."""
    taken = {"__metadata__", *tensors}  # the first is what safetensors keeps for itself
    stored: dict[str, Tensor] = {}
    entries = []
    for name, (first, strides) in ties.items():
        tensor = tensors[name]
        entry = Entry(name, tuple(tensor.shape), tensor.dtype, to=first, strides=strides)
        parts: dict[str, Tensor] = {}
        if first == name:
            encoding, parts = encode(plain(tensor))
            if encoding == "dense" and name != "__metadata__":
                names = {"values": name}
            else:
                names = {key: _free_name(f"{name}::{key}", taken) for key in parts}
            entry = entry._replace(encoding=encoding, parts=names, to="")
        stored |= {entry.parts[key]: part for key, part in parts.items()}
        entries.append(entry._replace(crc32=checksum(entry, parts)))
    return save(_without_overlaps(stored), {METADATA_KEY: write_entries(entries)})


def _without_overlaps(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied if their memory belongs to one before: safetensors takes no overlaps."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """For each tensor the first one over the same memory, and its strides there unless they are row-major."""
    members: dict[tuple[object, ...], list[str]] = {}
    packed: dict[str, tuple[int, ...] | None] = {}
    for name, tensor in tensors.items():
        packed[name] = packed_strides(tensor.shape, tensor.stride()) if tensor.numel() else None
        alike: tuple[object, ...] = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
        if packed[name] is None:  # entries lie over each other: only the same view is the same entries
            alike += (tensor.shape, tensor.stride())
        members.setdefault((memory_place(tensor), *alike), []).append(name)
    ties: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for names in members.values():
        for name in names:
            plain = len(names) == 1 or packed[name] == row_major(tensors[name].shape)
            ties[name] = (names[0], None if plain else packed[name])
    return {name: ties[name] for name in tensors}


def _free_name(wanted: str, taken: set[str]) -> str:
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether this is a safetensors file that :func:`save_compressed` wrote; its tensors are not read.

    Raises:
        OSError: If the file cannot be read.
    """
    with open(path, "rb"):
        pass
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except SafetensorError:
        return False


def load_compressed(
    path: str | os.PathLike[str], *, strip_prefix: str = "", max_bytes: int | None = None
) -> dict[str, Tensor]:
    """The tensors that :func:`save_compressed` saved, on the CPU.

    The file may be damaged or malicious: nothing in it is executed, everything it says is checked first, checksums
    find every flipped bit, and memory for the tensors is allocated only once their total size is known and allowed.

    Args:
        path: The file.
        strip_prefix: What to remove from the beginning of the names, such as ``"module."``; names that do not begin
            with it stay as they are.
        max_bytes: The largest number of bytes that the tensors may take together. ``None``: 1 GiB, or a thousand
            times the size of the file if that is more. (A matrix of zeros takes thousands of times more memory than its
            file, and a malicious file may pretend to be one.)

    Raises:
        ValueError: If the file was not written by :func:`save_compressed`, is damaged, or takes more than
            ``max_bytes``, or if no name begins with ``strip_prefix``. The message names the file, and the tensor if
            there is one.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed({"module.weight": torch.tensor([0.0, 0.0, 1.5])}, f"{folder}/small.safetensors")
        ...     load_compressed(f"{folder}/small.safetensors", strip_prefix="module.")
        {'weight': tensor([0.0000, 0.0000, 1.5000])}
    """
    if max_bytes is not None:
        check_integer("max_bytes", max_bytes, minimum=0)
    with open(path, "rb") as stream:  # what is wrong with the path Python says better than safetensors
        size, start = os.fstat(stream.fileno()).st_size, stream.read(2)
    with about(os.fspath(path)):
        if start in (b"PK", b"\x80\x02") and not is_compressed(path):
            raise ValueError(
                "this is a file of torch.save, not one that `save_compressed` wrote. Load it with"
                " torch.load(path, weights_only=True), or compress it with `lightning-gcsr compress`."
            )
        with safe_open(os.fspath(path), framework="pt") as file:
            contents = parse_metadata((file.metadata() or {}).get(METADATA_KEY))
            if "crc32" in contents:
                tensors = _load_plain(file, contents["crc32"], size, max_bytes)
            else:
                tensors = _load_entries(file, read_entries(contents), size, max_bytes)
    return _without_prefix(tensors, strip_prefix) if strip_prefix else tensors


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not any(name.startswith(prefix) for name in tensors):
        advice = f"The names are like {', '.join(map(repr, near_names(prefix, tensors)))}."
        raise argument_error("strip_prefix", prefix, "must be the beginning of a name in the file", advice)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        [*_, name] = (name for name in tensors if name.startswith(prefix) and name.removeprefix(prefix) in tensors)
        rule = f"must leave the names different, but the file holds both {name!r} and {name.removeprefix(prefix)!r}"
        raise argument_error("strip_prefix", prefix, rule)
    return stripped


def check_bytes(needed: int, size: int, max_bytes: int | None) -> None:
    """Refuse tensors that take more than ``max_bytes``; for ``None`` see :func:`load_compressed`.

    Raises:
        ValueError: If ``needed`` bytes are more than a file of ``size`` bytes may take.
    """
    limit = max(_SMALL, _GROWTH * size) if max_bytes is None else max_bytes
    if needed > limit:
        raise ValueError(
            f"its tensors take {needed:,} bytes, more than the {limit:,} allowed for this file of {size:,}. If you"
            f" trust it, load it with max_bytes={needed}."
        )


def mapped_tensors(file: Any) -> dict[str, Tensor]:
    """All tensors of an open safetensors file, as views of the file itself.

    Raises:
        ValueError: If torch does not know the type of one.
    """
    tensors: dict[str, Tensor] = {}
    for name in file.keys():  # noqa: SIM118  # it is no mapping
        with about(f"tensor {name!r}"):
            try:
                tensors[name] = file.get_tensor(name)
            except (AttributeError, KeyError, RuntimeError, TypeError) as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
                raise ValueError(f"this version of torch cannot hold it: {reason}") from error
    return tensors


def _load_plain(file: Any, crc32: int, size: int, max_bytes: int | None) -> dict[str, Tensor]:
    """All tensors of an open file in which every tensor is dense."""
    mapped = mapped_tensors(file)
    check_bytes(sum(tensor.nbytes for tensor in mapped.values()), size, max_bytes)
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # the file may change or vanish
    if plain_checksum(tensors) != crc32:
        raise ValueError("its checksum does not fit; the file is damaged")
    return tensors


def _load_entries(file: Any, entries: list[Entry], size: int, max_bytes: int | None) -> dict[str, Tensor]:
    """The tensors of these entries of an open file."""
    if unknown := set(file.keys()) - {part for entry in entries for part in entry.parts.values()}:
        raise ValueError(f"it holds {sorted(unknown)[0]!r}, which belongs to no tensor")
    for entry in entries:
        with about(f"tensor {entry.name!r}"):
            _check_parts(file, entry)
    check_bytes(sum(entry.bytes for entry in entries), size, max_bytes)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        with about(f"tensor {entry.name!r}"):
            tensors[entry.name] = _load(file, entry, tensors)
    return tensors


def _check_parts(file: Any, entry: Entry) -> None:
    """Refuse parts of another type or shape than the entry needs, without reading them."""
    if entry.encoding is None:
        return
    slices = {key: file.get_slice(part) for key, part in entry.parts.items()}
    found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    nonzeros = next(iter(found["values"][1]), 0)
    needed = ENCODINGS[entry.encoding].part_types(entry.shape, entry.dtype, nonzeros)
    for key, (dtype, shape) in needed.items():
        if found[key] != (NATIVE_DTYPES[dtype], shape):
            raise ValueError(f"its {key} must be {NATIVE_DTYPES[dtype]} of shape {shape}, but are {found[key]}")


def _load(file: Any, entry: Entry, before: Mapping[str, Tensor]) -> Tensor:
    """One tensor of an open file, or a view of one that was loaded before."""
    # Copied, since what safetensors gives is the file itself, which may change or vanish.
    parts = {key: file.get_tensor(part).clone() for key, part in entry.parts.items()}
    if checksum(entry, parts) != entry.crc32:
        raise ValueError("its checksum does not fit; the file is damaged")
    if entry.encoding is None:
        return before[entry.to].as_strided(entry.shape, entry.strides or row_major(entry.shape))
    tensor = ENCODINGS[entry.encoding].decode(entry.shape, entry.dtype, parts)
    if entry.strides is None:
        return tensor
    return torch.empty_strided(entry.shape, entry.strides, dtype=entry.dtype).copy_(tensor)
