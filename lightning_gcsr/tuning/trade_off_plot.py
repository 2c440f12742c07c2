"""The figure of a search for a strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from lightning_gcsr.callbacks.reporting.drawing import new_figure
from lightning_gcsr.tuning.trade_off import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(trials: Sequence[Trial], front: Sequence[Trial], suggested: Optional[Trial], metric: str) -> Figure:
    """The metric against the compression of each trial that learned; of others it would only stretch the scale.

    Args:
        trials: All trials, that without a penalty among them.
        front: Those worth choosing among, which a line connects.
        suggested: The one to mark.
        metric: The name of the metric.
    """
    figure = new_figure("StrengthFinderResult.plot", 7, 4.5)
    panel = figure.subplots()
    for trial in trials:
        if trial.is_reference:
            panel.axhline(trial.metric, color="tab:gray", linewidth=1, label="no penalty")
    panel.plot([t.compression for t in front], [t.metric for t in front], color="tab:red", label="trade-off")
    shown = [t for t in trials if t.learned and not t.is_reference and math.isfinite(t.compression)]
    for trial in shown:
        point = trial.compression, trial.metric
        panel.plot(*point, color="tab:red", marker="o")
        text = f"{trial.asked:.3g}" if trial.target_sparsity is None else f"{100 * trial.asked:g} %"
        panel.annotate(text, point, (6, 6), textcoords="offset points", fontsize="small")
    if suggested is not None and math.isfinite(suggested.compression):
        panel.axvline(suggested.compression, color="black", linestyle="--", label=f"suggested: {suggested.setting}")
    asked = "strength" if any(trial.strength for trial in trials) else "target sparsity"
    panel.set(xlabel=f"compression (weights ÷ nonzeros), labelled with the {asked}", ylabel=metric)
    values = [trial.metric for trial in shown]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        panel.set_yscale("log")
    if shown:
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xticks([t.compression for t in front], [f"{t.compression:.3g}×" for t in front])
    panel.margins(x=0.1, y=0.15)
    panel.legend(fontsize="small")
    return figure
