"""The report: numbers against plain Python, tables that hold them, and files that are whole or not there."""

import dataclasses
import math
import re
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import report
from figures import Panel, draw_grid
from grid import Run, Study
from leads import against_each_rival, best_rival_table, change_table, lead_frame
from methods import Method
from names import method_names, problem_names
from problems import Problem
from report import runs_frame, write_report
from tables import at_compressions, compression_table, endured_strength, finished_seeds, reach_table, summarize
from training import Outcome

from .outcomes import PROBLEM, outcome, plain

COHERENT = {"method": "coherent", "penalty": "l1", "update": "proximal", "coherence": "agreement", "scope": "element"}
OURS, PLAIN, PRUNED = "this package", "plain L1", "gradual pruning"

Results = list[tuple[Run, Outcome]]


def over_seeds(method: Method, outcomes: list[Outcome], problem: Problem = PROBLEM) -> Results:
    """A method's outcomes from seed 0 on."""
    return [(Run(problem, method, seed), found) for seed, found in enumerate(outcomes)]


def coherent(strength: float) -> Method:
    return Method(**COHERENT, strength=strength)


SEEDS = (0.0, 0.01, 0.04)
"""What each seed has on top."""


def of_seeds(accuracy: float, nonzeros: int, **more: float) -> list[Outcome]:
    return [outcome(accuracy + extra, nonzeros, validation=accuracy + extra, **more) for extra in SEEDS]


RESULTS: Results = [
    *over_seeds(Method(), of_seeds(0.9, 1_000, seconds=2.0)),
    *over_seeds(plain(0.01), of_seeds(0.91, 200, seconds=3.0)),
    *over_seeds(plain(0.1), of_seeds(0.7, 50, seconds=3.0)),
    *over_seeds(plain(1.0), [outcome(0.1, 0, seconds=3.0)] * 3),
    *over_seeds(coherent(0.01), of_seeds(0.9, 500, seconds=4.0)),
    *over_seeds(coherent(0.1), of_seeds(0.896, 20, seconds=4.0)),
    *over_seeds(coherent(1.0), of_seeds(0.8, 5, seconds=4.0)),
    *over_seeds(Method("magnitude_pruning", compression=10), of_seeds(0.9, 100, seconds=2.2)),
    *over_seeds(Method("magnitude_pruning", compression=30), of_seeds(0.6, 33, seconds=2.2)),
]


def study_named(name: str, runs: list[Run]) -> Study:
    """A study of these runs, and nothing else that a study file may say."""
    others = [field.name for field in dataclasses.fields(Study) if field.name not in ("name", "runs")]
    return Study(name=name, runs=runs, **{other: [] for other in others})


def study_of(results: Results) -> tuple[Study, dict[str, Outcome]]:
    return study_named("tiny", [run for run, _ in results]), {run.key: found for run, found in results}


@pytest.fixture
def runs() -> pd.DataFrame:
    return runs_frame(*study_of(RESULTS))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_means_and_errors_are_those_of_plain_python(runs: pd.DataFrame) -> None:
    assert len(runs) == len(RESULTS)
    summary = summarize(runs)
    assert len(summary) == 9
    for method in dict.fromkeys(run.method for run, _ in RESULTS):
        of_method = [found for run, found in RESULTS if run.method == method]
        axis = method.compression if method.strength is None else method.strength
        same = summary["strength"].isna() if axis is None else summary["strength"] == axis
        [(_, row)] = list(summary[same & (summary["title"] == method.title)].iterrows())
        assert row["seeds"] == 3
        for column in ("test_accuracy", "test_loss"):
            mean, error = mean_and_error([getattr(found, column) for found in of_method])
            assert row[column] == pytest.approx(mean)
            assert row[f"{column}_error"] == pytest.approx(error)
        assert row["validation_accuracy"] == pytest.approx(statistics.mean(f.validation_accuracy for f in of_method))
        assert row["lowest_validation_accuracy"] == min(f.validation_accuracy for f in of_method)
        assert row["seconds"] == statistics.median(f.seconds for f in of_method)
        if of_method[0].nonzeros:
            assert row["compression"] == pytest.approx(1_000 / of_method[0].nonzeros)
        else:
            assert math.isnan(row["compression"])


