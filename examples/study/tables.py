"""The numbers of the report: means over seeds, what a method reaches, and methods at equal compression."""

from __future__ import annotations

import numpy as np
import pandas as pd
from methods import PENALTY_TITLES

COMPRESSIONS = (2, 4, 10, 30, 100, 300)
BASELINE = "no penalty"
MEASURES = {"test_accuracy": "Test accuracy in %", "test_loss": "Test cross-entropy in nats"}
"""What methods are compared by: the first for images, the second for text."""


def standard_error(values: pd.Series) -> float:
    """Of the mean; not a number where there is one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each method and strength: means and standard errors over the seeds."""
    groups = runs.groupby(
        ["problem", "series", "method", "penalty", "update", "coherence", "scope", "by_target", "strength"],
        sort=False,
        dropna=False,
    )
    summary = groups.agg(
        seeds=("seed", "count"),
        validation_accuracy=("validation_accuracy", "mean"),
        test_accuracy=("test_accuracy", "mean"),
        test_accuracy_error=("test_accuracy", standard_error),
        test_loss=("test_loss", "mean"),
        test_loss_error=("test_loss", standard_error),
        lowest_validation_accuracy=("validation_accuracy", "min"),
        weights=("weights", "mean"),
        nonzeros=("nonzeros", "mean"),
        dense_bytes=("dense_bytes", "mean"),
        stored_bytes=("stored_bytes", "mean"),
        seconds=("seconds", "median"),
        classes=("classes", "first"),
    ).reset_index()
    summary["compression"] = summary["weights"] / summary["nonzeros"].replace(0, np.nan)
    return summary


def reach_table(runs: pd.DataFrame) -> pd.DataFrame:
    """For each method its best accuracy, its largest compression at small loss, the strength it endures, its time."""
    summary = summarize(runs)
    baseline = summary[summary["series"] == BASELINE].iloc[0] if (summary["series"] == BASELINE).any() else None
    # Without warm-up, polish and the like, which have titles of their own.
    plain = {
        (str(penalty), str(update)): endured_strength(rows, baseline)
        for (penalty, update), rows in summary.groupby(["penalty", "update"])
        for rows in [rows[rows["series"] == f"{PENALTY_TITLES.get(str(penalty))} plain {update}"]]
        if len(rows)
    }
    table = []
    for series, rows in summary.groupby("series", sort=False):
        # Chosen on validation, shown on test.
        best = rows.loc[rows["validation_accuracy"].idxmax()]
        row: dict[str, object] = {"method": series, "best accuracy": _percent(best, "test_accuracy")}
        row["gain"] = _paired_gain(runs, str(series), best["strength"])
        with_strength = rows["method"].iloc[0] in _WITH_STRENGTH and not rows["by_target"].any()
        row["at strength"] = f"{best['strength']:g}" if with_strength else "–"
        for points in (0.5, 1.0):
            row[f"compression at ≤ {points:g} points loss"] = _within(rows, baseline, points)
        endured, last = endured_strength(rows, baseline)
        row["endures"] = _endured(endured, last) if with_strength else "–"
        reference, _ = plain.get((rows["penalty"].iloc[0], rows["update"].iloc[0]), (np.nan, False))
        ratio = endured / reference
        row["× plain"] = f"{'≥ ' * last}{ratio:.3g}" if with_strength and np.isfinite(ratio) else "–"
        row["file of this"] = _file_within(rows, baseline, 1.0)
        row["seconds"] = f"{rows['seconds'].median():.3g}"
        row["time"] = f"{rows['seconds'].median() / baseline['seconds']:.2f}" if baseline is not None else "–"
        table.append(row)
    return pd.DataFrame(table)


_WITH_STRENGTH = ("plain", "delayed", "coherent", "cautious_weight_decay", "pat_lasso", "spred", "linearized_bregman")


def endured_strength(rows: pd.DataFrame, baseline: pd.Series | None) -> tuple[float, bool]:
    """The largest strength at which every seed still learns, and whether it is the largest that was tried.

    To learn is to be above the middle between chance and the accuracy without penalty, on validation.
    """
    chance = 1 / rows["classes"].iloc[0]
    best = baseline["validation_accuracy"] if baseline is not None else rows["validation_accuracy"].max()
    learned = rows[rows["lowest_validation_accuracy"] > (chance + best) / 2]["strength"]
    if learned.empty:
        return np.nan, False
    return float(learned.max()), bool(learned.max() == rows["strength"].max())


