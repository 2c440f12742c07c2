"""A small model in a small file: every tensor in the smallest of three stored forms, exact to the bit.

The file is a safetensors file. A dense tensor is in it under its own name, for any reader of such files; the parts of
the other forms (see :mod:`lightning_gcsr.storage.encodings`) are under names like ``layer.weight::mask``. How they
belong together is in its metadata (see :mod:`lightning_gcsr.storage.manifest`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gcsr.core.sharding import is_sharded
from lightning_gcsr.sparsity.counting import memory_place
from lightning_gcsr.storage.atomic_write import check_target, replace_file
from lightning_gcsr.storage.encodings import DTYPES, PLAIN, decode, encode, packed_strides, part_types, plain, row_major
from lightning_gcsr.storage.manifest import METADATA_KEY, Entry, about, checksum, read_contents, write_contents
from lightning_gcsr.validation import argument_error, check_integer

__all__ = ["check_bytes", "is_compressed", "load_compressed", "obstacle", "save_compressed", "storable_tensors"]

_SMALL = 1 << 30
_GROWTH = 1000


def storable_tensors(module_or_state_dict: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that :func:`save_compressed` would save, by name, not copied.

    Raises:
        TypeError: If this is neither a module nor a mapping, or if something in it is not a tensor, or has a name that
            is not a string.
        ValueError: If a name is not proper Unicode, or a tensor is spread over processes, sparse, quantized, on the
            meta device, or otherwise not simply numbers in memory.
    """
    if isinstance(module_or_state_dict, nn.Module):
        module_or_state_dict = module_or_state_dict.state_dict()
    argument = "module_or_state_dict"
    if not isinstance(module_or_state_dict, Mapping):
        raise argument_error(argument, module_or_state_dict, "must be a module or a mapping of tensors", "", TypeError)
    for name, value in module_or_state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"`{argument}` must have strings as names, got the name {name!r}. Rename it.")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"`{argument}` must have names in proper Unicode, got {name!r}. Rename it.")
        if not isinstance(value, Tensor):
            raise TypeError(f"`{argument}` must hold nothing but tensors, got {name!r}={value!r:.200}. Leave it out.")
        problem, advice = obstacle(value)
        if problem:
            raise ValueError(f"`{argument}` must hold plain tensors, got {name!r}, which is {problem}. {advice}")
    return dict(module_or_state_dict)


def obstacle(tensor: Tensor) -> tuple[str, str]:
    """Why a tensor cannot be stored, and what to do; empty where it can."""
    if is_sharded(tensor):
        return "spread over processes", (
            "Gather it on all of them first, with torch.distributed.checkpoint.state_dict.get_model_state_dict(model,"
            " options=StateDictOptions(full_state_dict=True, cpu_offload=True))."
        )
    if is_lazy(tensor):
        return "not initialized yet", "Run the module once first."
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        return "quantized, sparse or nested", "Convert it with dequantize() or to_dense() first."
    if tensor.is_meta:
        return "on the meta device", "Give it values first."
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"of the type {type(tensor).__name__}", "Convert it to a plain tensor first."
    if tensor.dtype not in DTYPES.values():
        return f"of {tensor.dtype}", f"The types that can be stored are {', '.join(DTYPES)}."
    return "", ""


