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


def finished_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of one method without the seeds that are not finished, where there is one that is.

    A seed of which strengths are missing covers less of the compressions, and would leave out the others' too. The runs
    of a method that is given a sparsity stand for themselves.
    """
    finished = runs[runs["seed_finished"] | runs["target_sparsity"].notna()]
    return finished if len(finished) else runs


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each method and strength: means and standard errors over the seeds."""
    groups = runs.groupby(
        ["problem", "series", "title", "method", "penalty", "update", "coherence", "scope", "by_target", "strength"],
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
    summary["most_seeds"] = summary.groupby(["problem", "series"], sort=False)["seeds"].transform("max")
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
        for rows in [rows[rows["title"] == f"{PENALTY_TITLES.get(str(penalty))} plain {update}".replace("_", " ")]]
        if len(rows)
    }
    table = []
    for series, rows in summary.groupby("series", sort=False):
        # Chosen on validation, shown on test.
        best = rows.loc[rows["validation_accuracy"].idxmax()]
        row: dict[str, object] = {"method": series, "best accuracy": percent(best, "test_accuracy")}
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
        row["seconds"] = _seconds(rows["seconds"].median())
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
    for compression in COMPRESSIONS if values else ():
        means = {series: found[compression].mean() for series, found in values.items()}
        best = choose((mean for mean in means.values() if np.isfinite(mean)), default=np.nan)
        cells = []
        for series, found in values.items():
            complete = found[compression].dropna()
            cell = f"{_mean(complete, measure)}{fewer_seeds(len(complete), len(found))}" if len(complete) else "–"
            cells.append(f"**{cell}**" if means[series] == best else cell)
        table[f"{compression}×"] = cells
    return table


def fewer_seeds(there: int, most: int) -> str:
    """How many seeds a number is from, where others are from more."""
    return "" if there == most else f" ({there} seeds)" if there > 1 else " (one seed)"


def at_compressions(rows: pd.DataFrame, measure: str = "test_accuracy") -> pd.DataFrame:
    """The measure of one method at each of the compressions (columns) in each seed (rows).

    Interpolated linearly in the logarithm of the compression between neighbouring strengths; not a number beyond the
    weakest and the strongest that left any weight, and where a seed has none. A seed that is not finished has numbers
    where it was trained alone.
    """
    found = {}
    finished = rows.groupby("seed")["seed_finished"].all()
    finished |= not finished.any()
    for seed, of_seed in rows.groupby("seed"):
        points = of_seed[np.isfinite(of_seed["compression"])].sort_values("compression")
        values = np.full(len(COMPRESSIONS), np.nan)
        if len(points):
            values = np.interp(np.log(COMPRESSIONS), np.log(points["compression"]), points[measure])
            # Pruning to 10× leaves a little more or less than a tenth.
            least, most = 0.98 * points["compression"].iloc[0], 1.02 * points["compression"].iloc[-1]
            values[(np.array(COMPRESSIONS) < least) | (np.array(COMPRESSIONS) > most)] = np.nan
            if not finished[seed]:
                trained = np.isclose(np.array(COMPRESSIONS)[:, None], points["compression"].to_numpy(), rtol=0.02)
                values[~trained.any(axis=1)] = np.nan
        found[seed] = values
    frame = pd.DataFrame.from_dict(found, orient="index", columns=list(COMPRESSIONS))
    # A mean over some of the seeds would compare them with all of another method's.
    incomplete = frame.columns[frame[finished].isna().any()]
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
    return "none" if largest is None else f"{largest['compression']:.3g}× ({percent(largest, 'test_accuracy')})"


def _file_within(rows: pd.DataFrame, baseline: pd.Series | None, points: float) -> str:
    largest = _smallest_within(rows, baseline, points)
    return "–" if largest is None else f"{largest['stored_bytes']:,.0f} of {largest['dense_bytes']:,.0f} bytes"


def _mean(values: pd.Series, measure: str) -> str:
    """A mean with its standard error, if there is one."""
    if measure == "test_accuracy":
        return f"{100 * values.mean():.1f}{_plus_minus(standard_error(values))}"
    error = standard_error(values)
    return f"{values.mean():.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")


def gains_of(runs: pd.DataFrame, series: str, strength: float) -> pd.Series:
    """The gains over no penalty, a share, seed by seed."""
    without = runs[runs["series"] == BASELINE].set_index("seed")["test_accuracy"]
    chosen = runs[(runs["series"] == series) & (runs["strength"] == strength)].set_index("seed")["test_accuracy"]
    return (chosen - without).dropna()


