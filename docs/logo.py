"""Draws the logo of the documentation: a matrix of weights, most of which are zero.

python docs/logo.py
"""

from __future__ import annotations

from pathlib import Path

CELL, GAP, SIDE = 18, 6, 5
KEPT = {(0, 1): "#e8590c", (1, 3): "#1971c2", (2, 0): "#1971c2", (3, 2): "#e8590c", (4, 4): "#1971c2"}
"""The weights that are left, by row and column: positive ones in one color, negative ones in the other."""


def svg() -> str:
    """The logo; the faint cells can be seen on white and on black."""
    size = SIDE * CELL + (SIDE + 1) * GAP
    cells = []
    for row in range(SIDE):
        for column in range(SIDE):
            x, y = (GAP + place * (CELL + GAP) for place in (column, row))
            color = KEPT.get((row, column))
            look = f'fill="{color}"' if color else 'fill="#868e96" fill-opacity="0.22"'
            cells.append(f'  <rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="4" {look}/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}">'
    return "\n".join([head, "  <title>lightning-gcsr</title>", *cells, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "_static" / "logo.svg").write_text(svg())
