"""A study's report: a page that answers first, an appendix with every method, figures, and CSV files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from appendix import appendix_page
from figures import LINES, Panel, draw_grid
from grid import Study
from leads import against_each_rival, answer, best_rival_table, change_table, gain_answer, lead_cell, lead_frame
from names import method_names
from page import how_it_was_measured, markdown, wrapped
from rows import NUMBERS, runs_frame
from tables import (
    BASELINE,
    MEASURES,
    compression_table,
    cost_table,
    finished_seeds,
    gain_table,
    percent,
    summarize,
    target_misses,
)
from training import Outcome


def write_report(study: Study, outcomes: dict[str, Outcome], folder: Path) -> Path:
    """Write runs.csv, summary.csv, figures, index.md and appendix.md into the folder; each is whole or not there.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = runs_frame(study, outcomes)
    summary = summarize(runs)
    write_whole(folder / "runs.csv", lambda path: runs.to_csv(path, index=False, float_format=NUMBERS))
    write_whole(folder / "summary.csv", lambda path: summary.to_csv(path, index=False, float_format=NUMBERS))
    appendix = appendix_page(study, runs, lambda name, panels: _figure(folder / name, panels, shared_legend=False))
    write_whole(folder / "appendix.md", lambda path: path.write_text(wrapped(appendix)))
    page = _page(study, runs, folder)
    write_whole(folder / "index.md", lambda path: path.write_text(wrapped(page)))
    return folder


def _figure(path: Path, panels: Sequence[Panel], shared_legend: bool) -> None:
    write_whole(path, lambda unfinished: draw_grid(panels, unfinished, shared_legend))


def _page(study: Study, runs: pd.DataFrame, folder: Path) -> list[str]:
    """The answer, the figure, the tables, what it costs, and how it was measured."""
    leading = _leading(study, runs)
    compared = runs[runs["series"].isin([*leading, BASELINE])]
    leads = lead_frame(compared, leading)
    about_size = bool(len(leads)) and "l2" not in set(compared["penalty"])
    lines = [f"# {study.title or study.name}", "", *_progress(study, runs), "## The answer", ""]
    if about_size:
        lines += answer(leads, leading[0])
        change = f"**What compression costs with {leading[0]}: accuracy over no penalty, in points**"
        lines += [change, "", markdown(change_table(compared, leading[0])), ""]
        lines += [f"**Lead of {leading[0]} over the best alternative**", "", markdown(best_rival_table(leads)), ""]
        lines += [*_explained_lead(leading[0]), *_figures(compared, leading, folder)]
        if leads["problem"].nunique() > 1:
            caption = f"**{leading[0][0].upper()}{leading[0][1:]} against each alternative, counted over the networks**"
            lines += [caption, "", markdown(against_each_rival(leads)), ""]
        lines += ["## Accuracy at equal compression", ""]
        for problem, of_problem in compared.groupby("problem", sort=False):
            lines += _at_equal_compression(str(problem), of_problem, leads, leading)
    else:
        lines += [*gain_answer(compared), *_figures(compared, leading, folder)]
    lines += ["## The best accuracy", "", *_gains(compared), "## What it costs", "", *_costs(compared, leading)]
    lines += ["## How it was measured", "", *how_it_was_measured(study, runs)]
    lines += [
        "[The appendix](appendix.md) has every method, [runs.csv](runs.csv) every run, and [summary.csv](summary.csv)"
    ]
    lines += ["all means and errors.", ""]
    return lines


def _leading(study: Study, runs: pd.DataFrame) -> list[str]:
    """The names of the methods of the headline that have runs; of the first six where there is no headline."""
    names = method_names([run.method for run in study.runs], study.headline)
    there = [name for name in runs["series"].unique() if name != BASELINE]
    asked = [names[title] for title in study.headline if names[title] in there]
    return (asked or there)[:LINES]


def _progress(study: Study, runs: pd.DataFrame) -> list[str]:
    """What is not done, for each of the seeds."""
    done = f"{len(runs):,} of {len(study.runs):,} runs are done."
    if len(runs) == len(study.runs):
        return []
    found, asked = Counter(runs["seed"]), Counter(run.seed for run in study.runs)
    of_seeds = ", ".join(f"{found[seed]} of {asked[seed]} of seed {seed}" for seed in sorted(asked))
    fewer = "Numbers from fewer seeds than others say so; the standard error of two seeds is rough."
    return [f"**This study is not finished**: {done} ({of_seeds}.) {fewer}", ""]


def _explained_lead(first: str) -> list[str]:
    return [
        f"Positive numbers favour {first}. Bold marks differences, either way, with p < 0.05 in a paired t-test over"
        " the seeds. The best alternative of each cell is in brackets. It is picked from the results shown, which"
        " favours the alternatives.",
        "",
    ]


def _gains(runs: pd.DataFrame) -> list[str]:
    """Whether the accuracy rises over no penalty, and what strength is endured."""
    table = gain_table(runs)
    told = "The best setting of each method on validation data, and its accuracy and gain over no penalty on test data."
    if "endures" in table:
        told += (
            " *Endures* is the largest strength at which every seed gets above the middle between chance and the"
            " accuracy without penalty; ≥ where no larger one was tried."
        )
    if "× plain" in table:
        told += " *× plain* is that strength over the one that the plain penalty endures."
    return [told, "", markdown(table), ""]