def _paired_gain(runs: pd.DataFrame, series: str, strength: float) -> str:
    gains = gains_of(runs, series, strength)
    if series == BASELINE or gains.empty:
        return "–"
    return f"{round(100 * gains.mean(), 1) + 0.0:+.1f}{_plus_minus(standard_error(gains))}"


def percent(row: pd.Series, column: str) -> str:
    """A mean with its standard error: accuracies in %, losses in nats."""
    error, seeds = row[f"{column}_error"], fewer_seeds(row["seeds"], row["most_seeds"])
    if column == "test_loss":
        return f"{row['test_loss']:.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "") + seeds
    return f"{100 * row[column]:.1f}{_plus_minus(error)}{seeds}"


def _plus_minus(error: float) -> str:
    return f" ± {100 * error:.1f}" if np.isfinite(error) else ""


def _endured(strength: float, last: bool) -> str:
    if not np.isfinite(strength):
        return "none"
    return f"{'≥ ' * last}{strength:g}"


def gain_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The best accuracy of each method on each problem, chosen on validation, and its gain on test over no penalty."""
    columns = {"method": "method", "accuracy": "best accuracy", "gain": "gain", "at strength": "at strength"}
    columns |= {"endures": "endures", "× plain": "× plain"}
    tables = []
    for problem, of_problem in runs.groupby("problem", sort=False):
        if BASELINE in set(of_problem["series"]):
            reached = reach_table(of_problem).rename(columns={"best accuracy": "accuracy"})
            reached = reached[[name for name in columns if (reached[name] != "–").any()]]
            tables.append(reached.assign(**{"network and data": str(problem)}))
    table = pd.concat(tables).fillna("–") if tables else pd.DataFrame({"network and data": []})
    return table[["network and data", *(name for name in table.columns if name != "network and data")]]


def cost_table(runs: pd.DataFrame, leading: list[str]) -> pd.DataFrame:
    """Seconds of a training, and bytes of the file at equal compression: a row for each problem and method."""
    table = []
    for problem, of_problem in runs.groupby("problem", sort=False):
        for series in [name for name in [BASELINE, *leading] if name in set(of_problem["series"])]:
            rows = of_problem[of_problem["series"] == series]
            row = {"network and data": str(problem), "method": series, "seconds": _seconds(rows["seconds"].min())}
            if series == BASELINE:
                row |= {"file at 1×": _kilobytes(rows["stored_bytes"].mean())}
            else:
                sizes = at_compressions(finished_seeds(rows), "stored_bytes").mean()
                row |= {f"{at}×": _kilobytes(size) for at, size in sizes.items() if np.isfinite(size)}
            table.append(row)
    frame = pd.DataFrame(table).fillna("–")
    sizes = [f"{at}×" for at in COMPRESSIONS if f"{at}×" in frame]
    return frame[[*(name for name in frame.columns if name not in sizes), *sizes]]


def _seconds(value: float) -> str:
    """Three digits, with commas."""
    return f"{float(f'{value:.3g}'):,g}"


def _kilobytes(size: float) -> str:
    return f"{size / 1_000:.3g} kB" if size < 999_500 else f"{size / 1_000_000:.3g} MB"


def target_misses(runs: pd.DataFrame) -> pd.DataFrame:
    """For each method that is given a sparsity: how far from it the trainings ended, in points."""
    asked = runs[runs["target_sparsity"].notna()]
    missed = 100 * (1 - asked["nonzeros"] / asked["weights"] - asked["target_sparsity"]).abs()
    table = [
        {
            "method": str(series),
            "trainings": str(len(rows)),
            "mean miss": f"{rows.mean():.3f}",
            "largest": f"{rows.max():.3f}",
        }
        for series, rows in missed.groupby(asked["series"], sort=False)
    ]
    return pd.DataFrame(table)


def strength_table(summary: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A measure and the compression at each strength, or other extent: a row for each strength, a column a method."""
    rows = summary[summary["series"] != BASELINE]
    table = pd.DataFrame({"strength": sorted(rows["strength"].dropna().unique())})
    for series, of_series in rows.groupby("series", sort=False):
        cells = {row["strength"]: _at_strength(row, measure) for _, row in of_series.iterrows()}
        table[str(series)] = [cells.get(strength, "") for strength in table["strength"]]
    return table.assign(strength=[f"{strength:g}" for strength in table["strength"]])


def _at_strength(row: pd.Series, measure: str) -> str:
    """Such as ``97.5 ± 0.1 (23.1×)``."""
    if not np.isfinite(row["compression"]):
        return "no weights left"
    compression = float(f"{row['compression']:.3g}")
    return f"{percent(row, measure)} ({compression:,g}×)"
