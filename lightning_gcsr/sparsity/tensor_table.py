"""A table of tensors: one row for each, the same cells wherever it is shown, and the totals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_gcsr.sparsity.counting import TensorCount, count_tensors, countable
from lightning_gcsr.storage.tensor_memory import memory_place

__all__ = ["CELLS", "TensorRow", "Totals", "row_of", "tensor_rows", "totals"]


@dataclass(frozen=True)
class Totals:
    """The sums over tensors."""

    tensors: int
    weights: int
    zeros: int
    near_zeros: int
    dense_bytes: int
    stored_bytes: int
    """With each tensor in its smallest encoding."""

    @property
    def sparsity(self) -> float:
        """The sparsity: near zeros ÷ weights, in [0, 1]; 0 if there are no weights."""
        return self.near_zeros / max(1, self.weights)

    @property
    def compression_ratio(self) -> float:
        """Weights ÷ weights that are not near zero; infinite if all are."""
        left = self.weights - self.near_zeros
        return self.weights / left if left else math.inf


def totals(counts: Iterable[TensorCount]) -> Totals:
    """The sums over the counts.

    Example:
        >>> import torch
        >>> from lightning_gcsr import count_tensors
        >>> totals(count_tensors({"weight": torch.eye(10)})).compression_ratio
        10.0
    """
    counts = list(counts)
    return Totals(
        tensors=len(counts),
        weights=sum(count.entries for count in counts),
        zeros=sum(count.zeros for count in counts),
        near_zeros=sum(count.near_zeros for count in counts),
        dense_bytes=sum(count.bytes.dense for count in counts),
        stored_bytes=sum(count.bytes.best for count in counts),
    )


CELLS: dict[str, Callable[[Totals], str]] = {
    "weights": lambda total: f"{total.weights:,}",
    "zeros": lambda total: f"{total.zeros:,}",
    "sparsity": lambda total: f"{total.sparsity:.2%}",
    "near zeros": lambda total: f"{total.near_zeros:,}",
    "dense size": lambda total: f"{total.dense_bytes:,}",
    "stored size": lambda total: f"{total.stored_bytes:,}",
    "of dense": lambda total: f"{total.stored_bytes / max(1, total.dense_bytes):.1%}",
}
"""The numbers of one tensor, or of several, by the heading of their column."""


def row_of(
    name: str, counts: Sequence[TensorCount], columns: Iterable[str], shape: str = "", encoding: str = ""
) -> tuple[str, ...]:
    """The cells of one tensor, or of several, in these columns: those of :data:`CELLS`, name, shape and encoding."""
    total = totals(counts)
    text = {"tensor": name, "layer": name, "shape": shape, "encoding": encoding}
    return tuple(text[column] if column in text else CELLS[column](total) for column in columns)


@dataclass(frozen=True)
class TensorRow(TensorCount):
    """The counts of one tensor of a file, as a matrix of its first dimension and all others."""

    dtype: str
    empty_rows: int | None
    """Rows that are all zero; ``None`` for tensors of fewer than two dimensions."""
    empty_columns: int | None
    tied_to: str | None
    """The tensor before it that lies in the same memory."""

    @property
    def encoding(self) -> str:
        """``dense``, ``bitmask``, ``rows``, or ``tied``."""
        return "tied" if self.tied_to is not None else self.bytes.best_encoding

    @property
    def dense_bytes(self) -> int:
        """0 for a tied tensor, which takes no more memory."""
        return 0 if self.tied_to is not None else self.bytes.dense

    @property
    def stored_bytes(self) -> int:
        """In the smallest encoding, once the near zeros are zeros; 0 for a tied tensor."""
        return 0 if self.tied_to is not None else self.bytes.best


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
        >>> row.zeros, row.empty_rows, row.empty_columns, row.encoding
        (4, 1, 1, 'bitmask')
    """
    first: dict[tuple[object, ...], str] = {}
    rows = []
    for name, tensor in tensors.items():
        owner = first.setdefault(memory_place(tensor), name)
        [count] = count_tensors({name: tensor}, threshold)
        empty_rows, empty_columns = _empty(tensor)
        rows.append(
            TensorRow(
                **vars(count),
                dtype=str(tensor.dtype).removeprefix("torch."),
                empty_rows=empty_rows,
                empty_columns=empty_columns,
                tied_to=owner if owner != name else None,
            )
        )
    return rows


def _empty(tensor: Tensor) -> tuple[int | None, int | None]:
    if tensor.dim() < 2:
        return None, None
    if not tensor.numel():  # it may have any number of columns
        return len(tensor), math.prod(tensor.shape[1:])
    nonzero = (countable(tensor.detach()) != 0).reshape(len(tensor), -1)
    return int((~nonzero.any(1)).sum()), int((~nonzero.any(0)).sum())
