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


def draw(
    trials: Sequence[Trial], front: Sequence[Trial], suggested: Optional[Trial], metric: str, baseline: float
) -> Figure:
    """The metric against the compression, each trial with what was asked for; a cross is a trial that failed.

    Args:
        trials: All trials, that without a penalty among them.
        front: Those worth choosing among, which a line connects.
        suggested: The one to mark.
        metric: The name of the metric.
        baseline: The metric of a model that knows nothing.
    """
    figure = new_figure("StrengthFinderResult.plot", 7, 4.5)
    panel = figure.subplots()
    for trial in trials:
        if trial.is_reference:
            panel.axhline(trial.metric, color="tab:gray", linewidth=1, label="no penalty")
    panel.axhline(baseline, color="tab:gray", linewidth=1, linestyle=":", label="nothing learned")
    panel.plot([t.compression for t in front], [t.metric for t in front], color="tab:red", label="trade-off")
    shown = [t for t in trials if not t.is_reference and math.isfinite(t.metric) and math.isfinite(t.compression)]
    for trial in shown:
        panel.plot(trial.compression, trial.metric, color="tab:red", marker="o" if trial.learned else "x")
        text = f"{trial.asked:.3g}" if trial.target_sparsity is None else f"{100 * trial.asked:g} %"
        panel.annotate(
            text, (trial.compression, trial.metric), (0, 6), textcoords="offset points", fontsize="small", ha="center"
        )
    if suggested is not None and math.isfinite(suggested.compression):
        panel.axvline(suggested.compression, color="black", linestyle="--", label=f"suggested: {suggested.setting}")
    asked = "strength" if any(trial.strength for trial in trials) else "target sparsity"
    panel.set(xlabel=f"compression (weights ÷ nonzeros), labelled with the {asked}", ylabel=metric)
    values = [*(t.metric for t in trials if math.isfinite(t.metric)), baseline]
    if min(values) > 0 and max(values) > 20 * min(values):
        panel.set_yscale("log")
    if shown:
        panel.set_xscale("log")
    panel.margins(y=0.12)
    panel.legend(fontsize="small")
    return figure
