"""What a search has found: the trade-off, the suggestion, the tolerance level, the table, the figure, and the file."""

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


def trial(strength, metric, nonzeros=500, learned=True, target=None, **kwargs):
    arguments = {"injected": 0.5, "weight_norm": 2.0, "steps": 40, "reason": "because"} | kwargs
    return Trial(strength, target, metric, WEIGHTS, nonzeros, learned=learned, **arguments)


def reference(metric=0.1):
    return trial(0.0, metric, WEIGHTS, injected=0.0)


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


@pytest.fixture
def targets():
    """Trials by target sparsity, of a network whose accuracy is better at half of its weights."""
    return result(
        reference(0.98),
        trial(None, 0.982, 500, target=0.5),
        trial(None, 0.9804, 200, target=0.8),
        trial(None, 0.97, 100, target=0.9),
        trial(None, 0.95, 150, target=0.85),
        trial(None, 0.93, 20, target=0.98),
        mode="max",
        baseline=0.1,
        metric="val_acc",
    )


# -- the trade-off ---------------------------------------------------------------------------------------------------


def test_trade_off_says_what_each_smaller_network_costs(targets, losses):
    assert targets.trade_off == (
        "2× 0.2 points better (target_sparsity=0.5); 5× free (target_sparsity=0.8);"
        " 10× for 1 point (target_sparsity=0.9); 50× for 5 points (target_sparsity=0.98)"
    )
    assert losses.trade_off == (
        "1.2× 0.02 better (strength=0.01); 3.3× 0.01 better (strength=0.1); 20× for 0.04 (strength=1);"
        " 100× for 0.38 (strength=3)"
    )


def test_trade_off_leaves_out_what_is_beaten_and_what_failed(targets, losses):
    assert [trial.target_sparsity for trial in targets.front] == [0.5, 0.8, 0.9, 0.98]  # 0.85 is worse and larger
    assert [trial.strength for trial in losses.front] == [0.01, 0.1, 1.0, 3.0]
    assert result(reference(), trial(0.1, 2.0, learned=False)).trade_off == "no trial learned"


@pytest.mark.parametrize(
    ("metric", "mode", "values", "words"),
    [
        ("perplexity", "min", (100.0, 20.0, 21.26), "for 1.26"),
        ("psnr", "max", (5.0, 30.0, 29.5), "for 0.5"),
        ("negative loss", "max", (-2.3, -0.1, -0.105), "for 0.005"),
        ("error", "min", (0.9, 0.02, 0.05), "for 0.03"),
        ("auroc", "max", (0.5, 0.9, 0.895), "for 0.5 points"),
        ("val_loss", "min", (2.3, 0.1, 0.1001), "free"),
    ],
)
def test_cost_is_in_points_of_shares_and_else_in_units_of_the_metric(metric, mode, values, words):
    baseline, without, with_penalty = values
    found = result(reference(without), trial(0.1, with_penalty), metric=metric, mode=mode, baseline=baseline)
    assert found.trade_off == f"2× {words} (strength=0.1)"


