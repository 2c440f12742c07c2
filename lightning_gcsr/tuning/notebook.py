"""Results in a notebook: a heading, a table and a figure as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_html"]


def as_html(heading: str, header: Sequence[str], rows: Iterable[Sequence[str]], figure: Optional[Figure]) -> str:
    """A heading, a table and a figure that is embedded as PNG, for ``_repr_html_``.

    Example:
        >>> as_html("2 < 3", ["a"], [["1"]], None)
        '<p>2 &lt; 3</p><table><tr><th>a</th></tr><tr><td>1</td></tr></table>'
    """
    lines = [("th", header), *(("td", row) for row in rows)]
    table = "".join(f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>" for tag, cells in lines)
    html = f"<p>{escape(heading)}</p><table>{table}</table>"
    if figure is None:
        return html
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return (
        f'{html}<img alt="{escape(heading)}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
    )
