"""Reading the tensors of a file of weights of any kind, without executing anything in it.

==============  ==================================================================================================
kind            contents
==============  ==================================================================================================
``checkpoint``  a mapping with the weights in ``"state_dict"``, saved by ``torch.save``, as Lightning does
``state_dict``  a mapping of names to tensors, saved by ``torch.save``
``safetensors`` any safetensors file except
``compressed``  one of :func:`~lightning_gcsr.save_compressed`
==============  ==================================================================================================

The contents decide on the kind, not the suffix.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_gcsr.storage.compressed_file import check_bytes, is_compressed, load_compressed, mapped_tensors
from lightning_gcsr.storage.inert_unpickler import Inert, load_inert
from lightning_gcsr.storage.manifest import about
from lightning_gcsr.storage.storable import obstacle

__all__ = ["WeightsFile", "read_weights"]


@dataclass(frozen=True)
class WeightsFile:
    """The contents of a file."""

    path: str
    kind: Literal["checkpoint", "state_dict", "safetensors", "compressed"]
    size: int
    """The bytes of the file."""
    tensors: dict[str, Tensor]
    """On the CPU, in the order of the file; they may be views of the file itself."""
    other_values: tuple[str, ...] = ()
    """The names in the state dict whose values are not tensors, such as an ``_extra_state``."""
    other_keys: tuple[str, ...] = ()
    """The keys of a checkpoint beside the state dict, such as the states of the optimizers."""


def read_weights(path: str | os.PathLike[str], max_bytes: int | None = None) -> WeightsFile:
    """The weights in a file, on the CPU.

    The file may be damaged or malicious: nothing in it is executed, and the tensors may take no more memory than
    :func:`~lightning_gcsr.load_compressed` allows. Objects that a checkpoint holds beside its state dict, such as those
    among its hyperparameters, are left out.

    Raises:
        ValueError: If the file is of none of these kinds, is damaged, has objects in its state dict, takes more than
            ``max_bytes``, or holds a tensor that is not simply numbers in memory. The message names the file.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": {"weight": torch.ones(2)}}, f"{folder}/last.ckpt")
        ...     file = read_weights(f"{folder}/last.ckpt")
        ...     file.kind, file.tensors, file.other_keys
        ('checkpoint', {'weight': tensor([1., 1.])}, ('epoch',))
    """
    path = os.fspath(path)
    with about(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would be to wait for its writer
            raise ValueError("this is not a file, but a folder, a device or a pipe")
        with open(path, "rb") as stream:
            start = stream.read(9)
    if start[8:] != b"{":  # before it, a safetensors file has its length, which can be any bytes
        with about(path):
            if not start.startswith((b"PK", b"\x80")):
                raise ValueError("this is neither a file of torch.save nor a safetensors file, or its start is damaged")
            return _of_torch(path, status.st_size, max_bytes, is_zip=start.startswith(b"PK"))
    if is_compressed(path):
        return WeightsFile(path, "compressed", status.st_size, load_compressed(path, max_bytes=max_bytes))
    with about(path), safe_open(path, framework="pt") as file:
        return WeightsFile(path, "safetensors", status.st_size, mapped_tensors(file))


def _of_torch(path: str, size: int, max_bytes: int | None, is_zip: bool) -> WeightsFile:
    contents = _load(path, size, is_zip)
    if not isinstance(contents, Mapping):
        raise ValueError(f"it holds no state dict, but {_kind(contents)}. Save model.state_dict().")
    kind: Literal["checkpoint", "state_dict"] = "state_dict"
    other_keys: tuple[str, ...] = ()
    if isinstance(contents.get("state_dict"), Mapping):
        kind = "checkpoint"
        other_keys = tuple(str(key) for key in contents if key != "state_dict")
        contents = contents["state_dict"]
    tensors = {name: value.detach() for name, value in contents.items() if isinstance(value, Tensor)}
    if contents and not tensors:
        keys = ", ".join(repr(key)[:40] for key in list(contents)[:5])
        raise ValueError(f"it holds no tensors by name, but {keys}. Save model.state_dict().")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"it has a tensor with the name {name!r:.100}, which is not proper text. Rename it.")
        problem, advice = obstacle(tensor)
        if problem:
            raise ValueError(f"tensor {name!r}: it is {problem}. {advice}")
    check_bytes(sum(tensor.nbytes for tensor in tensors.values()), size, max_bytes)
    other_values = tuple(str(name) for name in contents if name not in tensors)
    return WeightsFile(path, kind, size, tensors, other_values, other_keys)


def _load(path: str, size: int, is_zip: bool) -> Any:
    """What ``torch.save`` wrote, without executing anything."""
    if is_zip:
        _check_zip(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch on its own types
            if is_zip and not path.endswith(".safetensors"):  # where torch would believe the name
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # what torch raises for a damaged file is of any type
        reason = str(error.__context__ or error) if isinstance(error, pickle.UnpicklingError) else _line(error)
        if needed := re.search(r"GLOBAL (\S+)|class(?:es)? (\w+(?:\.\w+)+)", reason):
            if is_zip and (contents := _without_objects(path)) is not None:
                return contents
            raise ValueError(
                f"it needs {next(filter(None, needed.groups()))}, which only executing the pickle could load."
                " Save the weights alone, with torch.save(model.state_dict(), path)."
            ) from error
        raise ValueError(f"it is damaged, or not a file that torch.save wrote: {' '.join(reason.split())[:200]}") from (
            error
        )


def _without_objects(path: str) -> Any:
    """The checkpoint, if only what is beside its state dict holds objects; else ``None``."""
    try:
        contents = load_inert(path)
    except MemoryError:
        raise
    except Exception:  # of any type, as above, where the error is raised
        return None
    if not isinstance(contents, Mapping) or not isinstance(contents.get("state_dict"), Mapping):
        return None
    return None if any(isinstance(value, Inert) for value in contents["state_dict"].values()) else contents


def _check_zip(path: str, size: int) -> None:
    """Refuse a zip file that expands when torch reads it, or that ``torch.save`` did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # Python's reader takes what it reads for granted
        raise ValueError(f"it is a zip file that is damaged or cut off: {_line(error)}") from error
    names = {member.filename.partition("/")[2] for member in members}
    if "data.pkl" not in names:
        raise ValueError("it is a zip file, but not one that torch.save wrote")
    if "constants.pkl" in names:
        raise ValueError("it is a TorchScript archive, which holds code. Save model.state_dict() instead.")
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("it is a zip file that expands when it is read, which torch.save does not write")


def _kind(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _line(error: BaseException) -> str:
    """The message of an error, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
