"""Which tensors can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gcsr.core.sharding import is_sharded
from lightning_gcsr.storage.dtypes import DTYPES
from lightning_gcsr.validation import argument_error

__all__ = ["obstacle", "storable_tensors"]


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
    """Why a tensor cannot be stored, and what to do; empty strings if it can."""
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
