"""What a search has found: the suggestion, the tolerance levels, the table, the figure, and the file."""

import json
import math
import os
from dataclasses import replace

import matplotlib
import pandas
import pytest
from matplotlib.figure import Figure

from lightning_gcsr import StrengthFinderResult, Suggestion, ToleranceLevel, Trial

WEIGHTS = 1000


def trial(strength, metric, nonzeros=500, learned=True, method="coherent", **kwargs):
    arguments = {"injected": 0.5, "weight_norm": 2.0, "steps": 40, "reason": "because"} | kwargs
    return Trial(method, strength, metric, WEIGHTS, nonzeros, learned=learned, **arguments)


def reference(metric=0.1):
    return trial(0.0, metric, WEIGHTS, method="none", injected=0.0)


def result(*trials, mode="min", baseline=2.1, metric="val_loss"):
    return StrengthFinderResult(metric, mode, baseline, list(trials))


@pytest.fixture
def losses():
    """Training gains 2.0: 1 % of it is 0.02."""
    return result(
        reference(0.12),
        trial(0.01, 0.10, 800),
        trial(0.1, 0.11, 300),
        trial(1.0, 0.16, 50),
        trial(10.0, 2.2, 0, learned=False),
        trial(3.0, 0.5, 10),
    )


@pytest.fixture
def accuracies():
    return result(
        reference(0.90),
        trial(0.01, 0.91, 800),
        trial(0.1, 0.905, 300),
        trial(1.0, 0.80, 50),
        trial(10.0, 0.1, 0, learned=False),
        mode="max",
        baseline=0.11,
        metric="accuracy",
    )


# -- the suggestion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "strength"),
    [
        ({}, 0.1),
        ({"tolerance": 0}, 0.01),
        ({"tolerance": 0.05}, 1.0),
        ({"tolerance": 1}, 3.0),
        ({"max_metric_drop": 0}, 0.01),
        ({"max_metric_drop": 0.01}, 0.1),
        ({"max_metric_drop": 0.1}, 1.0),
        ({"max_metric_drop": 0.1, "tolerance": 0}, 1.0),
        ({"target_sparsity": 0.2}, 0.01),
        ({"target_sparsity": 0.21}, 0.1),
        ({"target_sparsity": 0.95}, 1.0),
        ({"target_sparsity": 0.96}, 3.0),
    ],
)
def test_suggestion_is_the_strength_that_was_asked_for(losses, arguments, strength):
    assert losses.suggestion(**arguments).strength == strength


@pytest.mark.parametrize(
    ("arguments", "strength"),
    [
        ({}, 0.1),
        ({"tolerance": 0}, 0.01),
        ({"max_metric_drop": 0.004}, 0.01),
        ({"max_metric_drop": 0.2}, 1.0),
        ({"target_sparsity": 0.5}, 0.1),
    ],
)
def test_suggestion_of_a_metric_that_is_better_when_larger(accuracies, arguments, strength):
    assert accuracies.suggestion(**arguments).strength == strength


def test_suggestion_says_why(losses):
    reason = losses.suggestion().reason
    assert "val_loss (0.11) is within 1 % of what is learned (0.02) of the best (0.1)" in reason
    assert "300 of 1,000 weights (3.33×)" in reason
    assert "within 0.3 of the best" in losses.suggestion(max_metric_drop=0.3).reason
    assert "best val_loss (0.16) among the strengths that make at least 95 % of the weights zero" in (
        losses.suggestion(target_sparsity=0.95).reason
    )


def test_among_equals_the_largest_strength_is_suggested():
    equal = result(reference(0.1), trial(0.1, 0.1), trial(1.0, 0.1), trial(0.5, 0.1))
    assert equal.suggestion(tolerance=0).strength == 1.0


def test_failed_trial_is_never_suggested_however_good_its_metric():
    found = result(reference(0.1), trial(0.1, 0.1), trial(0.5, 0.05, 20, learned=False), trial(1.0, 0.101))
    assert found.suggestion().strength == 1.0
    assert found.suggestion(max_metric_drop=0).strength == 0.1
    assert found.suggestion(target_sparsity=0.5).strength in (0.1, 1.0)


