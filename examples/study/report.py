"""A study's report: CSV, a Markdown page with tables, and figures."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from figures import draw_accuracy_by_strength, draw_frontier, draw_headline
from grid import Run, Study
from methods import PENALTY_TITLES
from training import ZERO_THRESHOLD, Outcome, Problem

COMPRESSIONS = (4, 10, 30, 100, 300)
BASELINE = "no penalty"


def write_report(study: Study, outcomes: dict[str, Outcome], folder: Path) -> Path:
    """Write runs.csv, summary.csv, figures and index.md into the folder; each file is whole or not there.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = runs_frame(study, outcomes)
    summary = summarize(runs)
    _write(folder / "runs.csv", lambda path: runs.to_csv(path, index=False, float_format="%.6g"))
    _write(folder / "summary.csv", lambda path: summary.to_csv(path, index=False, float_format="%.6g"))
    page = [f"# {study.name}", "", _what_was_run(study, runs), ""]
    for problem, of_problem in runs.groupby("problem", sort=False):
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", str(problem))
        page += [f"## {problem}", ""]
        if leading := [title for title in study.headline if title in set(of_problem["series"])]:
            page += _headline(of_problem, leading, name, folder)
        for penalty in [penalty for penalty in of_problem["penalty"].unique() if penalty] or [""]:
            compared = of_problem[of_problem["penalty"].isin([penalty, ""])]
            page += _section(compared, str(penalty), f"{name}-{penalty}", folder)
    page += ["## Numbers", "", "Every run: [runs.csv](runs.csv). Means and errors: [summary.csv](summary.csv).", ""]
    _write(folder / "index.md", lambda path: path.write_text("\n".join(page)))
    return folder


def _headline(runs: pd.DataFrame, leading: list[str], stem: str, folder: Path) -> list[str]:
    """The few methods that matter most, and the lead of the first over the others."""
    chosen = runs[runs["series"].isin([*leading, BASELINE])]
    summary = summarize(chosen)
    _write(folder / f"{stem}-headline.png", lambda path: draw_headline(summary, leading, path))
    table = compression_table(chosen[chosen["series"] != BASELINE])
    return [
        f"![Test accuracy against compression]({stem}-headline.png)",
        "",
        "**Test accuracy in % at equal compression**",
        "",
        _markdown(pd.concat([table, lead_table(chosen, leading)])),
        "",
    ]


def lead_table(runs: pd.DataFrame, leading: list[str]) -> pd.DataFrame:
    """By how many points the first method is ahead of each other at equal compression, seed by seed."""
    first, *others = [at_compressions(runs[runs["series"] == title]) for title in leading]
    table = pd.DataFrame({"method": [f"*lead of {leading[0]} over {title}*" for title in leading[1:]]})
    for compression in COMPRESSIONS:
        leads = [(first[compression] - other[compression]).dropna() for other in others]
        table[f"{compression}×"] = [
            f"{100 * lead.mean():+.1f}{_plus_minus(standard_error(lead))}" if len(lead) else "–" for lead in leads
        ]
    return table


def _section(runs: pd.DataFrame, penalty: str, stem: str, folder: Path) -> list[str]:
    """Figures and tables for one penalty on one problem, beside no penalty and pruning."""
    makes_zeros = penalty != "l2"
    if not makes_zeros:
        runs = runs[runs["method"] != "magnitude_pruning"]
    summary = summarize(runs)
    title = PENALTY_TITLES.get(penalty, "Without a penalty")
    lines = [f"### {title[0].upper()}{title[1:]}", ""]
    if makes_zeros:
        _write(folder / f"{stem}-frontier.png", lambda path: draw_frontier(summary, path))
        lines += [f"![{title}: test accuracy against compression]({stem}-frontier.png)", ""]
    _write(folder / f"{stem}-strength.png", lambda path: draw_accuracy_by_strength(summary, path))
    lines += [f"![{title}: test accuracy against strength]({stem}-strength.png)", ""]
    lines += ["**What each method reaches**", "", _markdown(reach_table(runs)), ""]
    if makes_zeros:
        lines += ["**Test accuracy in % at equal compression**", "", _markdown(compression_table(runs)), ""]
    return lines


