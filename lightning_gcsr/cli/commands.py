"""What the command ``lightning-gcsr`` does: its options, and what it prints."""

from __future__ import annotations

import csv
import dataclasses
import errno
import importlib.metadata
import io
import json
import math
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save
from torch import Tensor

from lightning_gcsr.sparsity.counting import distinct_tensors
from lightning_gcsr.sparsity.state_dict_diff import Difference, differences
from lightning_gcsr.sparsity.tensor_table import SORTINGS, TensorRow, Totals, tensor_rows, totals
from lightning_gcsr.storage.atomic_write import check_target, replace_file
from lightning_gcsr.storage.compressed_file import save_compressed
from lightning_gcsr.storage.encodings import PLAIN
from lightning_gcsr.storage.weights_reader import WeightsFile, read_weights
from lightning_gcsr.validation import check_finite_number, check_integer

__all__ = ["run"]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_LONG = 120  # characters that a cell may have, or it goes on in the next line; all lines are as long as the longest
_PIECE = 4096  # without a buffer (PYTHONUNBUFFERED) Python does not say that a pipe took only a part of a text
_ANY_KIND = "a .ckpt, a state dict, a safetensors or compressed file"
_KINDS = {
    "checkpoint": "checkpoint",
    "state_dict": "state dict of torch.save",
    "safetensors": "safetensors file",
    "compressed": "compressed file",
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit code: 0 for done, 1 where the answer is no.

    Raises:
        SystemExit: Of code 2 for wrong arguments; of code 0 after ``--help`` and ``--version``.
        ValueError: For files that are not what they should be.
        OSError: For files that cannot be read or written, standard output among them.
    """
    given = _parser().parse_args(arguments)
    return _COMMANDS[given.command].function(given[given.command])


# --- options -------------------------------------------------------------------------------------------------------


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of the examples as they are."""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-gcsr",
        description="Zeros and bytes of the weights in a file, and the small file they fit in.",
        epilog="Exit codes: 0 done, 1 the answer is no (diff), 2 wrong arguments or files that cannot be used.",
        version=sys.modules["lightning_gcsr"].__version__,  # of this very code, installed or not
        formatter_class=_Help,
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in _COMMANDS.items():
        subparser = ArgumentParser(
            description=command.description, epilog=f"Example:\n  {command.example}", formatter_class=_Help
        )
        command.add_arguments(subparser)
        subparser.add_argument(
            "--max_bytes",
            type=Optional[int],
            default=None,
            help="bytes of memory that the tensors of a file may take, for one that you trust; null: 1 GiB, or a"
            " thousand times the file if that is more",
        )
        subcommands.add_subcommand(name, subparser, help=command.help)
    return parser


def _add_overwrite(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", type=bool, nargs="?", const=True, default=False, help="replace OUT where it is there already"
    )


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=str, help=_ANY_KIND)
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print JSON: the tensors and their totals")
    formats.add_argument("--csv", action="store_true", help="print CSV: a line for each tensor")
    parser.add_argument("--sort", choices=list(SORTINGS), help="by name, or the largest first; else as in the file")
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="count entries up to this magnitude as near zeros, stored as zeros"
    )


def _compress_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="IN", type=str, help=_ANY_KIND)
    parser.add_argument("output", metavar="OUT", type=str, help="the file to write, usually a .safetensors")
    _add_overwrite(parser)


def _expand_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="IN", type=str, help="a compressed file")
    parser.add_argument(
        "output", metavar="OUT", type=str, help=f"the file to write: .safetensors, or {', '.join(_TORCH_SUFFIXES)}"
    )
    _add_overwrite(parser)


def _diff_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("left", metavar="A", type=str, help=_ANY_KIND)
    parser.add_argument("right", metavar="B", type=str, help="another one, of any of these kinds")
    parser.add_argument("--exact", action="store_true", help="compare bits: −0.0 differs from 0.0, and NaNs may differ")


# --- report --------------------------------------------------------------------------------------------------------


def _report(given: Namespace) -> int:
    check_finite_number("threshold", given.threshold, minimum=0.0)
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed", "standard output")
    file = _read(given.file, given.max_bytes)
    rows = tensor_rows(file.tensors, given.threshold)
    total = totals(rows)
    if given.sort is not None:
        rows.sort(key=SORTINGS[given.sort])  # type: ignore[arg-type]  # each gives keys of one type
    if file.other_values:
        _note(f"{file.path}: left out what is no tensor: {_listed(file.other_values)}")
    if given.json:
        _write(_json(file, rows, total, given.threshold))
    elif given.csv:
        _write(_csv(rows))
    else:
        _write(_tables(file, rows, total, given.threshold))
    return 0