def test_one_seed_has_no_error(runs: pd.DataFrame) -> None:
    summary = summarize(runs[runs["seed"] == 0])
    assert summary["test_accuracy_error"].isna().all()
    for table in (reach_table(runs[runs["seed"] == 0]), compression_table(runs[runs["seed"] == 0])):
        assert "±" not in table.to_string()
        assert "nan" not in table.to_string().lower()


def test_problems_are_not_averaged() -> None:
    """Problems may differ in more than their images and network."""
    longer = Problem("digits", "deep_mlp", epochs=200, lr=0.02)
    results = over_seeds(Method(), [outcome(0.5)] * 2) + over_seeds(Method(), [outcome(0.9)] * 2, longer)
    summary = summarize(runs_frame(*study_of(results)))
    assert sorted(summary["test_accuracy"]) == pytest.approx([0.5, 0.9])


def test_delays_are_not_averaged() -> None:
    results = [
        pair
        for delay, accuracy in ((0.1, 0.5), (0.5, 0.9))
        for pair in over_seeds(
            Method("delayed", penalty="l1", strength=0.1, update="proximal", delay=delay), [outcome(accuracy)] * 2
        )
    ]
    summary = summarize(runs_frame(*study_of(results)))
    assert sorted(summary["test_accuracy"]) == pytest.approx([0.5, 0.9])


def curve(points: list[tuple[float, float]], seed: int = 0) -> pd.DataFrame:
    """The runs of one method from one seed: (compression, accuracy)."""
    columns = {"compression": [p[0] for p in points], "test_accuracy": [p[1] for p in points]}
    return pd.DataFrame({"seed": seed, "seed_finished": True, **columns})


POINTS = [(200.0, 0.5), (5.0, 0.9), (20.0, 0.7), (np.inf, 0.1)]  # as they come; a dead one among them


def test_accuracy_between_strengths_is_interpolated_in_the_logarithm() -> None:
    [found] = at_compressions(curve(POINTS)).to_dict("records")
    assert list(found) == [2, 4, 10, 30, 100, 300]
    assert found[10] == pytest.approx(0.9 - 0.2 * math.log(10 / 5) / math.log(20 / 5))
    assert found[30] == pytest.approx(0.7 - 0.2 * math.log(30 / 20) / math.log(200 / 20))
    assert found[100] == pytest.approx(0.7 - 0.2 * math.log(100 / 20) / math.log(200 / 20))
    assert math.isnan(found[4])
    assert math.isnan(found[300])


def test_edges_have_two_percent_of_room() -> None:
    [found] = at_compressions(curve([(10.1, 0.8), (98.5, 0.6)])).to_dict("records")
    assert found[10] == pytest.approx(0.8)
    assert found[100] == pytest.approx(0.6)
    [found] = at_compressions(curve([(10.3, 0.8), (97.0, 0.6)])).to_dict("records")
    assert math.isnan(found[10])
    assert math.isnan(found[100])
    assert not math.isnan(found[30])


def test_compression_that_a_seed_does_not_reach_is_no_number() -> None:
    both = pd.concat([curve(POINTS), curve([(5.0, 0.8), (50.0, 0.6), (np.inf, 0.1)], seed=1)])
    found = at_compressions(both)
    assert list(found.index) == [0, 1]
    assert found[[10, 30]].notna().to_numpy().all()
    assert found[[2, 4, 100, 300]].isna().to_numpy().all()
    assert at_compressions(pd.concat([curve(POINTS), curve([(np.inf, 0.1)], seed=1)])).isna().to_numpy().all()


def strengths(lowest: dict[float, float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "strength": list(lowest),
            "lowest_validation_accuracy": list(lowest.values()),
            "validation_accuracy": list(lowest.values()),
            "classes": 10,
        }
    )


def test_endured_strength_is_the_largest_at_which_all_seeds_learn() -> None:
    baseline = pd.Series({"validation_accuracy": 0.9})  # so the middle is 0.5
    assert endured_strength(strengths({1.0: 0.1, 0.1: 0.51, 0.01: 0.8}), baseline) == (0.1, False)
    assert endured_strength(strengths({0.01: 0.8, 0.1: 0.5, 1.0: 0.49}), baseline) == (0.01, False)
    assert endured_strength(strengths({0.01: 0.8, 0.1: 0.7}), baseline) == (0.1, True)
    strength, last = endured_strength(strengths({0.01: 0.2, 0.1: 0.1}), baseline)
    assert math.isnan(strength)
    assert last is False
    # Without a baseline, against the method's own best.
    assert endured_strength(strengths({0.01: 0.7, 0.1: 0.41, 1.0: 0.3}), None) == (0.1, False)