@torch.no_grad()
def save_compressed(module_or_state_dict: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Save each tensor in the smallest of three forms, as one safetensors file that gives back every bit.

    The bytes are those of :func:`~lightning_gcsr.stored_bytes`, and a header of some 200 for each tensor. An entry is
    left out only if all its bits are zero, so −0.0 and every NaN come back as they are. Tensors over the very same
    memory (tied weights, transposed or in another shape too) are stored once and are tied again when loaded; where
    they share only a part of it, each is stored. Strides, ``requires_grad`` and devices are not kept.

    The file is there when it is complete, in place of one that was there; see
    :func:`lightning_gcsr.storage.atomic_write.replace_file` for what happens when the process is killed. For a moment
    the bytes to be written are in memory twice, beside the tensors, for safetensors copies them. Tensors on an
    accelerator are copied to the host one by one.

    Args:
        module_or_state_dict: A module, of which the state dict is saved, or tensors by name: of any floating, integer,
            boolean or complex type, on any device.
        path: Where to write. The usual suffix is ``.safetensors``.

    Raises:
        TypeError: If something is not a tensor (such as an ``_extra_state``) or a name is not a string.
        ValueError: If a tensor is spread over processes, sparse, quantized or on the meta device; if something other
            than a file is at ``path``.
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
    taken = {"__metadata__", *tensors}  # the first is what safetensors keeps for itself
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    entries = []
    for name, (first, strides) in _ties(tensors).items():
        tensor = tensors[name]
        entry = Entry(name, tuple(tensor.shape), tensor.dtype, to=first, strides=strides)
        parts: dict[str, Tensor] = {}
        if first == name:
            form, parts = encode(plain(tensor))
            if form == "dense" and name != "__metadata__":
                names = {"values": name}
            else:
                names = {key: _free_name(f"{name}::{key}", taken) for key in parts}
            entry = entry._replace(form=form, parts=names, to="")
        for key, part in parts.items():
            storage = part.untyped_storage().data_ptr()
            stored[entry.parts[key]] = part.clone() if storage in storages else part  # safetensors takes no overlaps
            storages.add(storage)
        entries.append(entry._replace(crc32=checksum(entry, parts)))
    replace_file(path, save(stored, {METADATA_KEY: write_contents(entries)}))


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """For each tensor the first one over the same memory, and its strides there where they are not row-major ones."""
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


def load_compressed(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """The tensors that :func:`save_compressed` saved, exact to the bit, on the CPU, in the same order.

    The file may be damaged, or made to do harm: nothing in it is executed, everything it says is checked before it is
    acted on, checksums find a flipped bit, and memory for the tensors is taken only after their sum has been checked.

    Args:
        path: The file.
        max_bytes: The largest number of bytes that the tensors may take together. ``None``: 1 GiB, or a thousand
            times the size of the file if that is more. (A matrix of zeros takes thousands of times more memory than its
            file; so does what pretends to be one.)

    Raises:
        ValueError: If the file is not one of :func:`save_compressed`, is damaged, or takes more than ``max_bytes``. The
            message names the file, and the tensor if it is about one.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed({"weight": torch.tensor([0.0, -0.0, 1.5])}, f"{folder}/small.safetensors")
        ...     load_compressed(f"{folder}/small.safetensors")
        {'weight': tensor([0.0000, -0.0000, 1.5000])}
    """
    if max_bytes is not None:
        check_integer("max_bytes", max_bytes, minimum=0)
    with open(path, "rb") as stream:  # what is wrong with the path Python says better than safetensors
        size = os.fstat(stream.fileno()).st_size
    tensors: dict[str, Tensor] = {}
    with about(os.fspath(path)), safe_open(os.fspath(path), framework="pt") as file:
        entries = read_contents((file.metadata() or {}).get(METADATA_KEY))
        if unknown := set(file.keys()) - {part for entry in entries for part in entry.parts.values()}:
            raise ValueError(f"it holds {sorted(unknown)[0]!r}, which belongs to no tensor")
        for entry in entries:
            with about(f"tensor {entry.name!r}"):
                _check_parts(file, entry)
        check_bytes(sum(entry.bytes for entry in entries), size, max_bytes)
        for entry in entries:
            with about(f"tensor {entry.name!r}"):
                tensors[entry.name] = _load(file, entry, tensors)
    return tensors


def check_bytes(needed: int, size: int, max_bytes: int | None) -> None:
    """Refuse tensors that take more than ``max_bytes``; ``None`` is what :func:`load_compressed` says.

    Raises:
        ValueError: If ``needed`` bytes are more than a file of ``size`` bytes may take.
    """
    limit = max(_SMALL, _GROWTH * size) if max_bytes is None else max_bytes
    if needed > limit:
        raise ValueError(
            f"its tensors take {needed:,} bytes, more than the {limit:,} allowed for this file of {size:,}. If you"
            f" trust it, load it with max_bytes={needed}."
        )


def _check_parts(file: Any, entry: Entry) -> None:
    """Refuse parts of another type or shape than the entry needs; nothing is read for it."""
    if entry.form is None:
        return
    slices = {key: file.get_slice(part) for key, part in entry.parts.items()}
    found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    nonzeros = next(iter(found["values"][1]), 0)
    for key, (dtype, shape) in part_types(entry.form, entry.shape, entry.dtype, nonzeros).items():
        if found[key] != (PLAIN[dtype], shape):
            raise ValueError(f"its {key} must be {PLAIN[dtype]} of shape {shape}, but are {found[key]}")


def _load(file: Any, entry: Entry, before: Mapping[str, Tensor]) -> Tensor:
    """One tensor of an open file, or a view of one that was loaded before."""
    if entry.form is None:
        if checksum(entry, {}) != entry.crc32:
            raise ValueError("its checksum does not fit; the file is damaged")
        return before[entry.to].as_strided(entry.shape, entry.strides or row_major(entry.shape))
    # Copied, for what safetensors gives is the file itself, which may change or vanish.
    parts = {key: file.get_tensor(part).clone() for key, part in entry.parts.items()}
    if checksum(entry, parts) != entry.crc32:
        raise ValueError("its checksum does not fit; the file is damaged")
    tensor = decode(entry.form, entry.shape, entry.dtype, parts)
    if entry.strides is None:
        return tensor
    return torch.empty_strided(entry.shape, entry.strides, dtype=entry.dtype).copy_(tensor)
