"""The figure of a search for a strength."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from matplotlib.figure import Figure

__all__ = ["draw"]

_COLORS = {"coherent": "tab:red", "plain": "tab:orange"}


def draw(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    baseline: float,
    levels: Mapping[str, tuple[Optional[float], Optional[float]]],
    suggested: Optional[float],
) -> Figure:
    """Metric above, share of zero weights below, both against strength; a cross is a trial that failed.

    Args:
        rows: The table of the result.
        metric: The name of the metric, a column of it.
        baseline: The metric of a model that knows nothing.
        levels: For each method the largest strength that learned and the smallest above it that failed.
        suggested: The strength to mark.
    """
    figure = Figure(figsize=(8, 6.5), layout="constrained")  # without pyplot, which would keep it
    above, below = figure.subplots(2, 1, sharex=True)
    shown = [row[metric] for row in rows if math.isfinite(row[metric])]
    reference = next((row[metric] for row in rows if row["method"] == "none"), None)
    if reference is not None:
        above.axhline(reference, color="tab:gray", linewidth=1, label="no penalty")
    above.axhline(baseline, color="tab:gray", linewidth=1, linestyle=":", label="nothing learned")
    for method, (learned_at, failed_at) in levels.items():
        color = _COLORS[method]
        label = "with the gate" if method == "coherent" else "plain, without a gate"
        of_method = [row for row in rows if row["method"] == method and math.isfinite(row[metric])]
        for panel, values in (
            (above, [row[metric] for row in of_method]),
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
            if failed_at is not None:
                panel.axvspan(learned_at or failed_at, failed_at, color=color, alpha=0.25)
        if failed_at is not None:
            below.plot([], [], color=color, alpha=0.25, linewidth=8, label=f"the cliff, {label}")
    if suggested is not None:
        for panel in (above, below):
            panel.axvline(suggested, color="black", linestyle="--", label=f"suggested: {suggested:.3g}")
    above.set(ylabel=metric)
    spread = [*shown, baseline]
    if min(spread) > 0 and max(spread) > 20 * min(spread):
        above.set_yscale("log")
    below.set(xlabel="strength", ylabel="zero weights in %", ylim=(-3, 103))
    if any(row["strength"] > 0 for row in rows):
        below.set_xscale("log")
    above.legend(fontsize="small")
    below.legend(fontsize="small")
    return figure
