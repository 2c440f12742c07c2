"""The figures of the report: accuracy against compression, and against strength, at most six lines in a panel.

The colours are those of Okabe and Ito, which differ for the colour-blind; markers and dashes differ in grey, too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, also where there is no screen

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tables import BASELINE

LINES = 6
"""The most lines in a panel, without the one for no penalty."""
STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},  # blue
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},  # vermilion
    {"color": "#009E73", "marker": "D", "linestyle": "-."},  # green
    {"color": "#000000", "marker": "^", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},  # orange
    {"color": "#CC79A7", "marker": "P", "linestyle": (0, (1, 1))},  # purple
]
OWN_STYLES = {"this package": 0, "PAT, top-k": 1, "PAT, lasso": 2, "gradual pruning": 3, "plain L1": 4}
"""The methods that look the same in all figures, and their styles; the others get those that are left in a panel."""
AXES = {"compression": "compression (weights ÷ nonzeros)", "strength": "strength λ"}
MEASURES = {"test_accuracy": "test accuracy in %", "test_loss": "test cross-entropy in nats"}
_NEAR = 0.12
"""How far below the first method another one may be and still belong to a figure, relative to the best."""
TICKS = (1, 2, 4, 10, 30, 100, 300, 1_000, 3_000, 10_000)


@dataclass
class Panel:
    """The runs of one panel, summarized: the methods in the order of their styles, and no penalty."""

    title: str
    summary: pd.DataFrame
    names: Sequence[str]
    x: str
    y: str


def draw_grid(panels: Sequence[Panel], path: Path, shared_legend: bool = True) -> None:
    """Panels of equal size in up to three columns; one legend for all where their methods are the same."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend = max(sum(len(_wrapped(name).splitlines()) for name in panel.names) for panel in panels)
    height = rows * (2.9 if shared_legend else 3.6 + 0.16 * legend) + 0.5
    if shared_legend and len(panels) == rows * columns:  # the legend is below
        height += 0.25 * math.ceil(legend / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns + 0.4, height), layout="constrained", squeeze=False
    )
    try:
        for number, axis in enumerate(axes.flat):
            if number < len(panels):
                _draw_panel(axis, panels[number])
                if not shared_legend:
                    _legend_below(axis)
            else:
                axis.set_axis_off()
        if shared_legend:
            _legend(figure, list(axes.flat), len(panels))
        figure.savefig(path, dpi=150, bbox_inches="tight")  # a legend may be wider than its panel
    finally:
        plt.close(figure)


def split(title: str, summary: pd.DataFrame, x: str, y: str) -> Iterator[Panel]:
    """Panels of at most six methods each, those of one update together; the first method is in each of them."""
    methods = summary[summary["series"] != BASELINE]
    names = list(methods["series"].unique())
    if len(names) <= LINES:
        groups = [(title, names)] if names else []
    else:
        updates = methods[methods["series"] != names[0]].groupby("update", sort=False)["series"].unique()
        groups = [
            (_heading(title, str(update), start), [names[0], *of_update[start : start + LINES - 1]])
            for update, of_update in updates.items()
            for start in range(0, len(of_update), LINES - 1)
        ]
    for heading, chosen in groups:
        yield Panel(heading, summary[summary["series"].isin([*chosen, BASELINE])], chosen, x, y)


def _heading(title: str, update: str, start: int) -> str:
    """The title of a panel: the update of its methods, and which of several panels of this update it is."""
    of_update = f", {update} update".replace("_", " ") if update else ""
    return f"{title}{of_update}" + (f" ({start // (LINES - 1) + 1})" if start else "")