def _record(row: TensorRow) -> dict[str, Any]:
    """What the formats for machines have of a tensor, in this order."""
    record = {}
    for key, value in dataclasses.asdict(row).items():
        record[key] = value
        if key == "zeros":
            record["sparsity"] = row.sparsity
    return record


def _json(file: WeightsFile, rows: list[TensorRow], total: Totals, threshold: float) -> str:
    contents = {
        "file": file.path,
        "kind": file.kind,
        "threshold": threshold,
        "tensors": [_record(row) for row in rows],
        "totals": {
            **dataclasses.asdict(total),
            "sparsity": total.sparsity,
            "compression": total.compression if math.isfinite(total.compression) else None,  # JSON has no infinity
            "file_bytes": file.size,
        },
    }
    return json.dumps(contents, indent=2, allow_nan=False) + "\n"


def _csv(rows: list[TensorRow]) -> str:
    stream = io.StringIO()
    names = list(_record(TensorRow("", (), "", 0, 0, 0, 0, None, None, 0, 0, "", None)))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_record(row) | {"shape": "x".join(map(str, row.shape))} for row in rows)
    return stream.getvalue()


def _tables(file: WeightsFile, rows: list[TensorRow], total: Totals, threshold: float) -> str:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("tensor", overflow="fold", max_width=_LONG)
    table.add_column("shape", overflow="fold", max_width=_LONG)
    table.add_column("type", no_wrap=True)
    numbers = ["weights", "zeros", "share", *(["near zeros"] if threshold else []), "empty rows", "empty columns"]
    for column in (*numbers, "dense", "stored"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("form", no_wrap=True)
    for row in rows:
        near = [f"{row.near_zeros:,}"] if threshold else []
        cells = [_shape(row), row.dtype, f"{row.weights:,}", f"{row.zeros:,}", f"{row.sparsity:.2%}", *near]
        cells += ["" if count is None else f"{count:,}" for count in (row.empty_rows, row.empty_columns)]
        cells += [f"{row.dense_bytes:,}", f"{row.stored_bytes:,}", row.form]
        table.add_row(*(Text(cell) for cell in (_shown(row.name), *cells)))
    tied = len(rows) - total.tensors
    pairs = [
        ("tensors", f"{total.tensors:,}" + (f", and {tied:,} tied to them" if tied else "")),
        ("weights", f"{total.weights:,}"),
        ("zeros", f"{total.zeros:,} ({total.sparsity:.2%})"),
        *([("−0.0", f"{total.negative_zeros:,} of the zeros, stored as values")] if total.negative_zeros else []),
        *([("near zeros", f"{total.near_zeros:,} up to {threshold:g}")] if threshold else []),
        ("compression", _ratio(total.compression) if total.weights else "no weights"),
        ("dense bytes", f"{total.dense_bytes:,}"),
        ("stored bytes", f"{total.stored_bytes:,} ({_share(total.stored_bytes, total.dense_bytes)})"),
        ("file bytes", f"{file.size:,}"),
    ]
    text = f"{_shown(file.path)}: {_KINDS[file.kind]}\n\n"
    if rows:
        text += _fitted(table, [_lines(row, threshold) for row in rows]) + "\n"
    for row in rows:
        if row.tied_to is not None:
            text += f"{_shown(row.name)} is tied to {_shown(row.tied_to)}, and counted once in the totals.\n"
    return text + ("\n" if tied else "") + _aligned(pairs)


def _lines(row: TensorRow, threshold: float) -> str:
    """A row for a terminal that is too narrow for the table."""
    near = f", {row.near_zeros:,} near zeros" if threshold else ""
    text = f"{_shown(row.name)}\n  {_shape(row)} {row.dtype}: {row.weights:,} weights\n"
    text += f"  {row.zeros:,} zeros ({row.sparsity:.2%}){near}\n"
    if row.empty_rows is not None:
        text += f"  {row.empty_rows:,} empty rows, {row.empty_columns:,} empty columns\n"
    return text + f"  {row.dense_bytes:,} bytes dense, {row.stored_bytes:,} stored ({row.form})\n"


def _shape(row: TensorRow) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


# --- compress and expand -------------------------------------------------------------------------------------------


def _compress(given: Namespace) -> int:
    _check_output(given)
    file = _read(given.file, given.max_bytes)
    _check_complete(file)
    _save(given.output, lambda: save_compressed(file.tensors, given.output))
    text = ""
    if file.other_keys:
        text += f"Only the weights of the checkpoint are kept, not {_listed(file.other_keys)}.\n"
    with open(given.output, "rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    size = os.path.getsize(given.output)
    dense = _bytes(distinct_tensors(file.tensors.items()).values())
    pairs = [
        ("dense bytes", f"{dense:,}"),
        ("stored bytes", f"{size - header:,} ({_share(size - header, dense)})"),
        ("file bytes", f"{size:,} ({_share(size, dense)})"),
        ("ratio", _ratio(dense / size)),
    ]
    _write(f"{_shown(given.output)}: written from {_shown(file.path)}, {_KINDS[file.kind]}\n{text}\n{_aligned(pairs)}")
    return 0


def _expand(given: Namespace) -> int:
    suffix = os.path.splitext(given.output)[1].lower()
    if suffix != ".safetensors" and suffix not in _TORCH_SUFFIXES:
        raise ValueError(
            f"{given.output}: the suffix says what to write: .safetensors, or {', '.join(_TORCH_SUFFIXES)} for a file"
            " of torch.save"
        )
    _check_output(given)
    file = _read(given.file, given.max_bytes)
    if file.kind != "compressed":
        raise ValueError(f"{file.path}: this is not a compressed file, but a {_KINDS[file.kind]}")
    tied = [name for name in file.tensors if name not in distinct_tensors(file.tensors.items())]
    _save(given.output, lambda: replace_file(given.output, _expanded(file.tensors, suffix)))
    size = os.path.getsize(given.output)
    text = f"{_shown(given.output)}: {size:,} bytes, written from the {file.size:,} of {_shown(file.path)}\n"
    if tied and suffix == ".safetensors":
        text += f"Tied tensors cannot be in such a file; these are copies now: {_listed(tied)}.\n"
    _write(text)
    return 0


def _expanded(tensors: dict[str, Tensor], suffix: str) -> bytes:
    """The bytes of the plain file."""
    if suffix == ".safetensors":
        for name, tensor in tensors.items():
            if tensor.dtype not in PLAIN:
                raise ValueError(f"tensor {name!r}: safetensors has no {tensor.dtype}. Give OUT the suffix .pt.")
            if name == "__metadata__":
                raise ValueError(f"tensor {name!r}: safetensors keeps the name for itself. Give OUT the suffix .pt.")
        return save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    stream = io.BytesIO()
    if suffix == ".ckpt":  # what Lightning needs at least for load_from_checkpoint
        torch.save(
            {"state_dict": tensors, "pytorch-lightning_version": importlib.metadata.version("lightning")}, stream
        )
    else:
        torch.save(tensors, stream)
    return stream.getvalue()


def _check_output(given: Namespace) -> None:
    """Refuse what cannot be written before anything is read."""
    check_target(given.output)
    if os.path.exists(given.output) and not given.overwrite:
        raise ValueError(f"{given.output}: this is there already. Replace it with --overwrite true.")


def _save(path: str, write: Callable[[], None]) -> None:
    """Let errors name the file that was to be written, not the one that its bytes wait in."""
    try:
        write()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from error


def _check_complete(file: WeightsFile) -> None:
    """Refuse a state dict that also holds something else, which would be lost."""
    if file.other_values:
        raise ValueError(
            f"{file.path}: its state dict holds {_listed(file.other_values)}, which is no tensor. Leave it out."
        )


# --- diff ----------------------------------------------------------------------------------------------------------


def _diff(given: Namespace) -> int:
    left, right = _read(given.left, given.max_bytes), _read(given.right, given.max_bytes)
    for file in (left, right):
        _check_complete(file)
    found = differences(left.tensors, right.tensors, given.exact)
    if not found:
        _write(f"No difference in {len(left.tensors):,} tensors.\n")
        return 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("tensor", overflow="fold", max_width=_LONG)
    table.add_column("what", overflow="fold", max_width=_LONG)
    for column in ("differing", "of", "largest", "zero to nonzero", "nonzero to zero"):
        table.add_column(column, justify="right", no_wrap=True)
    for difference in found:
        cells = [_shown(difference.name), _what(difference)]
        if difference.differing:
            cells += [f"{difference.differing:,}", f"{difference.weights:,}", f"{difference.largest:.3g}"]
            cells += [f"{difference.to_nonzero:,}", f"{difference.to_zero:,}"]
        table.add_row(*map(Text, cells))
    common = len(left.tensors.keys() & right.tensors.keys())
    equal = common - sum(bool(difference.left and difference.right) for difference in found)
    text = f"A  {_shown(left.path)}\nB  {_shown(right.path)}\n\n{_fitted(table, list(map(_sentences, found)))}\n"
    _write(f"{text}{len(found):,} differ, {equal:,} are equal.\n")
    return 1


def _what(difference: Difference) -> str:
    if not difference.right:
        return f"only in A: {difference.left}"
    if not difference.left:
        return f"only in B: {difference.right}"
    if difference.left != difference.right:
        return f"{difference.left} in A, {difference.right} in B"
    return difference.left


def _sentences(difference: Difference) -> str:
    """A difference for a terminal that is too narrow for the table."""
    text = f"{_shown(difference.name)}\n  {_what(difference)}\n"
    if difference.differing:
        text += f"  {difference.differing:,} of {difference.weights:,} differ, by {difference.largest:.3g} at most\n"
        text += f"  {difference.to_nonzero:,} zeros became nonzero, {difference.to_zero:,} nonzeros zero\n"
    return text


# --- reading and printing ------------------------------------------------------------------------------------------


def _read(path: str, max_bytes: int | None) -> WeightsFile:
    if max_bytes is not None:
        check_integer("max_bytes", max_bytes, minimum=0)
    return read_weights(path, max_bytes)


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _ratio(value: float) -> str:
    return f"{value:,.{1 if value >= 10 else 2}f}" if math.isfinite(value) else "all are zero"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} of dense" if whole else "nothing to store"


def _listed(names: Sequence[str]) -> str:
    """The first few of the names."""
    shown = [_shown(name) for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else "")


def _shown(text: str) -> str:
    """Without what would be a command to the terminal, or make text look other than it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _aligned(pairs: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs) + 2
    return "".join(f"{name:<{width}}{value}\n" for name, value in pairs)


def _fitted(table: Table, narrow: list[str]) -> str:
    """The table, as wide as it is where nobody looks at it; on a terminal too narrow for it, the other text."""
    console = Console(file=sys.stdout, highlight=False)
    width = console.measure(table, options=console.options.update(max_width=1 << 20)).maximum
    if console.is_terminal and width > console.width:
        return "".join(narrow)
    console = Console(file=sys.stdout, highlight=False, width=width)
    with console.capture() as capture:  # rich would end the process where the reader of a pipe has gone
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _write(text: str) -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names are in any language
        for start in range(0, len(text), _PIECE):
            sys.stdout.write(text[start : start + _PIECE])
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:  # or Python fails again, at the end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(error.errno, error.strerror, "standard output") from error


def _note(text: str) -> None:
    if sys.stderr is not None:
        print(f"lightning-gcsr: {text}", file=sys.stderr)


class _Command(NamedTuple):
    function: Callable[[Namespace], int]
    add_arguments: Callable[[ArgumentParser], None]
    help: str
    description: str
    example: str


_COMMANDS = {
    "report": _Command(
        _report,
        _report_arguments,
        "the zeros and bytes of each tensor in a file",
        "The zeros, empty rows and columns, and bytes of each tensor in a file, and their totals.",
        "lightning-gcsr report model.ckpt --sort stored",
    ),
    "compress": _Command(
        _compress,
        _compress_arguments,
        "write the weights of a file into a compressed one",
        "Write the weights of a file into a compressed one, exact to the bit. Of a checkpoint nothing else is kept.",
        "lightning-gcsr compress model.ckpt model.safetensors",
    ),
    "expand": _Command(
        _expand,
        _expand_arguments,
        "write a compressed file as a plain one",
        "Write a compressed file as a plain one: safetensors, or a state dict of torch.save; a .ckpt holds it as"
        " Lightning's checkpoints do.",
        "lightning-gcsr expand model.safetensors model.pt",
    ),
    "diff": _Command(
        _diff,
        _diff_arguments,
        "which tensors of two files differ",
        "Which tensors of two files differ, and by how much. NaN equals NaN. The exit code is 0 if none does, else 1.",
        "lightning-gcsr diff model.ckpt model.safetensors",
    ),
}
