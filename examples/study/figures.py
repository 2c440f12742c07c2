"""The figures of the report: accuracy against compression, and against strength."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, also where there is no screen

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from tables import MEASURES

COLORS = {
    "plain": "tab:orange",
    "delayed": "tab:brown",
    "agreement": "tab:red",
    "direction": "tab:blue",
    "temporal": "tab:green",
    "cautious_weight_decay": "tab:purple",
    "magnitude_pruning": "black",
    "pat_top_k": "tab:blue",
    "pat_lasso": "tab:cyan",
    "spred": "tab:olive",
    "linearized_bregman": "tab:green",
}
DASHES = {"": "-", "element": "-", "parameter": "--", "model": ":"}
MARKERS = "os^Dv<>*"


def draw_frontier(summary: pd.DataFrame, path: Path) -> None:
    """Test accuracy against compression, a panel for each update, a line for each method."""
    _draw(summary[summary["compression"].notna()], "compression", "test_accuracy", path)


def draw_headline(summary: pd.DataFrame, leading: list[str], path: Path, measure: str = "test_accuracy") -> None:
    """A measure against compression for a few methods, in one panel; the first stands out."""
    factor = 100 if measure == "test_accuracy" else 1
    figure, panel = plt.subplots(figsize=(9, 5), layout="constrained")
    baseline = summary[summary["method"] == "none"]
    if len(baseline):
        panel.axhline(factor * baseline[measure].iloc[0], color="tab:gray", linewidth=1, label="no penalty")
    colors = ["tab:red", "black", "tab:orange", "tab:blue", "tab:green", "tab:brown", "tab:purple"]
    for number, (title, color) in enumerate(zip(leading, itertools.cycle(colors))):
        rows = summary[(summary["series"] == title) & summary["compression"].notna()].sort_values("compression")
        panel.errorbar(
            rows["compression"],
            factor * rows[measure],
            yerr=factor * rows[f"{measure}_error"].fillna(0),
            color=color,
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1.2 if number else 2.4,
            markersize=4,
            capsize=2,
            label=title,
        )
    name = MEASURES[measure]
    panel.set(xlabel="compression (weights ÷ nonzeros)", ylabel=name[0].lower() + name[1:])
    _log_axis(panel)
    panel.legend(loc="lower left", fontsize="small")
    _save(figure, path)


def draw_accuracy_by_strength(summary: pd.DataFrame, path: Path) -> None:
    """Test accuracy as trained against strength: where each method falls off its cliff."""
    without = summary["method"].isin(["magnitude_pruning", "pat_top_k"]) | summary["by_target"].astype(bool)
    _draw(summary[~without], "strength", "test_accuracy", path)


def _draw(summary: pd.DataFrame, x: str, y: str, path: Path) -> None:
    known = ("proximal", "dual_averaging", "gradient")
    updates = [update for update in known if (summary["update"] == update).any()] or [""]
    figure, panels = plt.subplots(
        1, len(updates), figsize=(5.5 * len(updates) + 3, 5), layout="constrained", sharey=True, squeeze=False
    )
    for panel, update in zip(panels[0], updates, strict=True):
        _panel(panel, summary[summary["update"].isin([update, ""])], x, y)
        panel.set_title(f"update: {update.replace('_', ' ')}" if update else "")
        panel.set_xlabel("compression (weights ÷ nonzeros)" if x == "compression" else "strength")
    panels[0][0].set_ylabel("test accuracy in %")
    _legend(figure, panels[0])
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=100)
    finally:
        plt.close(figure)


def _panel(panel: Axes, summary: pd.DataFrame, x: str, y: str) -> None:
    seen: dict[tuple[str, str], int] = {}
    for series, rows in summary.groupby("series", sort=False):
        first = rows.iloc[0]
        if first["method"] == "none":
            panel.axhline(100 * first[y], color="tab:gray", linewidth=1, label="no penalty")
            continue
        kind = first["coherence"] or first["method"]
        number = seen[kind, first["scope"]] = seen.get((kind, first["scope"]), -1) + 1
        rows = rows.sort_values("strength")
        panel.errorbar(
            rows[x],
            100 * rows[y],
            yerr=100 * rows[f"{y}_error"].fillna(0),
            color=COLORS.get(kind, "tab:pink"),
            linestyle=DASHES[first["scope"]],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            capsize=2,
            label=_without_update(str(series), str(first["update"])),
        )
    _log_axis(panel)


def _log_axis(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)


def _without_update(series: str, update: str) -> str:
    return series.replace(f" {update.replace('_', ' ')}", "") if update else series


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels: their methods have the same names and looks."""
    entries = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize="small")
