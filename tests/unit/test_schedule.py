"""The schedule: when the penalty acts, in steps and in fractions of the training."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcsr import Clock, Gate, Schedule
from lightning_gcsr.core.regularizer import default_schedule


def factors(schedule: Schedule, steps: int, total: int | None = None) -> list[float]:
    clocks = [Clock(step, None if total is None else step / total) for step in range(steps)]
    began = next((clock for clock in clocks if schedule.acts(clock)), None)
    return [schedule.factor(clock, began) for clock in clocks]


def test_a_plain_schedule_acts_from_the_first_step_on() -> None:
    assert factors(Schedule(), 3) == [1.0, 1.0, 1.0]


def test_delay_warmup_and_stop_in_steps() -> None:
    assert factors(Schedule(delay=2, warmup=4), 8) == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(Schedule(warmup=4, stop=2), 4) == [0.25, 0.5, 0.0, 0.0]


def test_delay_warmup_and_stop_as_fractions_of_the_training() -> None:
    found = factors(Schedule(delay=0.25, warmup=0.5, stop=0.875), 8, total=8)
    assert found == [0, 0, 0, 0.25, 0.5, 0.75, 1.0, 0.0]


def test_units_may_be_mixed() -> None:
    assert factors(Schedule(delay=0.25, warmup=4), 8, total=8) == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert factors(Schedule(delay=2, warmup=0.5), 8, total=8) == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert factors(Schedule(delay=2, stop=0.5), 8, total=8) == [0, 0, 1, 1, 0, 0, 0, 0]


@given(delay=st.integers(0, 20), warmup=st.integers(0, 20), length=st.one_of(st.none(), st.integers(1, 40)))
def test_the_strength_rises_between_delay_and_stop_only(delay: int, warmup: int, length: int | None) -> None:
    stop = None if length is None else delay + length
    found = factors(Schedule(delay, warmup, stop), 100)
    end = 100 if stop is None else stop
    assert found[:delay] == [0.0] * delay
    assert set(found[end:]) <= {0.0}
    active = found[delay:end]
    assert all(0 < factor <= 1 for factor in active)
    assert active == sorted(active)
    assert set(active[max(0, warmup - 1) :]) <= {1.0}
    assert all(factor < 1 for factor in active[: max(0, warmup - 1)])


def test_phase_is_the_part_of_the_acting_time_that_is_over() -> None:
    schedule = Schedule(delay=0.25, stop=0.75)
    assert [schedule.phase(Clock(0, progress)) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0.5, 1, 1]
    assert Schedule(delay=10).phase(Clock(20, 0.6), began=Clock(10, 0.2)) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [Schedule(delay=0.5), Schedule(warmup=0.5), Schedule(stop=0.5)], ids=repr)
def test_a_fraction_needs_the_progress(schedule: Schedule) -> None:
    assert list(schedule.fractions.values()) == [0.5]
    with pytest.raises(
        ValueError, match=r"fraction of the training's progress \(0\.5.*Pass `clock=Clock\(step, progress\)`"
    ):
        schedule.factor(Clock(3))


def test_the_default_warmup_goes_with_a_tolerance() -> None:
    assert default_schedule(Gate(), Schedule(delay=3)) == Schedule(delay=3, warmup=0.3)
    assert default_schedule(Gate(averaging=0), Schedule()) == Schedule(warmup=0)
    assert default_schedule(None, Schedule()) == Schedule(warmup=0)
    assert default_schedule(Gate(), Schedule(warmup=7)) == Schedule(warmup=7)


def test_what_is_printed_could_be_typed_in() -> None:
    for schedule in (Schedule(), Schedule(3, 0.25, 10), Schedule(warmup=0)):
        assert eval(repr(schedule)) == schedule


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"delay": -1}, ValueError, r"`delay` must be an integer of at least 0, got delay=-1\. Use 0 for no delay"),
        ({"delay": True}, TypeError, r"`delay` must be an integer of at least 0, got delay=True"),
        (
            {"warmup": "3"},
            TypeError,
            r"`warmup` must be an integer of at least 0, got warmup='3'\. Use 0 for no warm-up",
        ),
        (
            {"warmup": 1.1},
            ValueError,
            r"`warmup` must be a number in \[0, 1\], got warmup=1\.1\. A float is a fraction",
        ),
        ({"stop": math.nan}, ValueError, r"`stop` must be a number in \[0, 1\], got stop=nan"),
        ({"stop": 0}, ValueError, r"`stop` must be greater than delay=0, got stop=0\..*use None to never stop"),
        ({"delay": 4, "stop": 4}, ValueError, r"`stop` must be greater than delay=4, got stop=4"),
        (
            {"delay": 0.5, "stop": 0.25},
            ValueError,
            r"`stop` must be greater than delay=0\.5, got stop=0\.25\. The penalty",
        ),
        ({"delay": 3, "stop": 0.0}, ValueError, r"`stop` must be greater than delay=3, got stop=0\.0"),
    ],
    ids=str,
)
def test_a_bad_moment_is_an_error(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(**arguments)
