"""The types of tensors that can be stored, and their entries as bits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DTYPES", "NATIVE_DTYPES", "as_bits", "as_native", "from_native", "nonzero_entries"]

NATIVE_DTYPES: dict[torch.dtype, str] = {
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
"""The types that safetensors 0.6 and newer reads into torch, and their names there."""
_AS_BYTES = (torch.complex128, torch.complex64, torch.complex32, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in (*NATIVE_DTYPES, *_AS_BYTES)}
"""The types that can be stored, by name. Those that safetensors does not know are stored as bytes."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WITHOUT_NEGATIVE_ZERO = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # there the sign bit alone is NaN


def as_bits(tensor: Tensor) -> Tensor:
    """The entries of a contiguous tensor as integers with the same bits: (n,), or (n, 2) for complex numbers."""
    if not tensor.is_complex():
        return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size() // 2]).view(-1, 2)


def nonzero_entries(tensor: Tensor) -> Tensor:
    """Which entries of a contiguous tensor on the CPU are not zero, in row-major order: (n,) booleans.

    −0.0 is zero, NaN is not. The answer comes from the bits, since torch does not compare all types.

    Example:
        >>> nonzero_entries(torch.tensor([0.0, -0.0, float("nan")]))
        tensor([False, False,  True])
    """
    bits = as_bits(tensor)
    if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in _WITHOUT_NEGATIVE_ZERO:
        bits = bits << 1  # without the sign
    return bits != 0 if bits.dim() == 1 else (bits != 0).any(1)


def as_native(tensor: Tensor) -> Tensor:
    """The tensor itself, or its bytes in one more dimension if safetensors does not know its type."""
    return tensor if tensor.dtype in NATIVE_DTYPES else tensor.unsqueeze(-1).view(torch.uint8)


def from_native(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of this type of which :func:`as_native` made the other one."""
    return tensor if dtype in NATIVE_DTYPES else tensor.view(dtype).squeeze(-1)
