"""The figures that users ask for: without pyplot, which would keep them, and shown in notebooks all the same."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure"]


def new_figure(what: str, width: float, height: float) -> Figure:
    """An empty figure, which a notebook shows as an image.

    Args:
        what: The method that draws, for the message.
        width: In inches.
        height: In inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"`{what}` draws with matplotlib, which is not installed: pip install matplotlib.")
    return _figure_class()(figsize=(width, height), layout="constrained")


@cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure  # an extra

    class ShownFigure(Figure):
        """A notebook shows figures of pyplot alone, unless they say how."""

        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    return ShownFigure
