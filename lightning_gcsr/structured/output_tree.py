"""The tensors in an output, whatever container they come in, and how far two outputs differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["OutputsDifferError", "largest_difference", "tensors_in"]


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in an output, in order: of mappings, sequences, dataclasses, and what is registered as a pytree.

    Example:
        >>> len(tensors_in({"logits": torch.ones(2), "more": (torch.ones(1), None)}))
        2
    """
    return list(_tensors_in(output, set()))


def _tensors_in(output: Any, above: set[int]) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, (str, bytes, int, float, complex, type(None))) or id(output) in above:
        return
    above = above | {id(output)}
    for part in _parts(output):
        yield from _tensors_in(part, above)


def _parts(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    if isinstance(output, (list, tuple, set, frozenset)):
        return list(output)
    leaves = tree_leaves(output)
    if len(leaves) != 1 or leaves[0] is not output:
        return leaves
    return list(vars(output).values()) if hasattr(output, "__dict__") and not callable(output) else []


class OutputsDifferError(ValueError):
    """Two outputs that should be the same are not."""


def largest_difference(before: Any, after: Any, closeness: float | None = None) -> float:
    """The largest difference between two outputs; NaN and infinite numbers equal themselves.

    Args:
        before: An output, in any container.
        after: The output that should be the same.
        closeness: How far floating-point numbers may differ, relative to the largest of their tensor; by default 1e-5,
            1e-9 in double precision and 0.03 in half precision.

    Raises:
        OutputsDifferError: If they differ by more, or in their shapes, or in a whole number.
        ValueError: If there is nothing to compare.
    """
    olds, news = tensors_in(before), tensors_in(after)
    if not any(old.numel() for old in olds):
        raise ValueError(
            f"The output for `example_input`, of type {type(before).__name__}, holds no tensors to compare. Return"
            " tensors, alone or in a tuple, list, dict or dataclass."
        )
    if [old.shape for old in olds] != [new.shape for new in news]:
        raise OutputsDifferError("have other shapes")
    largest = 0.0
    for old, new in zip(olds, news, strict=True):
        if not old.numel():
            continue
        if not (old.is_floating_point() or old.is_complex()):
            if not torch.equal(old, new):
                raise OutputsDifferError("differ in whole numbers")
            continue
        same = (old == new) | (old.isnan() & new.isnan())
        differences = torch.where(same, 0.0, (old - new).abs())
        difference = float(differences.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
        close = _CLOSENESS.get(old.dtype, 1e-5) if closeness is None else closeness
        if difference > close * old.abs().nan_to_num(nan=0, posinf=0).max().item():
            raise OutputsDifferError(f"differ by {difference:.3g}")
        largest = max(largest, difference)
    return largest


_CLOSENESS = {torch.float16: 0.03, torch.bfloat16: 0.03, torch.float64: 1e-9, torch.complex128: 1e-9}