def _figures(runs: pd.DataFrame, leading: list[str], folder: Path) -> list[str]:
    """The methods in few lines: against compression, or against strength where the strength means the same in all."""
    lines = []
    groups = [(str(name), rows, str(rows["measure"].iloc[0])) for name, rows in runs.groupby("problem", sort=False)]
    sparse = runs[runs["nonzeros"] < 0.6 * runs["weights"]]["series"].nunique() > 1
    if sparse:
        with_zeros = set(runs[runs["nonzeros"] < 0.99 * runs["weights"]]["series"])  # L2 would be a point at 1×
        names = [each for each in leading if each in with_zeros]
        panels = [_panel(name, rows, names, "compression", measure) for name, rows, measure in groups]
        _figure(folder / "compression.png", panels, shared_legend=True)
        lines += ["![Accuracy against compression](compression.png)", ""]
        lines += [f"*Accuracy against compression, {_caption(runs)}*", ""]
    same = runs[runs["method"].isin(["plain", "delayed", "coherent"]) & ~runs["by_target"]]
    if "coherent" in set(same["method"]):
        panels = []
        for name, rows, measure in groups:
            for penalty in same["penalty"].unique():
                chosen = rows[rows["penalty"].isin([penalty, ""])]
                names = [each for each in leading if each in set(same[same["penalty"] == penalty]["series"])]
                title = f"{name}, {penalty.upper()}" if len(penalty) == 2 else f"{name}, {penalty.replace('_', ' ')}"
                panels.append(_panel(title, chosen, names, "strength", measure))
        _figure(folder / "strength.png", panels, shared_legend=not any(panel.names != leading for panel in panels))
        lines += [
            "![Accuracy against strength](strength.png)",
            "",
            f"*Accuracy against strength, {_caption(runs)}*",
            "",
        ]
    return lines


def _panel(title: str, runs: pd.DataFrame, names: list[str], x: str, measure: str) -> Panel:
    there = [name for name in names if name in set(runs["series"])]
    kept = pd.concat([finished_seeds(rows) for _, rows in runs.groupby("series", sort=False)])
    return Panel(title, summarize(kept), there, x, measure)


def _caption(runs: pd.DataFrame) -> str:
    """What the bands are, and where collapsed networks are."""
    seeds = runs["seed"].nunique()
    bands = "bands are one standard error over the seeds" if seeds > 1 else "one seed"
    if seeds > runs.groupby("problem")["seed"].nunique().min():
        bands += ", and panels without a band have one seed"
    loss = (
        " For text the figure shows the cross-entropy on an inverted axis: up is better."
        if "test_loss" in set(runs["measure"])
        else ""
    )
    marks = "Open triangles are runs below the axes, stacked where they coincide"
    if (runs["nonzeros"] == 0).any():
        marks += "; crosses, whose height means nothing, are networks without weights left"
    return f"exact zeros only; {bands}. {marks}. Runs to the right of the axes are not shown.{loss}"


def _at_equal_compression(problem: str, runs: pd.DataFrame, leads: pd.DataFrame, leading: list[str]) -> list[str]:
    """The table of one problem: each method, and below the lead of the first over each rival."""
    measure = str(runs["measure"].iloc[0])
    kept = pd.concat([finished_seeds(rows) for _, rows in runs.groupby("series", sort=False)])
    table = compression_table(kept[kept["series"] != BASELINE], measure)
    if table.empty:
        return []
    table = table.set_index("method").reindex([name for name in leading if name in set(table["method"])]).reset_index()
    of_problem = leads[leads["problem"] == problem]
    rows = []
    for rival in of_problem["rival"].unique():
        cells = {
            f"{row['compression']}×": lead_cell(row, with_rival=False)
            for _, row in of_problem[of_problem["rival"] == rival].iterrows()
        }
        rows.append({"method": f"*{leading[0]} − {rival}*", **cells})
    table = pd.concat([table, pd.DataFrame(rows)]).fillna("–")
    table = table[[name for name in table.columns if name == "method" or (table[name] != "–").any()]]
    summary = summarize(runs[runs["series"] == BASELINE])
    dense = f" Without a penalty: {percent(summary.iloc[0], measure)}." if len(summary) else ""
    return [
        f"### {problem}",
        "",
        f"{MEASURES[measure]}.{dense} Bold: the best mean of a column.",
        "",
        markdown(table),
        "",
    ]


def _costs(runs: pd.DataFrame, leading: list[str]) -> list[str]:
    lines = [markdown(cost_table(runs, leading)), ""]
    lines += [
        "Seconds are those of the fastest training. Other work ran on the machine, so do not compare methods by them;"
        " [Cost](../../cost.md) compares single steps. The sizes are those of the file that `save_compressed` writes,"
        " interpolated between the runs as the accuracy is.",
        "",
    ]
    misses = target_misses(runs)
    if len(misses):
        lines += ["**Zeros asked for and found**, in percentage points:", "", markdown(misses), ""]
    return lines


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and move it there when it is whole."""
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