# -- tables ----------------------------------------------------------------------------------------------------------


def rows_of(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in table.to_dict("records")}


def test_table_of_what_is_reached(runs: pd.DataFrame) -> None:
    table = rows_of(reach_table(runs))
    assert list(table) == ["no penalty", PLAIN, OURS, PRUNED]
    extra, error = mean_and_error([100 * value for value in SEEDS])

    row = table["no penalty"]
    assert row["best accuracy"] == f"{90 + extra:.1f} ± {error:.1f}"
    assert [row[name] for name in ("gain", "at strength", "endures", "× plain")] == ["–"] * 4
    assert row["time"] == "1.00"

    row = table[PLAIN]
    assert row["best accuracy"] == f"{91 + extra:.1f} ± {error:.1f}"
    assert row["gain"] == "+1.0 ± 0.0"
    assert row["at strength"] == "0.01"
    assert row["compression at ≤ 0.5 points loss"] == f"5× ({91 + extra:.1f} ± {error:.1f})"
    assert row["endures"] == "0.1"
    assert row["× plain"] == "1"
    assert row["time"] == "1.50"

    row = table[OURS]
    assert row["gain"] == "+0.0 ± 0.0"
    assert row["at strength"] == "0.01"
    assert row["compression at ≤ 0.5 points loss"] == f"50× ({89.6 + extra:.1f} ± {error:.1f})"
    assert row["endures"] == "≥ 1"
    assert row["× plain"] == "≥ 10"
    assert row["time"] == "2.00"

    row = table[PRUNED]
    assert row["compression at ≤ 1 points loss"] == f"10× ({90 + extra:.1f} ± {error:.1f})"
    assert [row[name] for name in ("at strength", "endures", "× plain")] == ["–"] * 3


def test_endurance_is_relative_to_plain_without_favours() -> None:
    favoured = [dataclasses.replace(plain(strength), warmup=0.3) for strength in (0.01, 0.1)]
    results = over_seeds(Method(), of_seeds(0.9, 1_000))
    results += over_seeds(plain(0.01), of_seeds(0.9, 100)) + over_seeds(plain(0.1), [outcome(0.1, 0)] * 3)
    results += [pair for method in favoured for pair in over_seeds(method, of_seeds(0.9, 100))]
    table = reach_table(runs_frame(*study_of(results))).set_index("method")
    assert table["× plain"].to_dict() == {"no penalty": "–", PLAIN: "1", f"{PLAIN}, warm-up 30 %": "≥ 10"}


def test_method_that_never_learns_endures_none() -> None:
    results = over_seeds(Method(), of_seeds(0.9, 1_000)) + over_seeds(plain(0.1), [outcome(0.1, 0)] * 3)
    row = rows_of(reach_table(runs_frame(*study_of(results))))[PLAIN]
    assert row["endures"] == "none"
    assert row["× plain"] == "–"
    assert row["compression at ≤ 0.5 points loss"] == "none"


def test_table_at_equal_compression(runs: pd.DataFrame) -> None:
    table = rows_of(compression_table(runs))
    extra, error = mean_and_error([100 * value for value in SEEDS])
    assert set(table) == {PLAIN, OURS, PRUNED}  # without compression there is nothing to compare
    assert table[PLAIN]["4×"] == "–"
    at_10 = 91 - 21 * math.log(10 / 5) / math.log(20 / 5)
    assert table[PLAIN]["10×"] == f"{at_10 + extra:.1f} ± {error:.1f}"
    assert table[PLAIN]["30×"] == table[PLAIN]["100×"] == "–"
    assert table[PRUNED]["10×"] == f"**{90 + extra:.1f} ± {error:.1f}**"
    at_30 = 90 - 30 * math.log(3) / math.log(1_000 / 33 / 10)
    assert table[PRUNED]["30×"] == f"{at_30 + extra:.1f} ± {error:.1f}"
    of_coherent = table[OURS]
    assert of_coherent["4×"].startswith("**")
    assert of_coherent["10×"] == f"{90 - 0.4 * math.log(5) / math.log(25) + extra:.1f} ± {error:.1f}"
    assert of_coherent["100×"] == f"**{89.6 - 9.6 * math.log(2) / math.log(4) + extra:.1f} ± {error:.1f}**"
    assert of_coherent["300×"] == "–"


