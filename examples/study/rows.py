"""The rows of runs.csv, one for each run that is done: what a report writes, and a later study may read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from data import is_text
from grid import Run, Study
from methods import Method
from names import method_names, problem_names
from training import Outcome

NUMBERS = "%.6g"
"""How numbers are written."""
_OUTCOME = [field.name for field in dataclasses.fields(Outcome)]
_LABELS = ["problem", "title", "target_sparsity", "strength", "seed"]
"""What tells the runs of a study apart."""


class KnownRowsError(ValueError):
    """A file with rows that are none of the study's."""


def runs_frame(study: Study, outcomes: dict[str, Outcome]) -> pd.DataFrame:
    """One row for each run that is done."""
    rows = []
    problems = problem_names(run.problem for run in study.runs)
    names = method_names([run.method for run in study.runs], study.headline)
    asked = Counter((run.problem, run.method.title, run.seed) for run in study.runs)
    done = Counter((run.problem, run.method.title, run.seed) for run in study.runs if run.key in outcomes)
    for run in study.runs:
        if run.key in outcomes:
            outcome = dataclasses.asdict(outcomes[run.key])
            ratio = outcome["weights"] / outcome["nonzeros"] if outcome["nonzeros"] else np.inf
            measure = "test_loss" if is_text(run.problem.data) else "test_accuracy"
            place = run.problem, run.method.title, run.seed
            labels: dict[str, object] = {"problem": problems[run.problem], "measure": measure}
            labels |= {"series": names[run.method.title], **_labels(run), "seed_finished": done[place] == asked[place]}
            rows.append({**labels, **outcome, "compression": ratio})
    return pd.DataFrame(rows)


def _labels(run: Run) -> dict[str, object]:
    method = run.method
    penalty = "l2" if method.method == "cautious_weight_decay" else method.penalty or ""
    return {
        "title": method.title,
        "method": method.method,
        "penalty": penalty,
        "update": method.update or "",
        "coherence": method.coherence or "",
        "scope": method.scope or "",
        "by_target": method.target_sparsity is not None,
        "target_sparsity": method.target_sparsity,
        "strength": method.strength if method.strength is not None else _pruned_to(method),
        "seed": run.seed,
    }


def _pruned_to(method: Method) -> float | None:
    """The compression that a method aims at; ``None`` where it aims at none."""
    return method.compression if method.target_sparsity is None else 1 / (1 - method.target_sparsity)


def read_outcomes(study: Study, path: Path) -> dict[str, Outcome]:
    """What came out of runs of the study, by their keys, from the runs.csv of an earlier report.

    A row has the names of its problem and method, not all of their settings: the caller must know that these are the
    same.

    Raises:
        KnownRowsError: If the file cannot be read, lacks a column, or has a row that is no run of the study, that is
            there twice, or whose numbers contradict each other or the study.
    """
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise KnownRowsError(f"The rows {path} cannot be read: {error}") from error
    if missing := [name for name in (*_LABELS, *_OUTCOME, "compression") if name not in rows]:
        raise KnownRowsError(f"The rows {path} have no column {missing[0]!r}. They must be the runs.csv of a report.")
    problems = problem_names(run.problem for run in study.runs)
    asked = {_title({"problem": problems[run.problem], **_labels(run)}): run for run in study.runs}
    outcomes: dict[str, Outcome] = {}
    for line, row in enumerate(rows.to_dict("records"), 2):
        title = _title(row)
        run, outcome = asked.get(title), Outcome(**{name: row[name] for name in _OUTCOME})
        if run is None:
            fault = "is no run of this study"
        elif run.key in outcomes:
            fault = "is there twice"
        elif not _agree(run, outcome, row["compression"]):
            fault = "has numbers that contradict each other or the study"
        else:
            outcomes[run.key] = outcome
            continue
        raise KnownRowsError(f"Line {line} of {path} {fault}: {title}.")
    return outcomes


def _title(row: Mapping[Any, Any]) -> str:
    """What tells a run of a study from the others."""
    numbers = (
        f"{name} {NUMBERS % row[name]}" for name in ("target_sparsity", "strength", "seed") if pd.notna(row[name])
    )
    return ", ".join([f"{row['problem']}: {row['title']}", *numbers])


def _agree(run: Run, outcome: Outcome, compression: float) -> bool:
    """Whether the numbers can be those of the run."""
    ratio = outcome.weights / outcome.nonzeros if outcome.nonzeros else np.inf
    shares = (outcome.validation_accuracy, outcome.test_accuracy)
    return (
        bool(np.isclose(ratio, compression, rtol=1e-5))
        and all(0 <= share <= 1 for share in shares)
        and run.problem.train_images in (None, outcome.train_images)
    )
