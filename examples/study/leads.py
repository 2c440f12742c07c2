"""Who is ahead, and by how much: the first method of a study against each other at equal compression."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats
from tables import (
    BASELINE,
    COMPRESSIONS,
    at_compressions,
    fewer_seeds,
    finished_seeds,
    gains_of,
    standard_error,
    summarize,
)

VERDICTS = ("ahead", "level", "behind", "better", "worse")
UNITS = {"test_accuracy": "points", "test_loss": "nats"}


def lead_frame(runs: pd.DataFrame, leading: list[str]) -> pd.DataFrame:
    """A row for each problem, rival and compression at which both were measured.

    The lead is the mean over the seeds that both have of the difference seed by seed: in points of accuracy, or in
    nats of cross-entropy, with the sign that makes a positive number one in favour of the first method.
    """
    rows = []
    for problem, of_problem in runs.groupby("problem", sort=False):
        measure = str(of_problem["measure"].iloc[0])
        scale = 100 if measure == "test_accuracy" else -1
        values = {name: _values(of_problem, name, measure) for name in leading}
        for rival in leading[1:]:
            for compression in COMPRESSIONS:
                leads = (scale * (values[leading[0]][compression] - values[rival][compression])).dropna()
                if len(leads):
                    row = {"problem": problem, "measure": measure, "rival": rival, "compression": compression}
                    rows.append({**row, "lead": leads.mean(), "error": standard_error(leads), "seeds": len(leads)})
    columns = ["problem", "measure", "rival", "compression", "lead", "error", "seeds"]
    leads = pd.DataFrame(rows, columns=columns)
    return leads.assign(most_seeds=leads.groupby(["problem", "rival"])["seeds"].transform("max"))


def _values(runs: pd.DataFrame, name: str, measure: str) -> pd.DataFrame:
    return at_compressions(finished_seeds(runs[runs["series"] == name]), measure)


def verdict(lead: pd.Series) -> str:
    """Ahead or behind where a paired t-test over the seeds finds p < 0.05, else level; of one seed, better or worse."""
    if not np.isfinite(lead["error"]):
        return VERDICTS[3] if lead["lead"] > 0 else VERDICTS[4]
    if abs(lead["lead"]) <= stats.t.ppf(0.975, lead["seeds"] - 1) * lead["error"]:
        return "level"
    return "ahead" if lead["lead"] > 0 else "behind"


def against_each_rival(leads: pd.DataFrame) -> pd.DataFrame:
    """How often the first method is ahead, level or behind: a row for each rival, a column for each compression."""
    leads = leads.assign(verdict=leads.apply(verdict, axis=1))
    table: list[dict[str, str]] = []
    for rival, of_rival in leads.groupby("rival", sort=False):
        row = {"alternative": str(rival)}
        for compression in sorted(leads["compression"].unique()):
            counts = of_rival[of_rival["compression"] == compression]["verdict"].value_counts()
            row[f"{compression}×"] = _counted(counts) or "–"
        table.append(row)
    return pd.DataFrame(table)


def over_the_best(leads: pd.DataFrame) -> pd.DataFrame:
    """The lead over the rival that is best at each problem and compression: a row for each of both."""
    return leads.loc[leads.groupby(["problem", "compression"], sort=False)["lead"].idxmin()]


def best_rival_table(leads: pd.DataFrame) -> pd.DataFrame:
    """The lead over the best rival: a row for each problem, a column for each compression."""
    best = over_the_best(leads)
    table: list[dict[str, str]] = []
    for problem, of_problem in best.groupby("problem", sort=False):
        cells = {row["compression"]: lead_cell(row) for _, row in of_problem.iterrows()}
        measure = "accuracy, points" if of_problem["measure"].iloc[0] == "test_accuracy" else "cross-entropy, nats"
        row = {"network and data": str(problem), "measure": measure}
        for compression in sorted(best["compression"].unique()):
            row[f"{compression}×"] = cells.get(compression, "–")
        table.append(row)
    return pd.DataFrame(table)


def lead_cell(row: pd.Series, with_rival: bool = True) -> str:
    """Such as ``+0.3 ± 0.1 (gradual pruning)``, bold where the first method is ahead or behind."""
    text = _signed(row["lead"], row["error"], 1 if row["measure"] == "test_accuracy" else 3)
    text = f"**{text}**" if verdict(row) in ("ahead", "behind") else text
    text += fewer_seeds(row["seeds"], row.get("most_seeds", row["seeds"]))
    return f"{text} ({row['rival']})" if with_rival else text


def _signed(value: float, error: float, digits: int) -> str:
    """A difference and its standard error; with one digit more where the error would be rounded to zero."""
    digits += error < 0.5 * 0.1**digits
    rounded = round(value, digits) + 0.0  # no −0.0
    return f"{rounded:+.{digits}f}" + (f" ± {error:.{digits}f}" if np.isfinite(error) else "")


def change_table(runs: pd.DataFrame, first: str) -> pd.DataFrame:
    """What compression costs with the first method: the accuracy over no penalty in points, seed by seed."""
    table: list[dict[str, str]] = []
    for problem, of_problem in runs.groupby("problem", sort=False):
        dense = of_problem[of_problem["series"] == BASELINE].set_index("seed")["test_accuracy"]
        changes = 100 * _values(of_problem, first, "test_accuracy").sub(dense, axis=0)
        cells = {f"{at}×": (changes[at].mean(), standard_error(changes[at].dropna())) for at in COMPRESSIONS}
        known = {name: _signed(*cell, digits=1) for name, cell in cells.items() if np.isfinite(cell[0])}
        table.append({"network and data": str(problem), **known})
    return (
        pd.DataFrame(table, columns=["network and data", *(f"{at}×" for at in COMPRESSIONS)])
        .dropna(axis="columns", how="all")
        .fillna("–")
    )


def answer(leads: pd.DataFrame, first: str) -> list[str]:
    """The answer in sentences, from the smallest compression to the largest."""
    best = over_the_best(leads)
    best = best.assign(verdict=best.apply(verdict, axis=1))
    of_one = best["problem"].nunique() == 1
    told = _told_of_one if of_one else _told_of_several
    lines = [f"- At {compression}×: {told(cells)}" for compression, cells in best.groupby("compression")]
    where = f" ({best['problem'].iloc[0]})" if of_one else f", counted over {best['problem'].nunique()} networks"
    settings = ", with its default settings," if best["rival"].str.startswith(f"{first}, ").any() else ""
    return [f"{first[0].upper()}{first[1:]}{settings} against the best alternative{where}:", "", *lines, ""]


def _told_of_one(cells: pd.DataFrame) -> str:
    """Such as ``level with *PAT, top-k*. The lead is -0.2 ± 0.1 points.``"""
    row = cells.iloc[0]
    words = {"ahead": "ahead of", "level": "level with", "behind": "behind", "better": "better than"}
    than = words.get(row["verdict"], "worse than")
    lead = f"{lead_cell(row, with_rival=False)} {UNITS[row['measure']]}"
    return f"{than} *{row['rival']}*. The lead is {lead}."


def _told_of_several(cells: pd.DataFrame) -> str:
    return f"{_counted(cells['verdict'].value_counts())}. {_extremes(cells)}"


def _counted(counts: pd.Series) -> str:
    """Such as ``ahead on 3, level on 2``."""
    words = [f"{name} on {counts[name]}" for name in VERDICTS if name in counts]
    return ", ".join(words) + (" (one seed)" if {"better", "worse"} & set(counts.index) else "")


def _extremes(cells: pd.DataFrame) -> str:
    """The largest and the smallest lead among the networks of each measure."""
    sentences = []
    for measure, of_measure in cells.groupby("measure"):
        ordered = of_measure.sort_values("lead")
        ends = [ordered.iloc[0]] if len(ordered) == 1 else [ordered.iloc[0], ordered.iloc[-1]]
        told = [f"{lead_cell(row, with_rival=False)} {UNITS[str(measure)]} ({row['problem']})" for row in ends]
        sentences.append(("The lead is " if len(told) == 1 else "The lead is between ") + " and ".join(told) + ".")
    return " ".join(sentences)


def gain_answer(runs: pd.DataFrame) -> list[str]:
    """Whether the accuracy rises over no penalty, for each problem and method, in sentences."""
    lines = []
    for problem, of_problem in runs.groupby("problem", sort=False):
        told = []
        for series, rows in of_problem.groupby("series", sort=False):
            summary = summarize(rows)
            gains = 100 * gains_of(
                of_problem, str(series), summary.loc[summary["validation_accuracy"].idxmax(), "strength"]
            )
            if series == BASELINE or gains.empty:
                continue
            lead = {"lead": gains.mean(), "error": standard_error(gains), "seeds": len(gains)}
            lead = pd.Series({**lead, "measure": "test_accuracy"})
            told.append(f"{lead_cell(lead, with_rival=False)} with {series}")
        lines.append(f"- {problem}: {'; '.join(told)}.")
    about = "The gain over no penalty in points of test accuracy, at the strength that is best on validation data; bold"
    return [f"{about} where a paired t-test over the seeds finds p < 0.05:", "", *lines, ""]