def _draw_panel(axis: Axes, panel: Panel) -> None:
    factor = 100 if panel.y == "test_accuracy" else 1
    better = 1 if panel.y == "test_accuracy" else -1
    baseline = panel.summary[panel.summary["series"] == BASELINE]
    height = factor * float(baseline[panel.y].iloc[0]) if len(baseline) else np.nan
    if len(baseline):
        axis.axhline(height, color="0.5", linewidth=1, zorder=1, label=BASELINE)
    lines = {}
    for name in panel.names:
        rows = panel.summary[panel.summary["series"] == name]
        rows = rows.assign(level=factor * rows[panel.y], error=factor * rows[f"{panel.y}_error"].fillna(0))
        lines[name] = rows.sort_values(panel.x)
    shown = pd.concat(lines.values())
    low, high = _x_limits(shown, lines[panel.names[0]], panel.x)
    floor, top = _y_limits(shown, lines[panel.names[0]], height, better, (low, high), panel.x)
    for number, (name, style) in enumerate(_styles(panel.names).items()):
        _draw_line(axis, lines[name], panel.x, name, style, zorder=10 - number)
        _mark_dead(axis, lines[name], panel.x, (low, high), (floor, top), better, style["color"])
    axis.set(xlim=(low, high), ylim=(floor, top), xlabel=AXES[panel.x], ylabel=MEASURES[panel.y])
    axis.set_title(_wrapped(panel.title), fontsize="medium")
    _x_axis(axis, panel.x, low, high)
    axis.grid(alpha=0.25)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The style of each method of a panel, in their order."""
    own = {name: OWN_STYLES[name] for name in names if name in OWN_STYLES}
    left = iter([number for number in reversed(range(len(STYLES))) if number not in own.values()])
    return {name: STYLES[own[name] if name in own else next(left)] for name in names}


def _draw_line(axis: Axes, rows: pd.DataFrame, x: str, name: str, style: dict[str, Any], zorder: int) -> None:
    """A line with a band of one standard error on both sides."""
    rows = rows[rows[x].notna()]
    width = 2.2 if name == "this package" else 1.3
    axis.plot(rows[x], rows["level"], label=name, linewidth=width, markersize=4.5, zorder=zorder, **style)
    axis.fill_between(
        rows[x], rows["level"] - rows["error"], rows["level"] + rows["error"], color=style["color"], alpha=0.18, lw=0
    )
    if len(rows) == 1:  # whose band has no width
        axis.errorbar(rows[x], rows["level"], yerr=rows["error"], fmt="none", ecolor=style["color"], zorder=zorder)


def _mark_dead(
    axis: Axes,
    rows: pd.DataFrame,
    x: str,
    across: tuple[float, float],
    upwards: tuple[float, float],
    better: int,
    color: str,
) -> None:
    """A mark at the edge for what lies beyond it: a triangle below the points, a cross on the right without weights."""
    floor, top = upwards
    below = rows[(better * rows["level"] < better * floor) & rows[x].between(*across)]
    triangle: dict[str, Any] = {"marker": "v", "markersize": 6, "linestyle": "", "clip_on": False, "zorder": 20}
    if len(below):  # an empty line that is not clipped has no extent, on which the layout fails
        heights = [floor + 0.05 * _marks_at(axis, value, across) * (top - floor) for value in below[x]]
        axis.plot(below[x], heights, color=color, markerfacecolor="white", **triangle)
    if x == "compression" and rows[x].isna().any():
        crosses = sum(line.get_marker() == "X" for line in axis.lines)
        stacked = floor + (0.03 + 0.06 * crosses) * (top - floor)
        axis.plot([across[1]], [stacked], color=color, marker="X", markersize=6, clip_on=False, zorder=20)


def _marks_at(axis: Axes, value: float, across: tuple[float, float]) -> int:
    """The triangles that are drawn at about this place already: the next one goes above them."""
    near = (across[1] / across[0]) ** 0.02
    hollow = [line for line in axis.lines if line.get_marker() == "v" and line.get_markerfacecolor() == "white"]
    places = np.concatenate([[0.0], *(np.asarray(line.get_xdata(), dtype=float) for line in hollow)])
    return int(((places > value / near) & (places < value * near)).sum())


def _x_limits(rows: pd.DataFrame, first: pd.DataFrame, x: str) -> tuple[float, float]:
    """What the first method covers of the compressions, with room; all strengths."""
    covered = rows if x == "strength" else first
    values = covered[x][np.isfinite(covered[x]) & (covered[x] > 0)]
    if values.empty:
        values = rows[x][np.isfinite(rows[x]) & (rows[x] > 0)]
    if values.empty:
        return 1.0, 10.0
    room = 1.35
    return float(values.min()) / room, float(values.max()) * room


def _y_limits(
    rows: pd.DataFrame, first: pd.DataFrame, baseline: float, better: int, across: tuple[float, float], x: str
) -> tuple[float, float]:
    """From a little above the best to below the worst of the first method; the others may leave the axes.

    Against compression, one other method is shown whole if it is not far below.
    """
    inside = better * rows["level"][rows[x].between(*across)]
    own = better * first["level"][first[x].between(*across)]
    if inside.empty:
        return (0.0, 1.0) if np.isnan(baseline) else (baseline - 1, baseline + 1)
    best = np.nanmax([inside.max(), better * baseline])
    # With strengths, the fall of the first method belongs to what is discussed, but not down to chance.
    worst = float(own.min() if x == "compression" else own.quantile(0.25)) if len(own) else float(inside.median())
    span = max(best - worst, 0.01 * abs(best))
    lowest = max(worst - 0.6 * span, float(inside.min()) - 0.15 * span)
    others = inside[rows["series"] != first["series"].iloc[0]] if len(first) else inside
    closest = others.groupby(rows["series"]).min().max()  # the least of the other method whose least is highest
    near = x == "compression" and np.isfinite(closest) and worst - closest < _NEAR * abs(best)
    floor = min(lowest, closest - 0.1 * (best - closest)) if near else lowest
    return better * floor, better * (best + 0.08 * (best - floor))


def _x_axis(axis: Axes, x: str, low: float, high: float) -> None:
    axis.set_xscale("log")
    ticks: Sequence[float] = [tick for tick in TICKS if low <= tick <= high]
    if x == "strength":
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 20 else (1, 3) if high / low < 1_000 else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    axis.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.xaxis.set_minor_locator(NullLocator())
    sign = "×" if x == "compression" else ""
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{sign}"))


def _legend(figure: Figure, axes: Sequence[Axes], panels: int) -> None:
    """One for all panels: in the place of a panel that is not there, or else below."""
    entries = _entries(axes[:panels])
    if panels < len(axes):
        axes[panels].legend(entries.values(), entries.keys(), loc="center", frameon=False)
    else:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, panels), frameon=False)


def _legend_below(axis: Axes) -> None:
    entries = _entries([axis])
    axis.legend(
        entries.values(),
        entries.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        fontsize="x-small",
        frameon=False,
    )


def _entries(axes: Sequence[Axes]) -> dict[str, Any]:
    """The methods of all these panels, and what the marks on the edge mean if there are any."""
    entries = {
        _wrapped(label): handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    marks = {
        "below the axis": Line2D([], [], color="0.3", marker="v", markerfacecolor="white", linestyle=""),
        "no weights left": Line2D([], [], color="0.3", marker="X", linestyle=""),
    }
    used = {str(line.get_marker()) for axis in axes for line in axis.lines if line.get_linestyle() == "None"}
    used |= {"X" for axis in axes for line in axis.lines if str(line.get_marker()) == "X"}
    return entries | {label: handle for label, handle in marks.items() if str(handle.get_marker()) in used}


def _wrapped(label: str) -> str:
    """A name in lines that are no wider than a panel."""
    return textwrap.fill(label, 40, break_on_hyphens=False)
