"""How sparse a model is and what it takes to store: the numbers, and a table with a row for each of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_gcsr.sparsity import text_table
from lightning_gcsr.sparsity.computed_weights import computed_weights, counted_weights
from lightning_gcsr.sparsity.counting import TensorCount, count_tensors
from lightning_gcsr.sparsity.tensor_table import Totals, row_of, totals

__all__ = ["HEADER", "CompressionSummary", "markdown_table", "print_table", "summarize"]

HEADER = ("layer", "shape", "weights", "sparsity", "encoding", "stored size", "of dense")
_LEFT = ("layer", "shape", "encoding")


@dataclass(frozen=True)
class CompressionSummary:
    """The counts of a model at one moment."""

    counts: Sequence[TensorCount]
    """Of the trained weights; tied ones once. If nothing is trained, of all."""
    dense_bytes: int
    """Of all parameters, biases and norms too."""
    stored_bytes: int
    """The same, each parameter in its smallest encoding."""
    zero_threshold: float = 0.0
    """The magnitude up to which a weight counted as zero."""
    frozen: Sequence[TensorCount] = ()
    """Of the frozen weights, which no other number here includes but the bytes."""

    @property
    def totals(self) -> Totals:
        """The sums over the trained weights."""
        return totals(self.counts)

    @property
    def sparsity(self) -> float:
        """Near zeros ÷ trained weights, in [0, 1]."""
        return self.totals.sparsity

    @property
    def ratio(self) -> float:
        """The compression ratio: trained weights ÷ those that are not near zero; infinite if all are."""
        return self.totals.compression_ratio

    @property
    def stored_ratio(self) -> float:
        """Dense bytes ÷ stored bytes, of all parameters."""
        return self.dense_bytes / max(1, self.stored_bytes)

    @property
    def sparsity_by_parameter(self) -> dict[str, float]:
        """The sparsity of each parameter, in [0, 1]; of frozen ones too."""
        return {count.name: count.sparsity for count in (*self.counts, *self.frozen)}

    def metrics(self, per_parameter: bool = True) -> dict[str, float]:
        """The numbers by the keys of loggers.

        A key of a parameter has one more part than those of the whole, so that no name of a parameter can collide.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
            >>> list(summarize(net, {"0.weight": net[0].weight}).metrics())
            ['sparsity/model', 'compression/ratio', 'compression/stored_ratio', 'sparsity/parameter/0.weight']
        """
        metrics = {
            "sparsity/model": self.sparsity,
            "compression/ratio": self.ratio,
            "compression/stored_ratio": self.stored_ratio,
        }
        if per_parameter:
            metrics |= {f"sparsity/parameter/{name}": value for name, value in self.sparsity_by_parameter.items()}
        return metrics

    def sentence(self) -> str:
        """The numbers of the whole model in a few words."""
        total = self.totals
        zero = f"at most {self.zero_threshold:g}" if self.zero_threshold else "zero"
        text = (
            f"{total.sparsity:.2%} of {total.weights:,} weights are {zero}: compression ratio {_times(self.ratio)}."
            f" Stored size of all parameters: {self.stored_bytes:,} of {self.dense_bytes:,} bytes,"
            f" {self.stored_bytes / max(1, self.dense_bytes):.1%}."
        )
        if self.frozen:
            frozen = totals(self.frozen)
            text += f" Not counted: {frozen.weights:,} frozen weights, of which {frozen.sparsity:.2%} are {zero}."
        return text

    def rows(self, limit: int = 20) -> list[tuple[str, ...]]:
        """The cells under ``HEADER``: the largest ``limit`` layers in their order, the others, all, and frozen ones.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
            >>> _ = torch.nn.init.zeros_(net[0].weight)
            >>> for row in summarize(net, {"0.weight": net[0].weight, "1.weight": net[1].weight}).rows(limit=1):
            ...     print(row)
            ('0.weight', '8×8', '64', '100.00%', 'bitmask', '8', '3.1%')
            ('and 1 more', '', '32', '0.00%', '', '128', '100.0%')
            ('all 2 layers', '', '96', '66.67%', '', '136', '35.4%')
        """
        largest = sorted(self.counts, key=lambda count: -count.entries)[:limit]
        rows = [
            row_of(count.name, [count], HEADER, "×".join(map(str, count.shape)), count.bytes.best_encoding)
            for count in self.counts
            if count in largest
        ]
        others = [count for count in self.counts if count not in largest]
        if others:
            rows.append(row_of(f"and {len(others)} more", others, HEADER))
        if len(self.counts) > 1:
            rows.append(row_of(f"all {len(self.counts)} layers", self.counts, HEADER))
        if self.frozen:
            rows.append(row_of(f"frozen: {len(self.frozen)}", self.frozen, HEADER))
        return rows


def summarize(module: nn.Module, weights: Mapping[str, Tensor], zero_threshold: float = 0.0) -> CompressionSummary:
    """Count the zeros of these parameters of the module, and the bytes of all its parameters.

    The weights are those that the module computes with, trained and frozen ones apart, see
    :mod:`lightning_gcsr.sparsity.computed_weights`. Every weight is counted once. Synchronizes with the host once for
    each device. If tensors are sharded over processes, all processes must call this function.
    """
    trained, frozen = counted_weights(module, weights)
    known = {id(parameter) for parameter in weights.values()}
    others = {
        f"other parameter {index}": parameter  # a name that no weight has
        for index, parameter in enumerate(module.parameters())
        if id(parameter) not in known
    }
    counts = count_tensors({**trained, **frozen, **computed_weights(module, others)}, zero_threshold)
    return CompressionSummary(
        [count for count in counts if count.name in trained],
        sum(count.bytes.dense for count in counts),
        sum(count.bytes.best for count in counts),
        zero_threshold,
        [count for count in counts if count.name in frozen],
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.1f}×" if math.isfinite(ratio) else "∞"


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """The rows under ``HEADER`` as a table in Markdown."""
    return text_table.markdown_table(HEADER, rows, _LEFT)


def print_table(rows: Sequence[Sequence[str]], title: str) -> None:
    """Print the rows under ``HEADER`` on the console."""
    text_table.print_table(HEADER, rows, _LEFT, title)
