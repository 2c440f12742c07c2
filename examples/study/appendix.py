"""The appendix of a report: every method on every problem, with figures and tables for each penalty."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pandas as pd
from figures import Panel, split
from grid import Study
from methods import PENALTY_TITLES
from page import markdown
from tables import BASELINE, MEASURES, compression_table, finished_seeds, reach_table, strength_table, summarize


def appendix_page(study: Study, runs: pd.DataFrame, draw: Callable[[str, Sequence[Panel]], None]) -> list[str]:
    """The page as lines; ``draw`` gets the name of each figure and its panels."""
    page = [f"# {study.title or study.name}: every method", "", *_WORDS, ""]
    for problem, of_problem in runs.groupby("problem", sort=False):
        stem = re.sub(r"[^a-z0-9_.]+", "-", str(problem).lower())
        page += [f"## {problem}", ""]
        for penalty in [penalty for penalty in of_problem["penalty"].unique() if penalty] or [""]:
            compared = of_problem[of_problem["penalty"].isin([penalty, ""])]
            stem_of_penalty = "-".join(part for part in (stem, penalty) if part)
            page += _section(compared, str(problem), str(penalty), stem_of_penalty, draw)
    return page


_WORDS = [
    "*Gain* is over no penalty, in points, seed by seed. *Endures* is the largest strength at which every seed gets"
    " above the middle between chance and the accuracy without penalty; ≥ where no larger one was tried. *× plain* is"
    " that strength over the one that the plain penalty endures. *File of this* is the size of the weights as"
    " `save_compressed` stores them, at most 1 point below no penalty. *Seconds* are those of one training, and *time*"
    " is relative to no penalty. Settings were chosen on validation data, and the numbers are on test data. Bands in"
    " the figures are one standard error over the seeds, open triangles are runs below the axes, and crosses, whose"
    " height means nothing, are networks without weights. PAT, spred and linearized Bregman have strengths λ of their"
    " own meaning: do not compare their places on this axis with those of others."
]


def _section(
    runs: pd.DataFrame, problem: str, penalty: str, stem: str, draw: Callable[[str, Sequence[Panel]], None]
) -> list[str]:
    """Figures and tables for one penalty on one problem, beside no penalty and pruning."""
    makes_zeros = penalty != "l2"
    if not makes_zeros:
        runs = runs[~runs["method"].isin(["magnitude_pruning", "pat_top_k"])]
    kept = pd.concat([finished_seeds(rows) for _, rows in runs.groupby("series", sort=False)])
    summary, measure = summarize(kept), str(runs["measure"].iloc[0])
    title = PENALTY_TITLES.get(penalty, "Without a penalty")
    heading = f"{problem}: {title}"
    lines = [f"### {title[0].upper()}{title[1:]}", ""]
    if makes_zeros and (panels := list(split(heading, summary, "compression", measure))):
        draw(f"{stem}-compression.png", panels)
        lines += [f"![{title}: accuracy against compression]({stem}-compression.png)", ""]
    with_strength = summary[~summary["method"].isin(["magnitude_pruning", "pat_top_k"]) & ~summary["by_target"]]
    if panels := list(split(heading, with_strength, "strength", measure)):
        draw(f"{stem}-strength.png", panels)
        lines += [f"![{title}: accuracy against strength]({stem}-strength.png)", ""]
    lines += ["**What each method reaches**", "", markdown(reach_table(runs)), ""]
    if len(with_strength[with_strength["series"] != BASELINE]):
        table = strength_table(with_strength, measure)
        lines += [f"**{MEASURES[measure]} and compression at each strength**", "", markdown(table), ""]
    if makes_zeros:
        for each in dict.fromkeys(["test_accuracy", measure]):
            table = compression_table(kept, each)
            if len(table):
                lines += [f"**{MEASURES[each]} at equal compression**", "", markdown(table), ""]
    return lines
