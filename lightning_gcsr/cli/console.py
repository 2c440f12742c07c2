"""Reading files and writing text on the console, for all subcommands."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence

from lightning_gcsr.sparsity.text_table import plain_table
from lightning_gcsr.storage.weights_reader import WeightsFile, read_weights
from lightning_gcsr.validation import check_integer

__all__ = ["KINDS", "aligned", "check_complete", "fitted", "listed", "note", "printable", "read", "saving", "write"]

KINDS = {
    "checkpoint": "checkpoint",
    "state_dict": "state dict of torch.save",
    "safetensors": "safetensors file",
    "compressed": "compressed file",
}
_LONGEST_CELL = 120  # characters; longer ones continue in the next line
_PIECE = 4096  # without a buffer (PYTHONUNBUFFERED) Python does not say that a pipe took only a part of a text


def read(path: str, max_bytes: int | None) -> WeightsFile:
    """The weights in a file."""
    if max_bytes is not None:
        check_integer("max_bytes", max_bytes, minimum=0)
    return read_weights(path, max_bytes)


def check_complete(file: WeightsFile) -> None:
    """Refuse a state dict with values that are not tensors, which would be lost."""
    if file.other_values:
        names = listed(file.other_values)
        raise ValueError(f"{file.path}: its state dict holds {names}, which is not a tensor. Leave it out.")


def saving(path: str, write_file: Callable[[], None]) -> None:
    """Write a file, so that errors name it and not the temporary one."""
    try:
        write_file()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from error


def listed(names: Sequence[str]) -> str:
    """The first few of the names."""
    shown = [printable(name) for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else "")


def printable(text: str) -> str:
    """The text with escapes for whatever would command the terminal or disguise other text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def aligned(pairs: Sequence[tuple[str, str]]) -> str:
    """One line for each name and its value."""
    width = max(len(name) for name, _ in pairs) + 2
    return "".join(f"{name:<{width}}{value}\n" for name, value in pairs)


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str], narrow: Sequence[str]) -> str:
    """The table; on a terminal that is too narrow for it, the other text."""
    lines = [line for row in rows for line in _wrapped([printable(cell) for cell in row])]
    table = plain_table(header, lines, left, rule=True)
    width = max(map(len, table.splitlines()))
    if sys.stdout is not None and sys.stdout.isatty() and width > shutil.get_terminal_size().columns:
        return "".join(narrow)
    return f"{table}\n"


def _wrapped(row: Sequence[str]) -> list[list[str]]:
    """The row, continued in further rows where a cell is long."""
    count = max(1, *(-(-len(cell) // _LONGEST_CELL) for cell in row))
    return [[cell[i * _LONGEST_CELL : (i + 1) * _LONGEST_CELL] for cell in row] for i in range(count)]


def write(text: str) -> None:
    """Write to the standard output, in whatever encoding it has."""
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


def note(text: str) -> None:
    """Write a line to the standard error output."""
    if sys.stderr is not None:
        print(f"lightning-gcsr: {text}", file=sys.stderr)