def test_plain_trials_are_neither_suggested_nor_the_best():
    found = result(reference(0.1), trial(0.1, 0.1), trial(0.05, 0.01, method="plain"), trial(9.0, 0.01, method="plain"))
    assert found.suggestion().strength == 0.1


def test_where_no_penalty_is_best_of_all_a_tolerance_of_0_gives_the_best_with_one():
    found = result(reference(0.1), trial(0.1, 0.2), trial(1.0, 0.3))
    suggestion = found.suggestion(tolerance=0)
    assert suggestion.strength == 0.1
    assert "the best with a penalty; that without one is the best of all" in suggestion.reason


def test_training_without_penalty_counts_as_the_best():
    """Within 1 % of what is gained with a penalty, but not without."""
    found = result(reference(0.0), trial(0.1, 0.05))
    with pytest.raises(ValueError, match="costs more val_loss than asked"):
        found.suggestion()
    assert found.suggestion(max_metric_drop=0.05).strength == 0.1


def test_no_strength_within_the_tolerance_is_an_error_with_a_way_out():
    found = result(reference(0.1), trial(0.1, 0.5), trial(1.0, 0.6))
    with pytest.raises(ValueError, match=r"costs more val_loss than asked: 0\.1, the smallest, has 0\.5.*best is 0\.1"):
        found.suggestion()
    with pytest.raises(ValueError, match="Lower `min_strength`, or allow a larger drop"):
        found.suggestion(max_metric_drop=0.1)


def test_no_strength_as_sparse_as_asked_is_an_error_with_a_way_out(losses):
    with pytest.raises(ValueError, match=r"reached target_sparsity=0\.995; 3 came closest with 0\.990.*`max_strength`"):
        losses.suggestion(target_sparsity=0.995)


def test_no_strength_that_learned_is_an_error():
    with pytest.raises(ValueError, match=r"No strength that was tried learned.*Try smaller ones"):
        result(reference(), trial(0.1, 2.0, learned=False)).suggestion()


def test_two_ways_at_once_are_an_error(losses):
    with pytest.raises(ValueError, match="`target_sparsity` must be None where max_metric_drop is given"):
        losses.suggestion(max_metric_drop=0.1, target_sparsity=0.9)


@pytest.mark.parametrize("name", ["tolerance", "max_metric_drop", "target_sparsity"])
@pytest.mark.parametrize(("value", "error"), [("a lot", TypeError), (True, TypeError), (-0.1, ValueError)])
def test_suggestion_names_a_bad_argument(losses, name, value, error):
    with pytest.raises(error, match=f"`{name}` must be a .*number"):
        losses.suggestion(**{name: value})


