"""``lightning-gcsr compress`` and ``expand``: compressed files from others, and plain files from compressed ones."""

from __future__ import annotations

import importlib.metadata
import io
import os
from argparse import Namespace

import torch
from safetensors.torch import save
from torch import Tensor

from lightning_gcsr.cli.console import KINDS, aligned, check_complete, listed, printable, read, saving, write
from lightning_gcsr.storage.atomic_write import check_target, replace_file
from lightning_gcsr.storage.compressed_file import save_compressed
from lightning_gcsr.storage.dtypes import NATIVE_DTYPES
from lightning_gcsr.storage.tensor_memory import distinct_tensors

__all__ = ["compress", "expand"]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def compress(given: Namespace) -> int:
    """Write a compressed file, say how large it is, and return the exit code."""
    _check_output(given)
    file = read(given.input, given.max_bytes)
    check_complete(file)
    saving(given.output, lambda: save_compressed(file.tensors, given.output))
    text = f"{printable(given.output)}: written from {printable(file.path)}, {KINDS[file.kind]}\n"
    if file.other_keys:
        text += f"Only the weights of the checkpoint are kept, not {listed(file.other_keys)}.\n"
    with open(given.output, "rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    size = os.path.getsize(given.output)
    dense = sum(tensor.nbytes for tensor in distinct_tensors(file.tensors.items()).values())
    pairs = [
        ("dense size", f"{dense:,} bytes"),
        ("stored size", f"{size - header:,} bytes ({(size - header) / max(1, dense):.1%} of dense)"),
        ("file size", f"{size:,} bytes ({size / max(1, dense):.1%} of dense)"),
    ]
    write(f"{text}\n{aligned(pairs)}")
    return 0


def expand(given: Namespace) -> int:
    """Write a plain file and return the exit code."""
    suffix = os.path.splitext(given.output)[1].lower()
    if suffix != ".safetensors" and suffix not in _TORCH_SUFFIXES:
        raise ValueError(
            f"{given.output}: the suffix must say what to write: .safetensors, or {', '.join(_TORCH_SUFFIXES)} for a"
            " file of torch.save"
        )
    _check_output(given)
    file = read(given.input, given.max_bytes)
    if file.kind != "compressed":
        raise ValueError(f"{file.path}: this is not a compressed file, but a {KINDS[file.kind]}")
    distinct = distinct_tensors(file.tensors.items())
    tied = [name for name in file.tensors if name not in distinct]
    saving(given.output, lambda: replace_file(given.output, _expanded(file.tensors, suffix)))
    size = os.path.getsize(given.output)
    text = f"{printable(given.output)}: {size:,} bytes, written from the {file.size:,} of {printable(file.path)}\n"
    if tied and suffix == ".safetensors":
        text += f"A safetensors file cannot hold tied tensors; these are copies now: {listed(tied)}.\n"
    write(text)
    return 0


def _expanded(tensors: dict[str, Tensor], suffix: str) -> bytes:
    """The bytes of the plain file."""
    if suffix == ".safetensors":
        for name, tensor in tensors.items():
            if tensor.dtype not in NATIVE_DTYPES:
                raise ValueError(f"tensor {name!r}: safetensors has no {tensor.dtype}. Give OUT the suffix .pt.")
            if name == "__metadata__":
                raise ValueError(f"tensor {name!r}: safetensors reserves this name. Give OUT the suffix .pt.")
        return save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    stream = io.BytesIO()
    if suffix == ".ckpt":  # the least that Lightning needs for load_from_checkpoint
        contents = {"state_dict": tensors, "pytorch-lightning_version": importlib.metadata.version("lightning")}
        torch.save(contents, stream)
    else:
        torch.save(tensors, stream)
    return stream.getvalue()


def _check_output(given: Namespace) -> None:
    """Refuse what cannot be written before anything is read."""
    check_target(given.output)
    if os.path.exists(given.output) and not given.overwrite:
        raise ValueError(f"{given.output}: this file exists. Replace it with --overwrite.")
