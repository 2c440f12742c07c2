"""``lightning-gcsr report``: the zeros and the sizes of the tensors in a file."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from lightning_gcsr.cli.console import KINDS, aligned, fitted, listed, note, printable, read, write
from lightning_gcsr.sparsity.tensor_table import CELLS, TensorRow, Totals, tensor_rows, totals
from lightning_gcsr.storage.weights_reader import WeightsFile
from lightning_gcsr.validation import check_finite_number

__all__ = ["SORT_KEYS", "run"]

SORT_KEYS: dict[str, Callable[[TensorRow], Any]] = {
    "name": lambda row: row.name,
    "weights": lambda row: -row.entries,
    "zeros": lambda row: -row.zeros,
    "sparsity": lambda row: -row.sparsity,
    "dense": lambda row: -row.dense_bytes,
    "stored": lambda row: -row.stored_bytes,
}
"""For ``sorted``: names in alphabetical order, numbers with the largest first."""
_LEFT = ("tensor", "shape", "type", "encoding")


def run(given: Namespace) -> int:
    """Print the report and return the exit code."""
    check_finite_number("threshold", given.threshold, minimum=0.0)
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed", "standard output")
    file = read(given.file, given.max_bytes)
    rows = tensor_rows(file.tensors, given.threshold)
    total = totals(row for row in rows if row.tied_to is None)
    if given.sort is not None:
        rows.sort(key=SORT_KEYS[given.sort])
    if file.other_values:
        note(f"{file.path}: left out, since they are not tensors: {listed(file.other_values)}")
    if given.json:
        write(_json(file, rows, total, given.threshold))
    elif given.csv:
        write(_csv(rows))
    else:
        write(_text(file, rows, total, given.threshold))
    return 0


def _record(row: TensorRow) -> dict[str, Any]:
    """A tensor in the formats for machines, in this order."""
    return {
        "name": row.name,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "weights": row.entries,
        "zeros": row.zeros,
        "near_zeros": row.near_zeros,
        "sparsity": row.sparsity,
        "empty_rows": row.empty_rows,
        "empty_columns": row.empty_columns,
        "dense_bytes": row.dense_bytes,
        "stored_bytes": row.stored_bytes,
        "encoding": row.encoding,
        "tied_to": row.tied_to,
    }


def _json(file: WeightsFile, rows: list[TensorRow], total: Totals, threshold: float) -> str:
    ratio = total.compression_ratio
    contents = {
        "file": file.path,
        "kind": file.kind,
        "threshold": threshold,
        "tensors": [_record(row) for row in rows],
        "totals": {
            **dataclasses.asdict(total),
            "sparsity": total.sparsity,
            "compression_ratio": ratio if math.isfinite(ratio) else None,  # JSON has no infinity
            "file_bytes": file.size,
        },
    }
    return json.dumps(contents, indent=2, allow_nan=False) + "\n"


def _csv(rows: list[TensorRow]) -> str:
    stream = io.StringIO()
    names = list(_record(TensorRow("", (), 0, 0, 0, "", None, None, None)))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_record(row) | {"shape": "x".join(map(str, row.shape))} for row in rows)
    return stream.getvalue()


def _text(file: WeightsFile, rows: list[TensorRow], total: Totals, threshold: float) -> str:
    near = ["near zeros"] if threshold else []
    header = ["tensor", "shape", "type", "weights", "zeros", *near, "sparsity", "empty rows", "empty columns"]
    header += ["dense size", "stored size", "encoding"]
    text = f"{printable(file.path)}: {KINDS[file.kind]}\n\n"
    if rows:
        cells = [_cells(row, header) for row in rows]
        text += fitted(header, cells, _LEFT, [_lines(row, threshold) for row in rows]) + "\n"
    tied = [row for row in rows if row.tied_to is not None]
    for row in tied:
        text += f"{printable(row.name)} is tied to {printable(row.tied_to or '')}, and counted once in the totals.\n"
    ratio = f"{total.compression_ratio:,.{1 if total.compression_ratio >= 10 else 2}f}"
    pairs = [
        ("tensors", f"{total.tensors:,}" + (f", and {len(tied):,} tied to them" if tied else "")),
        ("weights", f"{total.weights:,}"),
        ("zeros", f"{total.zeros:,}"),
        *([("near zeros", f"{total.near_zeros:,} up to {threshold:g}")] if threshold else []),
        ("sparsity", f"{total.sparsity:.2%}" if total.weights else "no weights"),
        ("compression ratio", ratio if math.isfinite(total.compression_ratio) else "all are zero"),
        ("dense size", f"{total.dense_bytes:,} bytes"),
        ("stored size", f"{total.stored_bytes:,} bytes ({CELLS['of dense'](total)} of dense)"),
        ("file size", f"{file.size:,} bytes"),
    ]
    if not total.weights:
        pairs = [pair for pair in pairs if pair[0] != "compression ratio"]
    return text + ("\n" if tied else "") + aligned(pairs)


def _cells(row: TensorRow, header: list[str]) -> list[str]:
    total = totals([row])
    text = {
        "tensor": row.name,
        "shape": _shape(row),
        "type": row.dtype,
        "empty rows": "" if row.empty_rows is None else f"{row.empty_rows:,}",
        "empty columns": "" if row.empty_columns is None else f"{row.empty_columns:,}",
        "dense size": f"{row.dense_bytes:,}",
        "stored size": f"{row.stored_bytes:,}",
        "encoding": row.encoding,
    }
    return [text[column] if column in text else CELLS[column](total) for column in header]


def _lines(row: TensorRow, threshold: float) -> str:
    """A row for a terminal that is too narrow for the table."""
    near = f", {row.near_zeros:,} near zeros" if threshold else ""
    text = f"{printable(row.name)}\n  {_shape(row)} {row.dtype}: {row.entries:,} weights\n"
    text += f"  {row.zeros:,} zeros{near}: sparsity {row.sparsity:.2%}\n"
    if row.empty_rows is not None:
        text += f"  {row.empty_rows:,} empty rows, {row.empty_columns:,} empty columns\n"
    return text + f"  dense size {row.dense_bytes:,}, stored size {row.stored_bytes:,} ({row.encoding})\n"


def _shape(row: TensorRow) -> str:
    return "x".join(map(str, row.shape)) or "scalar"