def _markdown(table: pd.DataFrame) -> str:
    return str(table.to_markdown(index=False, disable_numparse=True))


def runs_frame(study: Study, outcomes: dict[str, Outcome]) -> pd.DataFrame:
    """One row for each run that is done."""
    rows = []
    titles = _problem_titles(study)
    for run in study.runs:
        if run.key in outcomes:
            outcome = dataclasses.asdict(outcomes[run.key])
            ratio = outcome["weights"] / outcome["nonzeros"] if outcome["nonzeros"] else np.inf
            rows.append({"problem": titles[run.problem], **_labels(run), **outcome, "compression": ratio})
    return pd.DataFrame(rows)


def _problem_titles(study: Study) -> dict[Problem, str]:
    """What the problems are called: data and network, and where two are alike in that, what tells them apart."""
    problems = list(dict.fromkeys(run.problem for run in study.runs))
    titles = {}
    for problem in problems:
        alike = [other for other in problems if other.title == problem.title]
        names = [field.name for field in dataclasses.fields(Problem)]
        different = [name for name in names if len({getattr(other, name) for other in alike}) > 1]
        titles[problem] = ", ".join([problem.title, *(f"{name} {getattr(problem, name)}" for name in different)])
    return titles


def _labels(run: Run) -> dict[str, object]:
    method = run.method
    penalty = "l2" if method.method == "cautious_weight_decay" else method.penalty or ""
    return {
        "series": method.title,
        "method": method.method,
        "penalty": penalty,
        "update": method.update or "",
        "coherence": method.coherence or "",
        "scope": method.scope or "",
        "strength": method.compression if method.strength is None else method.strength,
        "seed": run.seed,
    }