# -- files -----------------------------------------------------------------------------------------------------------


def text_of(folder: Path) -> str:
    """The page and its appendix."""
    return (folder / "index.md").read_text() + (folder / "appendix.md").read_text()


def test_report_is_a_page_with_tables_figures_and_numbers(tmp_path: Path, runs: pd.DataFrame) -> None:
    folder = write_report(*study_of(RESULTS), tmp_path / "reports" / "tiny")
    assert folder == tmp_path / "reports" / "tiny"
    stem = "deep-mlp-on-digits-sgd-l1"
    figures = {"compression.png", "strength.png", f"{stem}-compression.png", f"{stem}-strength.png"}
    pages = {"index.md", "appendix.md", "runs.csv", "summary.csv"}
    assert {path.name for path in folder.iterdir()} == pages | figures
    page = (folder / "index.md").read_text()
    assert page.startswith("# tiny\n\n## The answer\n")
    assert "27 of 27 runs are done, from seeds 0 to 2." in page
    assert "- deep MLP on digits, SGD: 1,118 training images, 2 epochs, batches of 128" in page
    assert max(len(line) for line in page.splitlines() if line[:1] not in ("|", "!")) <= 120
    text = text_of(folder)
    for figure in figures:
        assert f"({figure})" in text
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    for table in (reach_table(runs), compression_table(runs)):
        assert list(table.columns) in lines
        for row in table.to_numpy().tolist():
            assert row in lines
    written = pd.read_csv(folder / "runs.csv")
    assert written["test_accuracy"].tolist() == pytest.approx([found.test_accuracy for _, found in RESULTS])
    assert len(pd.read_csv(folder / "summary.csv")) == 9


def test_headline_shows_who_leads_by_how_much(tmp_path: Path, runs: pd.DataFrame) -> None:
    study, outcomes = study_of(RESULTS)
    titles = [coherent(0.1).title, plain(0.1).title]
    page = (write_report(dataclasses.replace(study, headline=titles), outcomes, tmp_path) / "index.md").read_text()
    first, other = (at_compressions(runs[runs["series"] == name])[10] for name in (OURS, PLAIN))
    leads = [100 * (one - two) for one, two in zip(first, other, strict=True)]
    mean, error = mean_and_error(leads)
    frame = lead_frame(runs, [OURS, PLAIN])
    [(_, row)] = list(frame[frame["compression"] == 10].iterrows())
    assert (row["lead"], row["error"], row["seeds"]) == (pytest.approx(mean), pytest.approx(error), 3)
    assert abs(mean) > 4.303 * error  # the 97.5 % quantile of Student's t with two degrees of freedom
    assert f"**{mean:+.2f} ± {error:.2f}** ({PLAIN})" in page, "two digits, for an error that is 0.0 with one"
    assert PRUNED not in page.split("## How it was measured")[0]


def made_up_leads(*leads: tuple[str, str, float, float]) -> pd.DataFrame:
    """Leads at 10×: problem, rival, points and their error."""
    rows = [(problem, "test_accuracy", rival, 10, lead, error, 3) for problem, rival, lead, error in leads]
    return pd.DataFrame(rows, columns=["problem", "measure", "rival", "compression", "lead", "error", "seeds"])


def test_ahead_takes_a_t_test_and_the_best_rival_counts() -> None:
    """With three seeds, p < 0.05 takes a lead of 4.303 standard errors."""
    leads = made_up_leads(
        ("a", "x", 1.73, 0.4), ("a", "y", 1.71, 0.4), ("b", "x", -1.73, 0.4), ("b", "y", 2.0, math.nan)
    )
    assert against_each_rival(leads)["10×"].tolist() == [
        "ahead on 1, behind on 1",
        "level on 1, better on 1 (one seed)",
    ]
    assert best_rival_table(leads)["10×"].tolist() == ["+1.7 ± 0.4 (y)", "**-1.7 ± 0.4** (x)"]