def compression_table(runs: pd.DataFrame, measure: str = "test_accuracy") -> pd.DataFrame:
    """A measure at equal compression, interpolated between strengths in each seed; the best of each column bold."""
    choose = min if measure == "test_loss" else max
    values = {str(series): at_compressions(rows, measure) for series, rows in runs.groupby("series", sort=False)}
    values = {series: found for series, found in values.items() if found.notna().to_numpy().any()}
    table = pd.DataFrame({"method": list(values)})
    for compression in COMPRESSIONS:
        means = {series: found[compression].mean() for series, found in values.items()}
        best = choose((mean for mean in means.values() if np.isfinite(mean)), default=np.nan)
        cells = []
        for series, found in values.items():
            complete = found[compression].dropna()
            cell = _mean(complete, measure) if len(complete) else "–"
            cells.append(f"**{cell}**" if means[series] == best else cell)
        table[f"{compression}×"] = cells
    return table


def at_compressions(rows: pd.DataFrame, measure: str = "test_accuracy") -> pd.DataFrame:
    """The measure of one method at each of the compressions (columns) in each seed (rows).

    Interpolated linearly in the logarithm of the compression between neighbouring strengths; not a number beyond the
    weakest and the strongest that left any weight, and where a seed has none.
    """
    found = {}
    for seed, of_seed in rows.groupby("seed"):
        points = of_seed[np.isfinite(of_seed["compression"])].sort_values("compression")
        values = np.full(len(COMPRESSIONS), np.nan)
        if len(points):
            values = np.interp(np.log(COMPRESSIONS), np.log(points["compression"]), points[measure])
            # Pruning to 10× leaves a little more or less than a tenth.
            least, most = 0.98 * points["compression"].iloc[0], 1.02 * points["compression"].iloc[-1]
            values[(np.array(COMPRESSIONS) < least) | (np.array(COMPRESSIONS) > most)] = np.nan
        found[seed] = values
    frame = pd.DataFrame.from_dict(found, orient="index", columns=list(COMPRESSIONS))
    # A mean over some of the seeds would compare them with all of another method's.
    incomplete = frame.columns[frame.isna().any()]
    frame[incomplete] = np.nan
    return frame


def _smallest_within(rows: pd.DataFrame, baseline: pd.Series | None, points: float) -> pd.Series | None:
    """The most compressed networks of a method that lose no more than so many points on validation."""
    if baseline is None:
        return None
    kept = rows[rows["validation_accuracy"] >= baseline["validation_accuracy"] - points / 100]
    kept = kept[kept["compression"].notna()]
    return None if kept.empty else kept.loc[kept["compression"].idxmax()]


def _within(rows: pd.DataFrame, baseline: pd.Series | None, points: float) -> str:
    if baseline is None:
        return "–"
    largest = _smallest_within(rows, baseline, points)
    return "none" if largest is None else f"{largest['compression']:.3g}× ({_percent(largest, 'test_accuracy')})"


def _file_within(rows: pd.DataFrame, baseline: pd.Series | None, points: float) -> str:
    largest = _smallest_within(rows, baseline, points)
    return "–" if largest is None else f"{largest['stored_bytes']:,.0f} of {largest['dense_bytes']:,.0f} bytes"


def _mean(values: pd.Series, measure: str) -> str:
    """A mean with its standard error, if there is one."""
    if measure == "test_accuracy":
        return f"{100 * values.mean():.1f}{_plus_minus(standard_error(values))}"
    error = standard_error(values)
    return f"{values.mean():.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")


def _paired_gain(runs: pd.DataFrame, series: str, strength: float) -> str:
    """The gain over no penalty in points, seed by seed."""
    without = runs[runs["series"] == BASELINE].set_index("seed")["test_accuracy"]
    chosen = runs[(runs["series"] == series) & (runs["strength"] == strength)].set_index("seed")["test_accuracy"]
    gains = (chosen - without).dropna()
    if series == BASELINE or gains.empty:
        return "–"
    return f"{100 * gains.mean():+.1f}{_plus_minus(standard_error(gains))}"


def _percent(row: pd.Series, column: str) -> str:
    return f"{100 * row[column]:.1f}{_plus_minus(row[f'{column}_error'])}"


def _plus_minus(error: float) -> str:
    return f" ± {100 * error:.1f}" if np.isfinite(error) else ""


def _endured(strength: float, last: bool) -> str:
    if not np.isfinite(strength):
        return "none"
    return f"{'≥ ' * last}{strength:g}"


def lead_table(runs: pd.DataFrame, leading: list[str], measure: str = "test_accuracy") -> pd.DataFrame:
    """By how much the first method is ahead of each other at equal compression, seed by seed.

    In points of accuracy, or in nats: a positive number is in favour of the first.
    """
    sign = -1 if measure == "test_loss" else 1
    first, *others = [at_compressions(runs[runs["series"] == title], measure) for title in leading]
    table = pd.DataFrame({"method": [f"*lead of {leading[0]} over {title}*" for title in leading[1:]]})
    for compression in COMPRESSIONS:
        leads = [sign * (first[compression] - other[compression]).dropna() for other in others]
        table[f"{compression}×"] = [
            f"{'+' * bool(lead.mean() >= 0)}{_mean(lead, measure)}" if len(lead) else "–" for lead in leads
        ]
    return table