def standard_error(values: pd.Series) -> float:
    """Of the mean; not a number where there is one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each method and strength: means and standard errors over the seeds."""
    groups = runs.groupby(
        ["problem", "series", "method", "penalty", "update", "coherence", "scope", "strength"], sort=False, dropna=False
    )
    summary = groups.agg(
        seeds=("seed", "count"),
        validation_accuracy=("validation_accuracy", "mean"),
        validation_accuracy_zeroed=("validation_accuracy_zeroed", "mean"),
        test_accuracy=("test_accuracy", "mean"),
        test_accuracy_error=("test_accuracy", standard_error),
        test_accuracy_zeroed=("test_accuracy_zeroed", "mean"),
        test_accuracy_zeroed_error=("test_accuracy_zeroed", standard_error),
        lowest_validation_accuracy=("validation_accuracy", "min"),
        weights=("weights", "mean"),
        nonzeros=("nonzeros", "mean"),
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
        row["at strength"] = f"{best['strength']:g}" if rows["method"].iloc[0] in _WITH_STRENGTH else "–"
        for points in (0.5, 1.0):
            row[f"compression at ≤ {points:g} points loss"] = _within(rows, baseline, points)
        endured, last = endured_strength(rows, baseline)
        with_strength = rows["method"].iloc[0] in _WITH_STRENGTH
        row["endures"] = _endured(endured, last) if with_strength else "–"
        reference, _ = plain.get((rows["penalty"].iloc[0], rows["update"].iloc[0]), (np.nan, False))
        ratio = endured / reference
        row["× plain"] = f"{'≥ ' * last}{ratio:.3g}" if with_strength and np.isfinite(ratio) else "–"
        row["time"] = f"{rows['seconds'].median() / baseline['seconds']:.2f}" if baseline is not None else "–"
        table.append(row)
    return pd.DataFrame(table)


_WITH_STRENGTH = ("plain", "delayed", "coherent", "cautious_weight_decay")


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


def compression_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy at equal compression, interpolated between strengths in each seed; the best of each column bold."""
    values = {str(series): at_compressions(rows) for series, rows in runs.groupby("series", sort=False)}
    values = {series: found for series, found in values.items() if found.notna().to_numpy().any()}
    table = pd.DataFrame({"method": list(values)})
    for compression in COMPRESSIONS:
        means = {series: found[compression].mean() for series, found in values.items()}
        best = max((mean for mean in means.values() if np.isfinite(mean)), default=np.nan)
        cells = []
        for series, found in values.items():
            complete = found[compression].dropna()
            cell = (
                f"{complete.mean():.1%}".rstrip("%") + _plus_minus(standard_error(complete)) if len(complete) else "–"
            )
            cells.append(f"**{cell}**" if means[series] == best else cell)
        table[f"{compression}×"] = cells
    return table


def at_compressions(rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of one method at each of the compressions (columns) in each seed (rows).

    Interpolated linearly in the logarithm of the compression between neighbouring strengths; not a number beyond the
    weakest and the strongest that left any weight, and where a seed has none.
    """
    found = {}
    for seed, of_seed in rows.groupby("seed"):
        points = of_seed[np.isfinite(of_seed["compression"])].sort_values("compression")
        values = np.full(len(COMPRESSIONS), np.nan)
        if len(points):
            values = np.interp(np.log(COMPRESSIONS), np.log(points["compression"]), points["test_accuracy_zeroed"])
            # Pruning to 10× leaves a little more or less than a tenth.
            least, most = 0.98 * points["compression"].iloc[0], 1.02 * points["compression"].iloc[-1]
            values[(np.array(COMPRESSIONS) < least) | (np.array(COMPRESSIONS) > most)] = np.nan
        found[seed] = values
    frame = pd.DataFrame.from_dict(found, orient="index", columns=list(COMPRESSIONS))
    # A mean over some of the seeds would compare them with all of another method's.
    incomplete = frame.columns[frame.isna().any()]
    frame[incomplete] = np.nan
    return frame


def _within(rows: pd.DataFrame, baseline: pd.Series | None, points: float) -> str:
    if baseline is None:
        return "–"
    kept = rows[rows["validation_accuracy_zeroed"] >= baseline["validation_accuracy"] - points / 100]
    kept = kept[kept["compression"].notna()]
    if kept.empty:
        return "none"
    largest = kept.loc[kept["compression"].idxmax()]
    return f"{largest['compression']:.3g}× ({_percent(largest, 'test_accuracy_zeroed')})"


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


def _what_was_run(study: Study, runs: pd.DataFrame) -> str:
    lines = []
    for problem, title in _problem_titles(study).items():
        done = runs[runs["problem"] == title]
        images = f"{done['train_images'].iloc[0]:,}" if len(done) else "no run is done; its"
        lines.append(
            f"- {title}: {images} training images, {problem.epochs} epochs, batches of {problem.batch_size},"
            f" SGD with momentum {problem.momentum:g} and learning rate {problem.lr:g} falling to zero as a cosine,"
            f" {'augmented by ' + problem.augment if problem.augment else 'no augmentation'}."
        )
    seeds = sorted({run.seed for run in study.runs})
    return "\n".join(
        [
            f"{len(runs):,} of {len(study.runs):,} runs are done. Seeds {seeds[0]} to {seeds[-1]}.",
            "",
            *lines,
            "",
            "Accuracies are in %, on test images that no choice was made on; strengths were chosen on validation"
            " images. ± is the standard error over the seeds. Compression is weights over nonzeros; weights below"
            f" {ZERO_THRESHOLD:g} count as zero and are set to zero before the accuracy is taken. *Gain* is over no"
            " penalty, in points, seed by seed. *Endures* is the largest strength at which every seed gets above the"
            " middle between chance and the accuracy without penalty; ≥ where no larger one was tried. *Time* is that"
            " of the training, relative to no penalty.",
        ]
    )


def _write(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