@pytest.mark.parametrize("name", ["tolerance", "max_metric_drop", "target_sparsity"])
def test_suggestion_refuses_what_is_not_finite(losses, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        losses.suggestion(**{name: math.nan})


@pytest.mark.parametrize("name", ["tolerance", "target_sparsity"])
def test_shares_are_at_most_1(losses, name):
    with pytest.raises(ValueError, match=rf"`{name}` must be a number in \[0, 1\]"):
        losses.suggestion(**{name: 1.5})


# -- tolerance levels ------------------------------------------------------------------------------------------------


def test_tolerance_level_is_bracketed(losses):
    assert losses.tolerance_level == ToleranceLevel(strength=3.0, failed=10.0)


def test_tolerance_level_where_none_failed():
    assert result(reference(), trial(0.1, 0.1), trial(1.0, 0.1)).tolerance_level == ToleranceLevel(1.0, None)


def test_tolerance_level_where_all_failed():
    assert result(reference(), trial(0.1, 2.0, learned=False)).tolerance_level == ToleranceLevel(None, 0.1)


def test_tolerance_level_lies_below_the_first_that_failed():
    found = result(reference(), trial(0.1, 0.1), trial(0.5, 2.0, learned=False), trial(1.0, 0.1))
    assert found.tolerance_level == ToleranceLevel(0.1, 0.5)


def test_plain_has_a_tolerance_level_of_its_own(losses):
    plain = [trial(0.01, 0.1, method="plain"), trial(0.1, 2.1, 0, learned=False, method="plain")]
    found = result(*losses.trials, *plain)
    assert found.plain_tolerance_level == ToleranceLevel(0.01, 0.1)
    assert found.tolerance_level == losses.tolerance_level


def test_all_failed_for_plain(losses):
    found = result(*losses.trials, trial(0.01, 2.1, 0, learned=False, method="plain"))
    assert found.plain_tolerance_level == ToleranceLevel(None, 0.01)


def test_plain_tolerance_level_must_have_been_asked_for(losses):
    with pytest.raises(ValueError, match=r"Plain regularization was not tried.*compare_plain=True"):
        _ = losses.plain_tolerance_level


# -- the table -------------------------------------------------------------------------------------------------------


def test_table_has_a_row_for_each_trial_by_method_and_strength(losses):
    found = result(trial(0.5, 2.0, 0, learned=False, method="plain"), *losses.trials)
    table = pandas.DataFrame(found.table)
    assert list(table.columns) == [
        "method",
        "strength",
        "val_loss",
        "sparsity",
        "compression",
        "injected",
        "weight_norm",
        "steps",
        "learned",
        "reason",
    ]
    assert list(table["method"]) == ["none"] + ["coherent"] * 5 + ["plain"]
    assert list(table["strength"]) == [0.0, 0.01, 0.1, 1.0, 3.0, 10.0, 0.5]
    assert list(table["val_loss"]) == [0.12, 0.10, 0.11, 0.16, 0.5, 2.2, 2.0]
    assert list(table["sparsity"]) == pytest.approx([0, 0.2, 0.7, 0.95, 0.99, 1, 1])
    assert list(table["compression"]) == pytest.approx([1, 1.25, 1000 / 300, 20, 100, math.inf, math.inf])
    assert list(table["learned"]) == [True] * 5 + [False] * 2
    assert (table["steps"] == 40).all()
    assert (table["reason"] == "because").all()


# -- the figure ------------------------------------------------------------------------------------------------------


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def points(panel, marker):
    return [(x, y) for line in panel.lines if line.get_marker() == marker for x, y in line.get_xydata()]


def ends(span):
    """Where a shaded range begins and ends: a polygon before matplotlib 3.9, a rectangle since."""
    corners = span.get_patch_transform().transform(span.get_path().vertices)
    return pytest.approx((corners[:, 0].min(), corners[:, 0].max()))


def test_figure_shows_the_trials_the_cliff_and_the_suggestion(losses):
    figure = losses.plot()
    assert isinstance(figure, Figure)
    above, below = figure.axes
    assert above.get_ylabel() == "val_loss"
    assert below.get_xscale() == above.get_xscale() == "log"
    assert labels(above) == ["no penalty", "nothing learned", "with the gate", "suggested: 0.1"]
    assert labels(below) == ["with the gate", "the cliff, with the gate", "suggested: 0.1"]
    assert points(above, "o") == [(0.01, 0.10), (0.1, 0.11), (1.0, 0.16), (3.0, 0.5)]
    assert points(above, "x") == [(10.0, 2.2)]
    assert points(below, "x") == [(10.0, 100.0)]
    [cliff] = above.patches
    assert ends(cliff) == (3.0, 10.0)
    [dashed] = [line for line in above.lines if line.get_linestyle() == "--"]
    assert list(dashed.get_xdata()) == [0.1, 0.1]
    assert above.get_yscale() == "log"  # 0.1 to 2.2


def test_figure_can_mark_another_suggestion(losses):
    assert "suggested: 1" in labels(losses.plot(Suggestion(1.0, "mine")).axes[0])


def test_figure_shows_plain_beside_it(losses):
    plain = [trial(0.01, 0.1, method="plain"), trial(0.1, 2.1, 0, learned=False, method="plain")]
    above, below = result(*losses.trials, *plain).plot().axes
    assert "plain, without a gate" in labels(above)
    assert "the cliff, plain, without a gate" in labels(below)
    assert [ends(span) for span in above.patches] == [(3.0, 10.0), (0.01, 0.1)]


def drawn(figure, tmp_path):
    """The figure, after it was drawn in earnest."""
    figure.savefig(tmp_path / "figure.png")
    return figure


@pytest.mark.parametrize(
    "found",
    [
        result(reference(0.1), trial(0.1, 2.0, learned=False)),
        result(reference(0.1)),
        result(reference(-5.0), trial(0.1, -5.0), trial(1.0, -1.0), baseline=0.3),
        result(reference(0.1), trial(0.1, math.nan, learned=False), trial(1.0, math.inf, learned=False)),
        result(reference(0.1), trial(0.1, 0.1, 100), trial(1.0, math.nan, learned=False)),
    ],
    ids=["no suggestion", "the reference alone", "negative", "nothing finite but the reference", "one finite"],
)
def test_figure_is_drawn_of_whatever_was_found(tmp_path, found):
    above, _ = drawn(found.plot(), tmp_path).axes
    assert above.get_yscale() == ("linear" if found.baseline < 1 else "log")
    suggested = any(text.startswith("suggested") for text in labels(above))
    assert suggested is any(trial.learned and trial.method == "coherent" for trial in found.trials)


def test_figure_leaves_no_window_or_state_behind(losses):
    before = dict(matplotlib.rcParams)
    losses.plot()
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


# -- the file --------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path, losses):
    losses.save(tmp_path / "found.json")
    assert StrengthFinderResult.load(str(tmp_path / "found.json")) == losses


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_survive_in_standard_json(tmp_path, value):
    spoilt = replace(trial(0.1, value, learned=False), weight_norm=value, injected=value)
    result(reference(), spoilt, baseline=value).save(tmp_path / "found.json")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "found.json").read_text(), parse_constant=refuse)
    loaded = StrengthFinderResult.load(tmp_path / "found.json")
    found = (loaded.baseline, loaded.trials[1].metric, loaded.trials[1].weight_norm, loaded.trials[1].injected)
    for number in found:
        assert isinstance(number, float)
        assert number == pytest.approx(value, nan_ok=True)


