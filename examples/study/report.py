"""A study's report: CSV, a Markdown page with tables, and figures."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from data import is_text
from figures import draw_accuracy_by_strength, draw_frontier, draw_headline
from grid import Run, Study
from methods import PENALTY_TITLES, Method
from problems import Problem
from tables import BASELINE, MEASURES, compression_table, lead_table, reach_table, summarize
from training import Outcome


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
    summary, measure = summarize(chosen), _measure(chosen)
    _write(folder / f"{stem}-headline.png", lambda path: draw_headline(summary, leading, path, measure))
    table = compression_table(chosen[chosen["series"] != BASELINE], measure)
    return [
        f"![{MEASURES[measure]} against compression]({stem}-headline.png)",
        "",
        f"**{MEASURES[measure]} at equal compression**",
        "",
        _markdown(pd.concat([table, lead_table(chosen, leading, measure)])),
        "",
    ]


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
        for measure in dict.fromkeys(["test_accuracy", _measure(runs)]):
            table = compression_table(runs, measure)
            lines += [f"**{MEASURES[measure]} at equal compression**", "", _markdown(table), ""]
    return lines


def _measure(runs: pd.DataFrame) -> str:
    """What the methods are compared by on one problem."""
    return str(runs["measure"].iloc[0])


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
            measure = "test_loss" if is_text(run.problem.data) else "test_accuracy"
            labels = {"problem": titles[run.problem], "measure": measure, **_labels(run)}
            rows.append({**labels, **outcome, "compression": ratio})
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
        "by_target": method.target_sparsity is not None,
        "strength": method.strength if method.strength is not None else _pruned_to(method),
        "seed": run.seed,
    }


def _pruned_to(method: Method) -> float | None:
    """The compression that a method aims at; ``None`` where it aims at none."""
    return method.compression if method.target_sparsity is None else 1 / (1 - method.target_sparsity)


def _what_was_run(study: Study, runs: pd.DataFrame) -> str:
    lines = []
    for problem, title in _problem_titles(study).items():
        done = runs[runs["problem"] == title]
        images = f"{done['train_images'].iloc[0]:,}" if len(done) else "no run is done; its"
        inputs = "sequences" if is_text(problem.data) else "images"
        rising = f" after a rise over {problem.lr_warmup} steps" if problem.lr_warmup else ""
        lines.append(
            f"- {title}: {images} training {inputs}, {problem.epochs} epochs, batches of {problem.batch_size},"
            f" {problem.optimizer_title}, learning rate {problem.lr:g} falling to zero as a cosine{rising},"
            f" {'augmented by ' + problem.augment if problem.augment else 'no augmentation'}."
        )
    seeds = sorted({run.seed for run in study.runs})
    return "\n".join(
        [
            f"{len(runs):,} of {len(study.runs):,} runs are done. Seeds {seeds[0]} to {seeds[-1]}.",
            "",
            *lines,
            "",
            "Accuracies are in %, on test data that no choice was made on; of text, accuracy is the share of the next"
            " characters that are predicted. Strengths were chosen on validation data. ± is the standard error over the"
            " seeds. Compression is weights over nonzeros; only exact zeros count, as `sparsity/model` shows them."
            " *Gain* is over no penalty, in points, seed by seed. *File of this* is the size of the weights as"
            " `save_compressed` stores them, at most 1 point below no penalty. *Endures* is the largest strength at"
            " which every seed gets above the middle between chance and the accuracy without penalty; ≥ where no"
            " larger one was tried. *Seconds* are those of one training, and *time* is relative to no penalty.",
        ]
    )


def _write(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
