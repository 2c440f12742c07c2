"""What the tensors of a file are made of, one row each, and their totals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_gcsr.sparsity.counting import count_tensors, countable, memory_place, stored_bytes
from lightning_gcsr.storage.encodings import plain, stored_entries

__all__ = ["SORTINGS", "TensorRow", "Totals", "tensor_rows", "totals"]


@dataclass(frozen=True)
class TensorRow:
    """The counts of one tensor; it is a matrix of its first dimension and all others."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    zeros: int
    negative_zeros: int
    """Zeros that are −0.0: a compressed file stores them, to give back every bit."""
    near_zeros: int
    empty_rows: int | None
    """Rows that are all zero; ``None`` of tensors of fewer than two dimensions."""
    empty_columns: int | None
    dense_bytes: int
    """0 of a tied tensor, which takes no more memory."""
    stored_bytes: int
    """In the smallest form: as the tensor is, or with a threshold, once its near zeros are zeros."""
    form: str
    """``dense``, ``bitmask``, ``rows``, or ``tied``."""
    tied_to: str | None

    @property
    def sparsity(self) -> float:
        """The share of zeros; 0 of an empty tensor."""
        return self.zeros / max(1, self.weights)


@dataclass(frozen=True)
class Totals:
    """The sums over all tensors; tied ones count once."""

    tensors: int
    weights: int
    zeros: int
    negative_zeros: int
    near_zeros: int
    dense_bytes: int
    stored_bytes: int

    @property
    def sparsity(self) -> float:
        """The share of zeros; 0 of no weights."""
        return self.zeros / max(1, self.weights)

    @property
    def compression(self) -> float:
        """Weights ÷ those that are not near zero; infinite if there are none."""
        left = self.weights - self.near_zeros
        return self.weights / left if left else math.inf


SORTINGS: dict[str, Callable[[TensorRow], object]] = {
    "name": lambda row: row.name,
    "weights": lambda row: -row.weights,
    "zeros": lambda row: -row.zeros,
    "sparsity": lambda row: -row.sparsity,
    "dense": lambda row: -row.dense_bytes,
    "stored": lambda row: -row.stored_bytes,
}
"""Keys for ``sorted``: names in alphabetical order, of numbers the largest first."""


def tensor_rows(tensors: Mapping[str, Tensor], threshold: float = 0.0) -> list[TensorRow]:
    r"""A row for each tensor, in their order.

    Args:
        tensors: The tensors by name.
        threshold: The magnitude up to which an entry counts as near zero.

    Raises:
        ValueError: If ``threshold`` is negative or not finite.

    Example:
        >>> import torch
        >>> [row] = tensor_rows({"weight": torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]])})
        >>> row.zeros, row.empty_rows, row.empty_columns, row.form
        (4, 1, 1, 'bitmask')
    """
    first: dict[tuple[object, ...], str] = {}
    rows = []
    for name, tensor in tensors.items():
        owner = first.setdefault(memory_place(tensor), name)
        tied = owner != name
        [count] = count_tensors({name: tensor}, threshold)
        left_out = count.entries - int(stored_entries(plain(tensor)).sum())
        zeros_left_out = count.near_zeros if threshold else left_out
        stored = stored_bytes(count.shape, count.entries - zeros_left_out, count.value_bytes)
        empty_rows, empty_columns = _empty(tensor)
        rows.append(
            TensorRow(
                name=name,
                shape=count.shape,
                dtype=str(tensor.dtype).removeprefix("torch."),
                weights=count.entries,
                zeros=count.zeros,
                negative_zeros=max(0, count.zeros - left_out),  # of float8_e8m0fnu, entries without a bit are no zeros
                near_zeros=count.near_zeros,
                empty_rows=empty_rows,
                empty_columns=empty_columns,
                dense_bytes=0 if tied else count.bytes.dense,
                stored_bytes=0 if tied else stored.best,
                form="tied" if tied else stored.best_form,
                tied_to=owner if tied else None,
            )
        )
    return rows


def _empty(tensor: Tensor) -> tuple[int | None, int | None]:
    if tensor.dim() < 2:
        return None, None
    if not tensor.numel():  # it may be of as many columns as it likes
        return len(tensor), math.prod(tensor.shape[1:])
    nonzero = (countable(tensor.detach()) != 0).reshape(len(tensor), -1)
    return int((~nonzero.any(1)).sum()), int((~nonzero.any(0)).sum())


def totals(rows: Iterable[TensorRow]) -> Totals:
    """The sums over the rows.

    Example:
        >>> import torch
        >>> totals(tensor_rows({"weight": torch.eye(10)})).compression
        10.0
    """
    own = [row for row in rows if row.tied_to is None]
    return Totals(
        tensors=len(own),
        weights=sum(row.weights for row in own),
        zeros=sum(row.zeros for row in own),
        negative_zeros=sum(row.negative_zeros for row in own),
        near_zeros=sum(row.near_zeros for row in own),
        dense_bytes=sum(row.dense_bytes for row in own),
        stored_bytes=sum(row.stored_bytes for row in own),
    )