def test_what_compression_costs_is_the_accuracy_over_no_penalty(runs: pd.DataFrame) -> None:
    [row] = change_table(runs, OURS).to_dict("records")
    without = runs[runs["series"] == "no penalty"].set_index("seed")["test_accuracy"]
    changes = 100 * (at_compressions(runs[runs["series"] == OURS])[10] - without)
    mean, error = mean_and_error(changes.tolist())
    assert row["10×"] == f"{mean:+.2f} ± {error:.2f}"
    assert row["4×"] != "–"
    assert "2×" in row
    assert "300×" not in row


def test_seed_that_is_not_finished_does_not_hide_the_others() -> None:
    results = [*over_seeds(coherent(0.01), of_seeds(0.9, 300)), *over_seeds(coherent(0.1), of_seeds(0.8, 20))]
    results += [*over_seeds(plain(0.01), of_seeds(0.8, 300)), *over_seeds(plain(0.1), of_seeds(0.7, 20))]
    study, outcomes = study_of(results)
    del outcomes[Run(PROBLEM, plain(0.1), 2).key]
    frame = lead_frame(runs_frame(study, outcomes), [OURS, PLAIN])
    assert frame[frame["compression"] == 10][["lead", "seeds"]].to_numpy().tolist() == [[pytest.approx(10), 2]]


def test_target_that_is_not_done_in_every_seed_is_shown_with_its_number_of_seeds() -> None:
    pruned = [Method("magnitude_pruning", target_sparsity=sparsity) for sparsity in (0.5, 0.9, 0.99)]
    results = [*over_seeds(coherent(0.01), of_seeds(0.9, 500)), *over_seeds(coherent(1), of_seeds(0.6, 10))]
    results += [
        each for i, method in enumerate(pruned) for each in over_seeds(method, of_seeds(0.9, (500, 100, 10)[i]))
    ]
    study, outcomes = study_of(results)
    del outcomes[Run(PROBLEM, pruned[1], 2).key]
    runs = runs_frame(study, outcomes)
    row = rows_of(compression_table(finished_seeds(runs)))[PRUNED]
    assert {name: "(2 seeds)" in row[name] for name in ("2×", "10×", "100×")} == {
        "2×": False,
        "10×": True,
        "100×": False,
    }
    assert row["10×"] == "**90.5 ± 0.5 (2 seeds)**"
    [lead] = best_rival_table(lead_frame(runs, [OURS, PRUNED]))[["2×", "10×"]].to_numpy().tolist()
    assert ["(2 seeds)" in cell for cell in lead] == [False, True]


def test_names_say_what_a_method_is_and_how_it_differs_from_the_first_of_its_kind() -> None:
    default = Method(**COHERENT | {"update": "dual_averaging"}, averaging=0.98, tolerance=0.1, target_sparsity=0.9)
    other = Method(**COHERENT, strength=0.1, warmup=0.3)
    assert list(method_names([Method(), other, default], [default.title]).values()) == [
        "this package",
        "no penalty",
        "this package, no tolerance, no averaging, proximal update, warm-up 30 %, by strength",
    ]
    longer = dataclasses.replace(PROBLEM, epochs=9)
    assert set(problem_names([PROBLEM, longer]).values()) == {f"deep MLP on digits, SGD, epochs {n}" for n in (2, 9)}


def test_l2_is_compared_without_zeros(tmp_path: Path) -> None:
    results = [
        *over_seeds(Method(), of_seeds(0.9, 1_000)),
        *over_seeds(Method("plain", penalty="l2", strength=0.1, update="gradient"), of_seeds(0.91, 1_000)),
        *over_seeds(Method("cautious_weight_decay", strength=0.1), of_seeds(0.92, 1_000)),
        *over_seeds(Method("magnitude_pruning", compression=10), of_seeds(0.9, 100)),
    ]
    folder = write_report(*study_of(results), tmp_path)
    assert {path.name for path in folder.glob("*.png")} == {"deep-mlp-on-digits-sgd-l2-strength.png"}
    page = (folder / "appendix.md").read_text()
    assert "| cautious weight decay |" in page
    assert PRUNED not in page
    assert "equal compression" not in page
    answer = "+1.00 ± 0.00** with plain L2"
    assert answer in (folder / "index.md").read_text()


