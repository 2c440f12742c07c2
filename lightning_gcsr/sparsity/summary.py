"""How sparse a model is and what it takes to store: the numbers, and a table with a row for each of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_gcsr.sparsity.counting import TensorCount, count_tensors, module_bytes

__all__ = ["CompressionSummary", "markdown_table", "plain_table", "print_table", "summarize"]

HEADER = ("layer", "shape", "weights", "zero", "stored as", "bytes", "of dense")
_LEFT = ("layer", "shape", "stored as")


@dataclass(frozen=True)
class CompressionSummary:
    """What was counted in a model at one moment."""

    counts: Sequence[TensorCount]
    """Of the weights that are looked at, tied ones once."""
    dense_bytes: int
    """Of all parameters, biases and norms too."""
    stored_bytes: int
    """The same, each parameter in its smallest stored form."""
    zero_threshold: float = 0.0
    """The magnitude up to which a weight counted as zero."""

    @property
    def sparsity(self) -> float:
        """The share of weights that are near zero, in [0, 1]."""
        return _zeros(self.counts) / max(1, _weights(self.counts))

    @property
    def ratio(self) -> float:
        """Weights ÷ weights that are not near zero; infinite when all are."""
        kept = _weights(self.counts) - _zeros(self.counts)
        return _weights(self.counts) / kept if kept else math.inf

    @property
    def stored_ratio(self) -> float:
        """Dense bytes ÷ stored bytes, of all parameters."""
        return self.dense_bytes / max(1, self.stored_bytes)

    @property
    def sparsity_by_parameter(self) -> dict[str, float]:
        """The share of near zeros of each parameter, in [0, 1]."""
        return {count.name: count.near_zeros / max(1, count.entries) for count in self.counts}

    def sentence(self) -> str:
        """The numbers of the whole model in one line."""
        zero = f"at most {self.zero_threshold:g}" if self.zero_threshold else "zero"
        return (
            f"{self.sparsity:.2%} of {_weights(self.counts):,} weights are {zero}: compression {_times(self.ratio)}."
            f" All parameters take {self.stored_bytes:,} of {self.dense_bytes:,} bytes: {_times(self.stored_ratio)}"
            " smaller."
        )

    def rows(self, limit: int = 20) -> list[tuple[str, ...]]:
        """The cells under ``HEADER``, of the largest ``limit`` layers in their order, of the others, and of all.

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
        shown = [count for count in self.counts if count in largest]
        others = [count for count in self.counts if count not in largest]
        rows = [_row(count.name, [count], "×".join(map(str, count.shape)), count.bytes.best_form) for count in shown]
        if others:
            rows.append(_row(f"and {len(others)} more", others))
        if len(self.counts) > 1:
            rows.append(_row(f"all {len(self.counts)} layers", self.counts))
        return rows


def summarize(module: nn.Module, weights: Mapping[str, Tensor], zero_threshold: float = 0.0) -> CompressionSummary:
    """Count the zeros of these weights and the bytes of the module. Synchronizes with the host.

    Where tensors are sharded over processes, all processes must call this: it adds up.
    """
    return CompressionSummary(
        count_tensors(weights, zero_threshold), *module_bytes(module, zero_threshold), zero_threshold
    )


def _weights(counts: Iterable[TensorCount]) -> int:
    return sum(count.entries for count in counts)


def _zeros(counts: Iterable[TensorCount]) -> int:
    return sum(count.near_zeros for count in counts)


def _times(ratio: float) -> str:
    return f"{ratio:,.1f}×" if math.isfinite(ratio) else "∞"


def _row(name: str, counts: Sequence[TensorCount], shape: str = "", form: str = "") -> tuple[str, ...]:
    weights, zeros = _weights(counts), _zeros(counts)
    dense, stored = sum(count.bytes.dense for count in counts), sum(count.bytes.best for count in counts)
    return (
        name,
        shape,
        f"{weights:,}",
        f"{zeros / max(1, weights):.2%}",
        form,
        f"{stored:,}",
        f"{stored / max(1, dense):.1%}",
    )


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    r"""The rows under ``HEADER`` as a table in Markdown.

    Example:
        >>> print(markdown_table([("a|b", "2×2", "4", "0.00%", "dense", "16", "100.0%")]))
        | layer | shape | weights | zero | stored as | bytes | of dense |
        | --- | --- | ---: | ---: | --- | ---: | ---: |
        | a\|b | 2×2 | 4 | 0.00% | dense | 16 | 100.0% |
    """
    rule = ["---" if column in _LEFT else "---:" for column in HEADER]
    lines = [HEADER, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_table(rows: Iterable[Sequence[str]]) -> str:
    """The rows under ``HEADER`` as aligned text.

    Example:
        >>> print(plain_table([("a", "2×2", "4", "0.00%", "dense", "16", "100.0%")]))
        layer  shape  weights   zero  stored as  bytes  of dense
        a      2×2          4  0.00%  dense         16    100.0%
    """
    lines = [HEADER, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, cell, width in zip(HEADER, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def print_table(rows: Sequence[Sequence[str]], title: str) -> None:
    """Print the rows on the console: by rich where it is installed, and as plain text otherwise."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title}\n{plain_table(rows)}")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in HEADER:
        if column in _LEFT:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Names of layers are no markup. Into a file, lines may be as long as they are: a terminal's width means nothing.
    console = Console(markup=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, len(plain_table(rows).partition("\n")[0]) + 20)
    console.print(title, soft_wrap=True)
    console.print(table)
