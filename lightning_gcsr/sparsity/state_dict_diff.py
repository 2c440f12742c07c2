"""Which tensors of two state dicts differ, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Difference", "differences"]

_CHUNK = 1 << 20  # entries that are compared at a time, in 64 bits


@dataclass(frozen=True)
class Difference:
    """How one tensor differs. The counts are 0 if it is on one side only, or if shapes or types differ."""

    name: str
    left: str
    """Shape and type, such as ``"10x64 float32"``; empty if there is no such tensor."""
    right: str
    weights: int = 0
    differing: int = 0
    """How many entries differ."""
    largest: float = 0.0
    """The largest absolute difference; NaN if a NaN is on one side only."""
    to_nonzero: int = 0
    """Zeros on the left that are not zero on the right."""
    to_zero: int = 0


def differences(left: Mapping[str, Tensor], right: Mapping[str, Tensor], exact: bool = False) -> list[Difference]:
    """The tensors that differ, in the order of the left side, then those on the right side alone.

    NaN equals NaN, and −0.0 equals 0.0. Whether tensors are tied does not matter.

    Args:
        left: Tensors by name.
        right: Tensors by name to compare them with.
        exact: Compare bits, so that −0.0 differs from 0.0, and NaNs with different payloads differ.

    Example:
        >>> left, right = {"weight": torch.tensor([0.0, 1.0])}, {"weight": torch.tensor([0.0, 0.5])}
        >>> [difference] = differences(left, right)
        >>> difference.differing, difference.largest
        (1, 0.5)
    """
    found = []
    for name in [*left, *(name for name in right if name not in left)]:
        described = (_described(left.get(name)), _described(right.get(name)))
        if described[0] != described[1]:
            found.append(Difference(name, *described))
        else:
            difference = _compared(name, described[0], left[name], right[name], exact)
            found += [difference] if difference.differing else []
    return found


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return ""
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"


@torch.no_grad()
def _compared(name: str, described: str, left: Tensor, right: Tensor, exact: bool) -> Difference:
    differing = to_nonzero = to_zero = 0
    largest = torch.zeros((), dtype=torch.float64)
    for one, other in zip(_chunks(left), _chunks(right), strict=True):
        if torch.equal(_bytes(one), _bytes(other)):
            continue
        a, b = _numbers(one), _numbers(other)
        same = (a == b) | (a.isnan() & b.isnan())
        unlike = (_bytes(one) != _bytes(other)).any(1) if exact else ~same.all(1)
        zero_a, zero_b = (a == 0).all(1), (b == 0).all(1)
        differing += int(unlike.sum())
        to_nonzero += int((zero_a & ~zero_b).sum())
        to_zero += int((~zero_a & zero_b).sum())
        largest = torch.maximum(largest, _distances(a, b, same).max())  # both propagate NaN
    return Difference(name, described, described, left.numel(), differing, float(largest), to_nonzero, to_zero)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    yield from flat.split(_CHUNK)  # type: ignore[no-untyped-call]


def _bytes(chunk: Tensor) -> Tensor:
    return chunk.view(torch.uint8).view(len(chunk), chunk.element_size())


def _numbers(chunk: Tensor) -> Tensor:
    """The entries as one or two numbers of 64 bits each: (n, 1) or (n, 2), without a loss."""
    if chunk.is_complex():
        return torch.view_as_real(chunk.to(torch.complex128))
    if chunk.dtype == torch.uint64:
        return chunk.view(torch.int64).unsqueeze(1)  # which torch can compare; only distances beyond 2⁶³ are wrong
    return chunk.to(torch.float64 if chunk.is_floating_point() else torch.int64).unsqueeze(1)


def _distances(a: Tensor, b: Tensor, same: Tensor) -> Tensor:
    if a.dtype == torch.float64:
        return torch.where(same, 0.0, a - b).square().sum(1).sqrt()  # infinity − infinity is NaN
    apart = torch.where(a > b, a - b, b - a).squeeze(1)  # a difference beyond 63 bits is negative here
    return torch.where(apart < 0, apart.double() + 2.0**64, apart.double())