def test_suggestion_among_targets_is_a_target_and_says_what_the_next_steps_cost(targets):
    suggestion = targets.suggestion()
    assert (suggestion.strength, suggestion.target_sparsity) == (None, 0.8)
    assert suggestion.arguments == {"target_sparsity": 0.8}
    assert "val_acc 0.9804 at 5× (200 of 1,000 weights); next: 10× for 1 point (target" in suggestion.reason
    assert targets.suggestion(max_metric_drop=0.1).reason.endswith("no smaller network that was tried learned")
    assert targets.tolerance_level == ToleranceLevel(None, None)


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
    assert "val_loss is within 1 % of what is learned (0.02) of the best (0.1): val_loss 0.11 at 3.3×" in reason
    assert reason.endswith("next: 20× for 0.04 (strength=1); 100× for 0.38 (strength=3)")
    assert "within 0.3 of the best" in losses.suggestion(max_metric_drop=0.3).reason
    assert "best val_loss among the trials that make at least 95 % of the weights zero: val_loss 0.16" in (
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


def test_where_no_penalty_is_best_of_all_a_tolerance_of_0_gives_the_best_with_one():
    found = result(reference(0.1), trial(0.1, 0.2), trial(1.0, 0.3))
    suggestion = found.suggestion(tolerance=0)
    assert suggestion.strength == 0.1
    assert "best val_loss with a penalty; that without one is the best of all" in suggestion.reason


def test_training_without_penalty_counts_as_the_best():
    """Within 1 % of what is gained with a penalty, but not without."""
    found = result(reference(0.0), trial(0.1, 0.05))
    with pytest.raises(ValueError, match="costs more val_loss than asked"):
        found.suggestion()
    assert found.suggestion(max_metric_drop=0.05).strength == 0.1


def test_no_strength_within_the_tolerance_is_an_error_with_a_way_out():
    found = result(reference(0.1), trial(0.1, 0.5), trial(1.0, 0.6))
    with pytest.raises(
        ValueError, match=r"more val_loss than asked: strength=0\.1, the least .*has 0\.5.*best is 0\.1"
    ):
        found.suggestion()
    with pytest.raises(ValueError, match="Try less of the penalty, or allow a larger drop"):
        found.suggestion(max_metric_drop=0.1)


def test_no_strength_as_sparse_as_asked_is_an_error_with_a_way_out(losses):
    with pytest.raises(ValueError, match=r"reached target_sparsity=0\.995; strength=3 came closest with 0\.990"):
        losses.suggestion(target_sparsity=0.995)


def test_no_strength_that_learned_is_an_error():
    with pytest.raises(ValueError, match=r"No trial with a penalty learned.*Try less of it"):
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


# -- the tolerance level -----------------------------------------------------------------------------------------------


def test_tolerance_level_is_bracketed(losses):
    assert losses.tolerance_level == ToleranceLevel(strength=3.0, failed=10.0)


def test_tolerance_level_where_none_failed():
    assert result(reference(), trial(0.1, 0.1), trial(1.0, 0.1)).tolerance_level == ToleranceLevel(1.0, None)


def test_tolerance_level_where_all_failed():
    assert result(reference(), trial(0.1, 2.0, learned=False)).tolerance_level == ToleranceLevel(None, 0.1)


def test_tolerance_level_lies_below_the_first_that_failed():
    found = result(reference(), trial(0.1, 0.1), trial(0.5, 2.0, learned=False), trial(1.0, 0.1))
    assert found.tolerance_level == ToleranceLevel(0.1, 0.5)


# -- the table -------------------------------------------------------------------------------------------------------


def test_table_has_a_row_for_each_trial_by_what_was_asked_for(losses):
    table = pandas.DataFrame(losses.table)
    assert list(table.columns[:5]) == ["strength", "target_sparsity", "val_loss", "sparsity", "compression"]
    assert list(table["strength"]) == [0.0, 0.01, 0.1, 1.0, 3.0, 10.0]
    assert list(table["val_loss"]) == [0.12, 0.10, 0.11, 0.16, 0.5, 2.2]
    assert list(table["sparsity"]) == pytest.approx([0, 0.2, 0.7, 0.95, 0.99, 1])
    assert list(table["compression"]) == pytest.approx([1, 1.25, 1000 / 300, 20, 100, math.inf])
    assert list(table["learned"]) == [True] * 5 + [False]
    assert (table["reason"] == "because").all()


def test_result_prints_as_a_table(targets, losses):
    headline, header, *rows = repr(targets).splitlines()
    assert headline == f"val_acc against 0.98 without a penalty: {targets.trade_off}"
    assert header.split() == ["trial", "val_acc", "sparsity", "compression", "outcome"]
    assert rows[0].split() == ["no", "penalty", "0.98", "0.0", "%", "1×", "learned"]
    assert rows[-1].split() == ["target_sparsity=0.98", "0.93", "98.0", "%", "50×", "learned"]
    assert repr(losses).endswith("all zero  failed: because")


def test_result_is_a_table_and_a_figure_in_a_notebook(targets, monkeypatch):
    html = targets._repr_html_()
    assert "<td>target_sparsity=0.98</td><td>0.93</td><td>98.0 %</td><td>50×</td>" in html
    assert 'src="data:image/png;base64,iVBOR' in html
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "<img" not in targets._repr_html_()
    with pytest.raises(ModuleNotFoundError, match=r"`StrengthFinderResult\.plot` draws with matplotlib.*pip install"):
        targets.plot()


# -- the figure ------------------------------------------------------------------------------------------------------


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def points(panel, marker):
    return [tuple(point) for line in panel.lines if line.get_marker() == marker for point in line.get_xydata()]


def test_figure_shows_the_trials_and_the_suggestion(losses, targets):
    found = result(*losses.trials, trial(5.0, 2.0, 5, learned=False))
    figure = found.plot()
    assert isinstance(figure, Figure)
    [panel] = figure.axes
    assert (panel.get_ylabel(), panel.get_xscale(), panel.get_yscale()) == ("val_loss", "log", "linear")
    assert labels(panel) == ["no penalty", "trade-off", "suggested: strength=0.1"]
    assert points(panel, "o") == [(1.25, 0.10), (1000 / 300, 0.11), (20, 0.16), (100, 0.5)]
    assert [text.get_text() for text in panel.texts] == ["0.01", "0.1", "1", "3"]
    [panel] = targets.plot().axes
    assert [text.get_text() for text in panel.texts] == ["50 %", "80 %", "85 %", "90 %", "98 %"]
    assert labels(panel)[-1] == "suggested: target_sparsity=0.8"


def test_figure_can_mark_another_suggestion(losses):
    assert "suggested: strength=1" in labels(losses.plot(Suggestion(1.0, "mine")).axes[0])


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
    [panel] = drawn(found.plot(), tmp_path).axes
    assert any(text.startswith("suggested") for text in labels(panel)) is bool(found.front)


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
        '{"format": "lightning-gcsr strength finder 2"}',
        '{"format": "lightning-gcsr strength finder 2", "metric": "a", "mode": "min", "baseline": 1, "trials": [1]}',
        '{"format": "lightning-gcsr strength finder 2", "metric": "a", "mode": "min", "baseline": 1, "trials": [{}]}',
        '{"format": "lightning-gcsr strength finder 2", "metric": "a", "mode": "min", "trials": []}',
        '{"format": "lightning-gcsr strength finder 2", "metric": "", "mode": "", "baseline": 1, "trials": [], "x": 1}',
        "\xff",
    ],
)
def test_another_file_is_named_and_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"other\.json is not a result that `StrengthFinderResult\.save` wrote"):
        StrengthFinderResult.load(path)
