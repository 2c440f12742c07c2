"""The figure of a search for a strength."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Optional

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from lightning_gcsr.finder_result import StrengthFinderResult, Suggestion

__all__ = ["draw"]

_COLORS = {"coherent": "tab:red", "plain": "tab:orange"}


def draw(result: StrengthFinderResult, suggestion: Optional[Suggestion] = None) -> Figure:
    """Metric above, share of zero weights below, both against strength; a cross is a trial that failed."""
    if suggestion is None:
        with contextlib.suppress(ValueError):  # there is none; what was tried is worth a look all the same
            suggestion = result.suggestion()
    figure = Figure(figsize=(8, 6.5), layout="constrained")  # without pyplot, which would keep it
    above, below = figure.subplots(2, 1, sharex=True)
    rows = result.table
    shown = [row[result.metric] for row in rows if math.isfinite(row[result.metric])]
    reference = next((row[result.metric] for row in rows if row["method"] == "none"), None)
    if reference is not None:
        above.axhline(reference, color="tab:gray", linewidth=1, label="no penalty")
    above.axhline(result.untrained, color="tab:gray", linewidth=1, linestyle=":", label="before training")
    levels = {"coherent": result.tolerance_level}
    if any(row["method"] == "plain" for row in rows):
        levels["plain"] = result.plain_tolerance_level
    for method, level in levels.items():
        color = _COLORS[method]
        label = "with the gate" if method == "coherent" else "plain, without a gate"
        of_method = [row for row in rows if row["method"] == method and math.isfinite(row[result.metric])]
        for panel, values in (
            (above, [row[result.metric] for row in of_method]),
            (below, [100 * row["sparsity"] for row in of_method]),
        ):
            strengths = [row["strength"] for row in of_method]
            panel.plot(strengths, values, color=color, linewidth=1.5, label=label)
            for learned, marker in ((True, "o"), (False, "x")):
                points = [
                    (s, v) for s, v, row in zip(strengths, values, of_method, strict=True) if row["learned"] is learned
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle="none")
            if level.failed is not None:
                panel.axvspan((level.strength or level.failed), level.failed, color=color, alpha=0.25)
        if level.failed is not None:
            below.plot([], [], color=color, alpha=0.25, linewidth=8, label=f"the cliff, {label}")
    if suggestion is not None:
        for panel in (above, below):
            panel.axvline(
                suggestion.strength, color="black", linestyle="--", label=f"suggested: {suggestion.strength:.3g}"
            )
    above.set(ylabel=result.metric)
    spread = [*shown, result.untrained]
    if min(spread) > 0 and max(spread) > 20 * min(spread):
        above.set_yscale("log")
    below.set(xlabel="strength", ylabel="zero weights in %", ylim=(-3, 103))
    if any(row["strength"] > 0 for row in rows):
        below.set_xscale("log")
    above.legend(fontsize="small")
    below.legend(fontsize="small")
    return figure
