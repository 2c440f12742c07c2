"""Tables as text: aligned, in Markdown, or by rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table", "plain_table", "print_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> str:
    r"""A table in Markdown; the columns ``left`` are aligned to the left, the others to the right.

    Example:
        >>> print(markdown_table(["layer", "weights"], [("a|b", "4")], left=["layer"]))
        | layer | weights |
        | --- | ---: |
        | a\|b | 4 |
    """
    rule = ["---" if column in left else "---:" for column in header]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str], rule: bool = False) -> str:
    """A table as aligned text, with a line under the header if ``rule``.

    Example:
        >>> print(plain_table(["layer", "weights"], [("a", "4")], left=["layer"]))
        layer  weights
        a            4
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    if rule:
        text.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str], title: str) -> None:
    """Print a table on the console: by rich if it is installed, else as plain text."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title}\n{plain_table(header, rows, left)}")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in header:
        if column in left:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Names of layers are not markup. In a file, lines may be of any length: the width of a terminal means nothing.
    console = Console(markup=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, len(plain_table(header, rows, left).partition("\n")[0]) + 20)
    console.print(title, soft_wrap=True)
    console.print(table)