def test_reasons_and_names_survive_as_they_are(tmp_path):
    named = result(reference(), trial(0.1, 0.1, reason="nan"), metric="Verlust/ä")
    named.save(tmp_path / "found.json")
    assert StrengthFinderResult.load(tmp_path / "found.json") == named


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file_and_no_other(tmp_path, losses, monkeypatch, failing):
    path = tmp_path / "found.json"
    losses.save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        result(reference()).save(path)
    assert path.read_bytes() == before
    assert [other.name for other in tmp_path.iterdir()] == ["found.json"]


def test_old_file_is_replaced(tmp_path, losses):
    losses.save(tmp_path / "found.json")
    result(reference()).save(tmp_path / "found.json")
    assert len(StrengthFinderResult.load(tmp_path / "found.json").trials) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_folder_is_named(tmp_path, losses):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        losses.save(tmp_path / "nowhere" / "found.json")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        StrengthFinderResult.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "{}",
        '{"format": "something else"}',
        '{"format": "lightning-gcsr strength finder 1"}',
        '{"format": "lightning-gcsr strength finder 1", "metric": "a", "mode": "min", "baseline": 1, "trials": [1]}',
        '{"format": "lightning-gcsr strength finder 1", "metric": "a", "mode": "min", "baseline": 1, "trials": [{}]}',
        '{"format": "lightning-gcsr strength finder 1", "metric": "a", "mode": "min", "trials": []}',
        '{"format": "lightning-gcsr strength finder 1", "metric": "", "mode": "", "baseline": 1, "trials": [], "x": 1}',
        "\xff",
    ],
)
def test_another_file_is_named_and_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"other\.json is not a result that `StrengthFinderResult\.save` wrote"):
        StrengthFinderResult.load(path)
