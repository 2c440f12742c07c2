"""``lightning-gcsr diff``: which tensors of two files differ, and by how much."""

from __future__ import annotations

from argparse import Namespace

from lightning_gcsr.cli.console import check_complete, fitted, printable, read, write
from lightning_gcsr.sparsity.state_dict_diff import Difference, differences

__all__ = ["run"]

_HEADER = ("tensor", "what", "differing", "of", "largest", "zero to nonzero", "nonzero to zero")
_LEFT = ("tensor", "what")


def run(given: Namespace) -> int:
    """Print the differences and return the exit code: 0 if there are none, else 1."""
    left, right = read(given.left, given.max_bytes), read(given.right, given.max_bytes)
    for file in (left, right):
        check_complete(file)
    found = differences(left.tensors, right.tensors, given.exact)
    if not found:
        write(f"No difference in {len(left.tensors):,} tensors.\n")
        return 0
    table = fitted(_HEADER, [_cells(difference) for difference in found], _LEFT, list(map(_lines, found)))
    common = len(left.tensors.keys() & right.tensors.keys())
    equal = common - sum(bool(difference.left and difference.right) for difference in found)
    text = f"A  {printable(left.path)}\nB  {printable(right.path)}\n\n{table}\n"
    write(f"{text}{len(found):,} differ, {equal:,} are equal.\n")
    return 1


def _cells(difference: Difference) -> list[str]:
    cells = [difference.name, _what(difference)]
    if not difference.differing:
        return [*cells, *[""] * 5]
    cells += [f"{difference.differing:,}", f"{difference.weights:,}", f"{difference.largest:.3g}"]
    return [*cells, f"{difference.to_nonzero:,}", f"{difference.to_zero:,}"]


def _what(difference: Difference) -> str:
    if not difference.right:
        return f"only in A: {difference.left}"
    if not difference.left:
        return f"only in B: {difference.right}"
    if difference.left != difference.right:
        return f"{difference.left} in A, {difference.right} in B"
    return difference.left


def _lines(difference: Difference) -> str:
    """A difference for a terminal that is too narrow for the table."""
    text = f"{printable(difference.name)}\n  {_what(difference)}\n"
    if difference.differing:
        text += f"  {difference.differing:,} of {difference.weights:,} differ, by {difference.largest:.3g} at most\n"
        text += f"  {difference.to_nonzero:,} zeros became nonzero, {difference.to_zero:,} nonzeros zero\n"
    return text
