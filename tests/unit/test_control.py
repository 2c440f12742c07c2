"""The controller of the strength: what it wants, when it acts, how far it goes, and that it arrives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcsr import L1, L2, ElasticNet, GroupLasso, SparsityController
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.sparsity_controller import check_target_sparsity, dissolving_strength

TARGETS = st.floats(0.5, 0.99)
FIRSTS = st.integers(0, 5000)
LENGTHS = st.integers(1, 2500)


def controller(
    target: float = 0.9, strength: float = 0.01, first_step: int = 0, last_step: int = 1000
) -> SparsityController:
    return SparsityController(target, strength, first_step, last_step)


def density(sparsity: float) -> float:
    """The share of the weights that are left, of which at least a millionth counts as left."""
    return max(1 - sparsity, 1e-6)


# -- the wanted sparsity -------------------------------------------------------------------------------------------


@given(target=st.floats(0.01, 0.999), first=FIRSTS, length=LENGTHS)
def test_wanted_sparsity_rises_from_zero_to_the_target_at_seven_tenths(target: float, first: int, length: int) -> None:
    control = controller(target, first_step=first, last_step=first + length)
    wanted = [control.wanted(step) for step in range(first, first + length + 1)]
    assert wanted[0] == 0.0
    assert wanted == sorted(wanted)
    for step, share in enumerate(wanted):
        arrived = step >= 0.7 * length
        assert share == pytest.approx(target) if arrived else share < target


@given(target=st.floats(0.01, 0.999), length=LENGTHS, share=st.floats(0, 1))
def test_wanted_sparsity_is_the_curve_of_gradual_pruning(target: float, length: int, share: float) -> None:
    step = round(share * length)
    remaining = max(0.0, 1 - step / length / 0.7)
    expected = target - target * remaining * remaining * remaining
    assert controller(target, last_step=length).wanted(step) == pytest.approx(expected, abs=1e-12)


def test_nothing_is_wanted_before_the_penalty_begins_and_no_more_than_the_target_after_it() -> None:
    control = controller(0.8, first_step=100, last_step=200)
    assert [control.wanted(step) for step in (0, 99, 100)] == [0.0, 0.0, 0.0]
    assert [control.wanted(step) for step in (170, 200, 10_000)] == pytest.approx([0.8] * 3)


# -- when it acts --------------------------------------------------------------------------------------------------


def due_steps(first: int, last: int) -> list[int]:
    control = controller(first_step=first, last_step=last)
    return [step for step in range(last + 500) if control.due(step)]


@pytest.mark.parametrize("first", [0, 1, 777])
@pytest.mark.parametrize("length", [200, 1000, 2000, 10_000])
def test_the_strength_is_adapted_every_fourth_step_or_200_times(first: int, length: int) -> None:
    assert due_steps(first, first + length) == list(range(first, first + length, min(4, length // 200)))


@given(first=st.integers(0, 500), length=st.integers(1, 199))
def test_in_a_short_training_every_step_is_due(first: int, length: int) -> None:
    assert due_steps(first, first + length) == list(range(first, first + length))


@given(first=st.integers(0, 500), length=LENGTHS)
def test_it_acts_from_the_first_step_on_within_the_window_only_at_equal_distances(first: int, length: int) -> None:
    due = due_steps(first, first + length)
    assert due[0] == first
    assert due[-1] < first + length
    assert len(due) >= min(length, 200)
    assert len({late - early for early, late in pairwise(due)}) <= 1


# -- how it moves --------------------------------------------------------------------------------------------------


def slow_strengths(target: float, strength: float, first: int, last: int, seen: list[tuple[int, float]]) -> list[float]:
    """The strength after each adaptation, from steps and sparsities, with the formula written out."""
    every = min(4, max(1, (last - first) // 200))
    lowest, highest = math.log(strength) - math.log(10_000), math.log(strength) + math.log(10_000)
    log_strength, errors, result = math.log(strength), [], []
    for step, sparsity in seen:
        progress = min(1.0, (step + every - first) / (0.7 * (last - first)))
        left, allowed = density(sparsity), 1 - target * (1 - (1 - progress) ** 3)
        errors.append(math.log(left) - math.log(allowed))
        change = 0.3 * errors[-1]
        if len(errors) > 1:
            change += 3.0 * errors[-1] - 3.0 * errors[-2]
        if change > 0.5:
            change = 0.5
        if change < -0.5:
            change = -0.5
        log_strength += change
        if log_strength > highest:
            log_strength = highest
        if log_strength < lowest:
            log_strength = lowest
        result.append(math.exp(log_strength))
    return result


@given(
    target=st.floats(0.05, 0.995),
    strength=st.floats(1e-6, 1e3),
    first=st.integers(0, 300),
    length=st.integers(1, 1000),
    sparsities=st.lists(st.floats(0, 1), min_size=1, max_size=60),
)
def test_the_strength_is_that_of_the_formula(
    target: float, strength: float, first: int, length: int, sparsities: list[float]
) -> None:
    control = controller(target, strength, first, first + length)
    steps = [step for step in range(first, first + length) if control.due(step)]
    seen = list(zip(steps, sparsities, strict=False))
    found = []
    for step, sparsity in seen:
        control.adapt(step, sparsity)
        found.append(control.strength)
    assert found == pytest.approx(slow_strengths(target, strength, first, first + length, seen), rel=1e-9)


def settled(error: float) -> SparsityController:
    """A controller in the last 30 % of its window, where the wanted sparsity is constant, that saw this error once."""
    control = controller()
    control.adapt(800, 1 - 0.1 * math.exp(error))
    return control


def log_change(control: SparsityController, error: float) -> float:
    """The change of the logarithm of the strength by this error: the log of the weights left over those wanted."""
    before = math.log(control.strength)
    control.adapt(805, 1 - 0.1 * math.exp(error))
    return math.log(control.strength) - before


@pytest.mark.parametrize("error", [-1.0, -0.1, 0.0, 0.1, 1.0])
def test_a_lasting_error_moves_the_strength_by_three_tenths_of_it(error: float) -> None:
    assert math.log(settled(error).strength / 0.01) == pytest.approx(0.3 * error)  # it has no predecessor
    assert log_change(settled(error), error) == pytest.approx(0.3 * error)


@pytest.mark.parametrize(("before", "now"), [(0.1, 0.0), (0.0, 0.1), (-0.05, 0.05), (1.0, 0.9)])
def test_a_change_of_the_error_moves_the_strength_by_three_times_the_change_as_well(before: float, now: float) -> None:
    assert log_change(settled(before), now) == pytest.approx(3 * (now - before) + 0.3 * now)


@given(error=st.floats(0.01, 2.3))
def test_too_few_zeros_raise_the_strength_and_too_many_lower_it(error: float) -> None:
    assert settled(error).strength > 0.01
    assert settled(-error).strength < 0.01


def test_at_the_wanted_sparsity_the_strength_stays() -> None:
    control = settled(0.0)
    for step in range(805, 1000, 5):
        control.adapt(step, 0.9)
    assert control.strength == pytest.approx(0.01)


def test_it_looks_ahead_to_what_is_wanted_when_it_acts_next() -> None:
    """At the first step nothing is wanted yet: to have nothing then would leave the strength alone for five steps."""
    control = controller()
    control.adapt(0, 0.0)
    assert math.log(control.strength / 0.01) == pytest.approx(-0.3 * math.log(1 - control.wanted(4)))


@given(sparsities=st.lists(st.floats(0, 1), min_size=1, max_size=30), target=st.floats(0.01, 0.999))
def test_a_move_is_bounded(sparsities: list[float], target: float) -> None:
    control = controller(target)
    strengths = [control.strength]
    for step, sparsity in enumerate(sparsities):
        control.adapt(5 * step, sparsity)
        strengths.append(control.strength)
    for before, after in pairwise(strengths):
        assert abs(math.log(after / before)) <= 0.5 + 1e-9


@given(strength=st.floats(1e-8, 1e4), sparsity=st.sampled_from([0.0, 1.0]))
def test_the_strength_never_leaves_four_orders_of_magnitude_and_knows_when_it_is_at_their_end(
    strength: float, sparsity: float
) -> None:
    control = controller(0.95, strength, last_step=200)
    for step in range(18):
        control.adapt(step + 150, sparsity)
    assert not control.at_its_end  # 18 moves by 0.5 at most, and the logarithm of 10⁴ is 9.2
    for step in range(18, 40):
        control.adapt(step + 150, sparsity)
    assert control.at_its_end
    assert control.strength == pytest.approx(strength * (1e4 if sparsity == 0 else 1e-4))
    for step in range(4):
        control.adapt(step + 190, 1 - sparsity)  # it comes back
    assert not control.at_its_end


@given(sparsity=st.floats(0, 1), step=st.integers(0, 999))
def test_any_sparsity_leaves_a_positive_finite_strength(sparsity: float, step: int) -> None:
    control = controller(0.999)
    for _ in range(3):
        control.adapt(step, sparsity)
        assert 0 < control.strength < math.inf


# -- its state -----------------------------------------------------------------------------------------------------


def adaptations(control: SparsityController, steps: range) -> list[float]:
    """The strengths after adaptations to sparsities that are the same in every call."""
    strengths = []
    for step in steps:
        control.adapt(step, random.Random(step).uniform(0.0, 0.9))
        strengths.append(control.strength)
    return strengths


@pytest.mark.parametrize("after", [0, 1, 70, 199])
def test_a_controller_that_takes_over_the_state_goes_on_as_the_first_one(after: int) -> None:
    first, second = controller(last_step=200), controller(strength=123.0, last_step=200)
    adaptations(first, range(after))
    state = first.state_dict()
    second.load_state_dict(state)
    assert second.strength == first.strength
    assert second.state_dict() == state
    assert adaptations(second, range(after, 200)) == adaptations(first, range(after, 200))
    assert second.state_dict() == first.state_dict()
    assert second.at_its_end == first.at_its_end


def test_the_state_is_plain_numbers_and_does_not_change_with_later_steps() -> None:
    control = controller()
    assert {type(value) for value in control.state_dict().values()} == {float, type(None)}
    control.adapt(0, 0.0)
    state = control.state_dict()
    before = dict(state)
    control.adapt(5, 0.5)
    assert state == before != control.state_dict()
    assert {type(value) for value in state.values()} == {float}


def test_how_far_the_strength_may_go_is_counted_from_the_first_start() -> None:
    first, second = controller(0.95, strength=1.0), controller(0.95, strength=1e3)
    for step in range(700, 740):
        first.adapt(step, 0.0)
    second.load_state_dict(first.state_dict())
    assert second.at_its_end
    second.adapt(741, 0.0)
    assert second.strength == pytest.approx(1e4)


def test_a_changed_target_takes_effect_after_loading() -> None:
    first, second = controller(0.9), controller(0.5)
    first.adapt(0, 0.0)
    second.load_state_dict(first.state_dict())
    assert second.target == 0.5
    assert second.wanted(700) == 0.5


# -- its arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 0.0}, ValueError, r"`target` must lie between 0 and 1, got target=0\.0\. It is a share"),
        ({"target": 1}, ValueError, r"`target` must lie between 0 and 1, got target=1\. "),
        ({"target": 1.5}, ValueError, r"`target` must be a number in \[0, 1\], got target=1\.5"),
        ({"target": "0.9"}, TypeError, r"`target` must be a number in \[0, 1\], got target='0\.9'"),
        ({"strength": 0.0}, ValueError, r"`strength` must be greater than 0, got strength=0\.0\. It is changed by"),
        ({"strength": -1.0}, ValueError, r"`strength` must be a finite number of at least 0, got strength=-1\.0"),
        ({"strength": math.inf}, ValueError, r"`strength` must be a finite number of at least 0, got strength=inf"),
        ({"first_step": 10, "last_step": 10}, ValueError, r"`last_step` must be an integer of at least 11, got"),
        ({"last_step": 10.0}, TypeError, r"`last_step` must be an integer of at least 1, got last_step=10\.0"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_the_controller_is_told(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        controller(**arguments)


SHARE = r"It is a share of the weights; 0\.9 leaves one in ten\."


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (0, ValueError, rf"`target_sparsity` must lie between 0 and 1, got target_sparsity=0\. {SHARE}"),
        (0.0, ValueError, r"`target_sparsity` must lie between 0 and 1, got target_sparsity=0\.0"),
        (1, ValueError, r"`target_sparsity` must lie between 0 and 1, got target_sparsity=1\. "),
        (1.0, ValueError, r"`target_sparsity` must lie between 0 and 1, got target_sparsity=1\.0"),
        (1.5, ValueError, rf"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=1\.5\. {SHARE}"),
        (90, ValueError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=90"),
        (-0.1, ValueError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=-0\.1"),
        (math.nan, ValueError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=nan"),
        (math.inf, ValueError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=inf"),
        ("0.9", TypeError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity='0\.9'"),
        (True, TypeError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=True"),
        ([0.9], TypeError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=\[0\.9\]"),
    ],
    ids=str,
)
def test_a_target_that_is_no_share_is_refused(target: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_target_sparsity(target, L1(), "proximal")


def test_an_update_that_makes_no_zeros_is_refused() -> None:
    message = (
        r"`target_sparsity` must be None where update='gradient', which makes no weight exactly zero, got"
        r" target_sparsity=0\.9\. Use update='proximal', or give a `strength`\."
    )
    with pytest.raises(ValueError, match=message):
        check_target_sparsity(0.9, L1(), "gradient")


@pytest.mark.parametrize(
    ("penalty", "name"), [(L2(), r"L2\(\)"), (ElasticNet(0), r"ElasticNet\(l1_ratio=0\)"), (ElasticNet(0.0), "Elas")]
)
def test_a_penalty_that_makes_no_zeros_is_refused(penalty: Penalty, name: str) -> None:
    with pytest.raises(ValueError, match=rf"must be None with {name}.*Use 'l1' or 'group_lasso', or give a `strength`"):
        check_target_sparsity(0.9, penalty, "proximal")


@pytest.mark.parametrize("penalty", [L1(), ElasticNet(0.01), ElasticNet(1.0), GroupLasso(), GroupLasso(1)], ids=repr)
@pytest.mark.parametrize("target", [1e-6, 0.5, 0.999, np.float64(0.9), np.float32(0.25)], ids=repr)
def test_penalties_that_make_zeros_can_arrive_at_any_share(penalty: Penalty, target: float) -> None:
    assert check_target_sparsity(target, penalty, "proximal") is None


# -- the strength to begin with ------------------------------------------------------------------------------------


@given(
    values=st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-3, 1e6)), min_size=1, max_size=9),
    seed=st.integers(0, 9),
)
def test_dissolving_strength_is_the_median_of_span_over_path(values: list[tuple[float, float]], seed: int) -> None:
    names = [str(i) for i in range(len(values))]
    shuffled = random.Random(seed).sample(names, len(names))
    spans = {name: values[int(name)][0] for name in names}
    paths = {name: values[int(name)][1] for name in shuffled}
    expected = float(np.median([span / path for span, path in values]))
    assert dissolving_strength(spans, paths) == pytest.approx(expected)


def test_dissolving_strength_looks_away_from_what_has_no_span_or_no_path() -> None:
    spans = {"zero": 0.0, "no pull": math.inf, "bad": math.nan, "frozen": 1.0, "no lr": 1.0, "a": 3.0, "b": 1.0}
    paths = {"zero": 10.0, "no pull": 10.0, "bad": 10.0, "no lr": 0.0, "a": 10.0, "b": 100.0, "unknown": 5.0}
    assert dissolving_strength(spans, paths) == pytest.approx((0.3 + 0.01) / 2)


@pytest.mark.parametrize(
    ("spans", "paths"),
    [({}, {}), ({"a": 0.0}, {"a": 1.0}), ({"a": math.inf}, {"a": 1.0}), ({"a": 1.0}, {}), ({"a": 1.0}, {"a": 0.0})],
    ids=str,
)
def test_dissolving_strength_of_nothing_is_one(spans: dict[str, float], paths: dict[str, float]) -> None:
    assert dissolving_strength(spans, paths) == 1.0


# -- that it arrives -----------------------------------------------------------------------------------------------


def run(control: SparsityController, steps: int, plant: Callable[[float, float], float]) -> list[float]:
    """The densities over a training of a network that a plant stands for, which maps strength and density to the next.

    It is trained without a penalty at first: no weight is zero.
    """
    densities, left = [], 1.0
    for step in range(steps):
        if control.due(step):
            control.adapt(step, 1 - left)
        left = plant(control.strength, left)
        densities.append(left)
    return densities


def power_law(exponent: float, lag: float, scale: float = 0.01) -> Callable[[float, float], float]:
    """A network of which in the long run (strength/scale)⁻ᵃ of the weights are left, at most all of them.

    In the logarithm it keeps the share ``lag`` of its distance to that in a step: zeros take their time.
    """

    def plant(strength: float, left: float) -> float:
        rest = min(1.0, (strength / scale) ** -exponent)
        return math.exp(lag * math.log(left) + (1 - lag) * math.log(rest))

    return plant


@given(
    target=TARGETS,
    exponent=st.floats(0.3, 1.2),
    wrong_by=st.floats(-2, 2),
    lag=st.floats(0.9, 0.97),
    steps=st.sampled_from([150, 200, 800]),
)
def test_it_arrives_from_a_strength_that_is_wrong_by_two_orders_of_magnitude(
    target: float, exponent: float, wrong_by: float, lag: float, steps: int
) -> None:
    """The lag is that from one adaptation to the next."""
    right = 0.01 * (1 - target) ** (-1 / exponent)
    control = controller(target, right * 10**wrong_by, last_step=steps)
    densities = run(control, steps, power_law(exponent, lag ** (200 / max(200, steps))))
    for left in densities[-steps // 10 :]:
        assert abs(1 - left - target) < 0.01
    assert not control.at_its_end


@given(target=TARGETS, exponent=st.floats(0.5, 1.2), wrong_by=st.floats(-1, 1))
def test_it_follows_the_curve_on_its_way(target: float, exponent: float, wrong_by: float) -> None:
    """So that weights are given up gradually: once it has found the curve, it is near to it."""
    control = controller(target, 0.01 * 10**wrong_by, last_step=200)
    densities = run(control, 200, power_law(exponent, lag=0.9))
    for step in range(80, 200):
        assert 1 - densities[step] == pytest.approx(control.wanted(step), abs=0.05)


def worst_distance(lag: float = 0.95) -> float:
    """The largest distance from the curve in the last six tenths of the training."""
    control = controller(0.9, 0.001, last_step=200)
    densities = run(control, 200, power_law(1.0, lag))
    return max(abs(1 - densities[step] - control.wanted(step)) for step in range(80, 200))


def test_without_the_integral_part_it_would_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of the tests above is hard enough for them to notice."""
    monkeypatch.setattr("lightning_gcsr.core.sparsity_controller.INTEGRAL", 0.0)
    densities = run(controller(0.9, 0.001, last_step=200), 200, power_law(1.0, lag=0.95))
    assert abs(1 - densities[-1] - 0.9) > 0.01


def test_without_the_proportional_part_it_would_swing(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = worst_distance()
    monkeypatch.setattr("lightning_gcsr.core.sparsity_controller.PROPORTIONAL", 0.0)
    assert worst_distance() > 3 * with_it