def test_networks_that_are_all_dead_break_nothing(tmp_path: Path) -> None:
    dead = [outcome(0.1, 0)] * 3
    results = over_seeds(Method(), of_seeds(0.9, 1_000))
    results += over_seeds(plain(0.1), dead) + over_seeds(plain(1.0), dead) + over_seeds(coherent(1.0), dead)
    page = text_of(write_report(*study_of(results), tmp_path))
    assert "| none" in page
    assert "nan" not in page.lower()
    assert not re.search(r"\binf\b", page.lower())


def test_one_seed_shows_no_error(tmp_path: Path) -> None:
    page = (write_report(*study_of([pair for pair in RESULTS if pair[0].seed == 0]), tmp_path) / "index.md").read_text()
    tables = "".join(line for line in page.splitlines() if line.startswith("|"))
    assert "90.0" in tables
    assert "±" not in tables
    assert "nan" not in tables


def test_report_of_a_part_says_so(tmp_path: Path) -> None:
    study, outcomes = study_of(RESULTS)
    some = dict(list(outcomes.items())[:10])
    page = (write_report(study, some, tmp_path) / "index.md").read_text()
    assert "10 of 27 runs are done." in page


def test_problem_of_which_nothing_is_done_does_not_stop_the_report(tmp_path: Path) -> None:
    other = Problem("digits", "lenet_5", epochs=2, lr=0.02)
    study, outcomes = study_of(RESULTS)
    runs = [*study.runs, *(Run(other, Method(), seed) for seed in range(3))]
    page = (write_report(study_named("tiny", runs), outcomes, tmp_path) / "index.md").read_text()
    assert "27 of 30 runs are done." in page
    assert PLAIN in page


def test_study_without_penalties_still_shows_what_came_out(tmp_path: Path) -> None:
    results = over_seeds(Method(), of_seeds(0.9, 1_000))
    results += over_seeds(Method("magnitude_pruning", compression=10), of_seeds(0.8, 100))
    page = (write_report(*study_of(results), tmp_path) / "index.md").read_text()
    assert PRUNED in page


def test_study_without_a_baseline_is_reported(tmp_path: Path) -> None:
    page = (write_report(*study_of(RESULTS[3:12]), tmp_path) / "index.md").read_text()
    assert PLAIN in page
    assert "nan" not in page.lower()


def test_image_folder_within_a_folder_is_reported(tmp_path: Path) -> None:
    problem = Problem("folder:photos/small", "deep_mlp", epochs=2, lr=0.02)
    results = over_seeds(Method(), of_seeds(0.9, 1_000), problem) + over_seeds(plain(0.1), of_seeds(0.9, 50), problem)
    folder = write_report(*study_of(results), tmp_path)
    assert len(list(folder.glob("**/*.png"))) == 2


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(*study_of(RESULTS), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(panels: object, path: Path, shared_legend: bool) -> None:
        path.write_bytes(b"\x89PNG half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "draw_grid", half)
    with pytest.raises(OSError, match="No space left"):
        write_report(*study_of(RESULTS), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items() if name[-3:] == "png")
    with pytest.raises(OSError, match="No space left"):
        write_report(*study_of(RESULTS), tmp_path / "fresh")
    assert not [path for path in (tmp_path / "fresh").iterdir() if path.read_bytes() == b"\x89PNG half of it"]
    assert not (tmp_path / "fresh" / "index.md").exists()


def test_figures_are_closed(tmp_path: Path) -> None:
    """A study has dozens of them, and pyplot keeps what is not closed."""
    plt.close("all")
    write_report(*study_of(RESULTS), tmp_path)
    assert plt.get_fignums() == []


def test_every_method_below_the_axis_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a strength at which all collapse, the marks would cover each other; the legend says what they are."""
    rows = [
        (name, strength, accuracy) for name in "abc" for strength, accuracy in [(0.01, 0.9), (0.02, 0.89), (1, 0.1)]
    ]
    summary = pd.DataFrame(rows, columns=["series", "strength", "test_accuracy"]).assign(test_accuracy_error=0.0)
    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw_grid([Panel("", summary, list("abc"), "strength", "test_accuracy")], tmp_path / "a.png", shared_legend=False)
    monkeypatch.undo()
    axis = plt.gca()
    marks = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert len({line.get_ydata()[0] for line in marks}) == len(marks) == 3
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b", "c", "below the axis"]
    plt.close("all")
