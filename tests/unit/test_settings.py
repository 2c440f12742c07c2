"""Settings: every bad value is told at once, and the schedule of the strength."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gcsr import L1, CoherentRegularizer
from lightning_gcsr.core.settings import Settings

BAD_VALUES = [
    ("strength", -1e-3, r"`strength` must be a finite number of at least 0, got strength=-0\.001\. Use 0 for no pen"),
    ("strength", math.nan, r"`strength` must be a finite number of at least 0, got strength=nan"),
    ("strength", math.inf, r"`strength` must be a finite number of at least 0, got strength=inf"),
    ("strength", {"a": -1.0}, r"`strength\['a'\]` must be a finite number of at least 0, got strength\['a'\]=-1\.0\."),
    ("strength", {"a": 0.1, "b": math.nan}, r"`strength\['b'\]` must be a finite number of at least 0"),
    ("strength", {}, r"`strength` must have at least one regular expression, got strength=\[\]"),
    ("strength", {"(": 0.1}, r"`strength` must hold regular expressions that compile .*got strength='\('"),
    ("penalty", "l3", r"`penalty` must be one of .*got penalty='l3'\. Did you mean 'l\d'\?"),
    ("coherence", "agrement", r"`coherence` must be one of .*Did you mean 'agreement'\?"),
    ("scope", "layer", r"`scope` must be one of 'model', 'parameter', 'element', got scope='layer'"),
    ("threshold", 0.5, r"`threshold` must be None at scope='element'"),
    ("strength_scale", "fanin", r"`strength_scale` must be one of 'uniform', 'fan_in', got .*Did you mean 'fan_in'\?"),
    ("update", "proximl", r"`update` must be one of 'gradient', 'proximal', got .*Did you mean 'proximal'\?"),
    ("include", [], r"`include` must have at least one regular expression, got include=\[\]\. Use None for no pat"),
    ("exclude", ["["], r"`exclude` must hold regular expressions that compile .*got exclude='\['\. Escape"),
    ("delay_steps", -1, r"`delay_steps` must be an integer of at least 0, got delay_steps=-1\. Use 0 for no delay"),
    ("warmup_steps", -1, r"`warmup_steps` must be an integer of at least 0, got warmup_steps=-1\. Use 0 for no warm"),
    ("stop_steps", -1, r"`stop_steps` must be an integer of at least 0, got stop_steps=-1\. Use None to never stop"),
    ("averaging", 1.0, r"`averaging` must be less than 1, got averaging=1\.0\. 0\.98 looks back over 50 steps"),
    ("averaging", 1.5, r"`averaging` must be a number in \[0, 1\], got averaging=1\.5\. Use 0 for this step's"),
    ("averaging", -0.1, r"`averaging` must be a number in \[0, 1\], got averaging=-0\.1"),
    ("averaging", math.nan, r"`averaging` must be a number in \[0, 1\], got averaging=nan"),
    ("tolerance", 1.1, r"`tolerance` must be a number in \[0, 1\], got tolerance=1\.1\. It is a share of the penalty"),
    ("tolerance", -0.1, r"`tolerance` must be a number in \[0, 1\], got tolerance=-0\.1"),
    ("tolerance", math.nan, r"`tolerance` must be a number in \[0, 1\], got tolerance=nan"),
    ("stop_steps", 0, r"`stop_steps` must be greater than delay_steps=0, got stop_steps=0\..*use None to never stop"),
]
BAD_TYPES = [
    ("strength", True, r"`strength` must be a finite number of at least 0, got strength=True"),
    ("strength", "0.1", r"`strength` must be a finite number of at least 0, got strength='0\.1'"),
    ("strength", None, r"`strength` must be a finite number of at least 0, got strength=None"),
    ("strength", torch.tensor(0.1), r"`strength` must be a finite number of at least 0, got strength=tensor"),
    ("strength", {"a": "0.1"}, r"`strength\['a'\]` must be a finite number of at least 0"),
    ("strength", {"a": True}, r"`strength\['a'\]` must be a finite number of at least 0"),
    ("strength", {3: 0.1}, r"`strength` must be a list of regular expressions"),
    ("penalty", L1, r"`penalty` must be a name or a Penalty, got .*Write L1\(\) instead"),
    ("include", "weight", r"`include` must be a list of regular expressions, got .*Write include=\['weight'\]\."),
    ("exclude", "weight", r"`exclude` must be a list of regular expressions, got .*Write exclude=\['weight'\]\."),
    ("include", 3, r"`include` must be a list of regular expressions or None, got include=3"),
    ("exclude", [3], r"`exclude` must be a list of regular expressions or None, got exclude=\[3\]"),
    ("delay_steps", True, r"`delay_steps` must be an integer of at least 0, got delay_steps=True"),
    ("warmup_steps", "3", r"`warmup_steps` must be an integer of at least 0, got warmup_steps='3'"),
    ("warmup_steps", None, r"`warmup_steps` must be an integer of at least 0, got warmup_steps=None"),
    ("stop_steps", "2.5", r"`stop_steps` must be an integer of at least 0, got stop_steps='2\.5'"),
    ("averaging", "0.9", r"`averaging` must be a number in \[0, 1\], got averaging='0\.9'"),
    ("averaging", True, r"`averaging` must be a number in \[0, 1\], got averaging=True"),
    ("tolerance", None, r"`tolerance` must be a number in \[0, 1\], got tolerance=None"),
    ("tolerance", True, r"`tolerance` must be a number in \[0, 1\], got tolerance=True"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_a_bad_value_is_told_with_the_way_out(name: str, value: object, message: str) -> None:
    arguments = {"strength": 0.1, name: value}
    with pytest.raises(ValueError, match=message):
        Settings(**arguments)
    with pytest.raises(ValueError, match=message):
        CoherentRegularizer(nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize(("name", "value", "message"), BAD_TYPES)
def test_a_bad_type_is_told_with_the_way_out(name: str, value: object, message: str) -> None:
    arguments = {"strength": 0.1, name: value}
    with pytest.raises(TypeError, match=message):
        Settings(**arguments)
    with pytest.raises(TypeError, match=message):
        CoherentRegularizer(nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize("stop", [3, 4])
def test_stop_must_come_after_the_delay(stop: int) -> None:
    with pytest.raises(ValueError, match=rf"`stop_steps` must be greater than delay_steps=4, got stop_steps={stop}"):
        Settings(strength=0.1, delay_steps=4, stop_steps=stop)
    Settings(strength=0.1, delay_steps=4, stop_steps=5)


@pytest.mark.parametrize("measure", ["temporal", None])
def test_averaging_has_no_meaning_without_a_measure_of_the_penalty(measure: str | None) -> None:
    message = rf"`averaging` must be 0 where coherence={measure!r}, got averaging=0\.9\. Use 'agreement' or 'direction'"
    with pytest.raises(ValueError, match=message):
        Settings(strength=0.1, coherence=measure, averaging=0.9)
    Settings(strength=0.1, coherence=measure, averaging=0.0)


@pytest.mark.parametrize(
    ("measure", "scope"),
    [
        ("agreement", "model"),
        ("agreement", "parameter"),
        ("direction", "element"),
        ("temporal", "element"),
        (None, "element"),
    ],
)
def test_tolerance_has_a_meaning_for_agreement_of_elements_only(measure: str | None, scope: str) -> None:
    message = (
        r"`tolerance` must be 0 but with coherence='agreement' and scope='element', got tolerance=0\.5\. Elsewhere"
    )
    with pytest.raises(ValueError, match=message):
        Settings(strength=0.1, coherence=measure, scope=scope, tolerance=0.5)
    Settings(strength=0.1, coherence=measure, scope=scope, tolerance=0.0)


@pytest.mark.parametrize("name", ["delay_steps", "warmup_steps", "stop_steps"])
@pytest.mark.parametrize("share", [1.1, 2.5, -0.1, math.nan, math.inf])
def test_a_share_lies_between_0_and_1(name: str, share: float) -> None:
    message = rf"`{name}` must be a number in \[0, 1\], got {name}={share!r}\. A float is a share of the training\. Use"
    with pytest.raises(ValueError, match=message):
        Settings(strength=0.1, **{name: share})


@pytest.mark.parametrize(
    ("delay", "stop"), [(0.5, 0.5), (0.5, 0.25), (0.0, 0.0), (0, 0.0), (3, 0.0), (0.5, 0.0), (0.5, 0)]
)
def test_a_share_at_which_it_stops_must_come_after_the_delay(delay: float, stop: float) -> None:
    message = rf"`stop_steps` must be greater than delay_steps={delay}, got stop_steps={stop}\. The penalty acts"
    with pytest.raises(ValueError, match=message):
        Settings(strength=0.1, delay_steps=delay, stop_steps=stop)


def test_a_share_and_a_number_are_compared_when_the_length_is_known() -> None:
    settings = Settings(strength=0.1, delay_steps=10, stop_steps=0.5)
    assert settings.in_steps(40).stop_steps == 20
    with pytest.raises(ValueError, match=r"`stop_steps` must be greater than delay_steps=10, got stop_steps=5"):
        settings.in_steps(10)


@pytest.mark.parametrize("name", ["delay_steps", "warmup_steps", "stop_steps"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_plain_regularizer_refuses_shares(name: str, share: float) -> None:
    message = rf"`{name}` must be an integer, got {name}={share}\. Only a Trainer knows what a share"
    with pytest.raises(TypeError, match=message):
        CoherentRegularizer(nn.Linear(2, 2), strength=0.1, **{name: share})


def test_shares_become_steps_and_all_else_stays() -> None:
    settings = Settings(
        penalty="l2", strength={"a": 0.1}, delay_steps=0.1, warmup_steps=0.3, stop_steps=1.0, tolerance=0.5
    )
    assert settings.has_shares
    in_steps = settings.in_steps(20)
    assert not in_steps.has_shares
    expected = replace(settings, delay_steps=2, warmup_steps=6, stop_steps=20)
    assert in_steps == expected
    assert all(type(getattr(in_steps, name)) is int for name in ("delay_steps", "warmup_steps", "stop_steps"))
    assert settings.delay_steps == 0.1


def test_numbers_of_steps_stay_as_they_are() -> None:
    settings = Settings(strength=0.1, delay_steps=1, warmup_steps=7, stop_steps=3)
    assert not settings.has_shares
    assert settings.in_steps(100) == settings
    assert Settings(strength=0.1).in_steps(100).stop_steps is None


@pytest.mark.parametrize(
    "shares", [{"delay_steps": 0.5}, {"warmup_steps": 0.5}, {"stop_steps": 0.5}, {"warmup_steps": 0.0}], ids=str
)
def test_one_share_is_enough_to_need_the_length(shares: dict[str, float]) -> None:
    assert Settings(strength=0.1, **shares).has_shares


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_shares_that_the_settings_accept_bear_a_short_training(total: int) -> None:
    """As `fast_dev_run=True` makes it, with one step; a share is never to fail because it is rounded."""
    in_steps = Settings(strength=0.1, delay_steps=0.3, stop_steps=0.4).in_steps(total)
    assert in_steps.delay_steps < in_steps.stop_steps


def test_strength_is_required() -> None:
    with pytest.raises(TypeError, match="strength"):
        Settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings(strength=0.1).strength = 0.2


def test_plain_settings_act_from_the_first_step_on() -> None:
    settings = Settings(strength=0.1)
    assert [settings.strength_factor(step) for step in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


def test_delay_waits_that_many_steps() -> None:
    settings = Settings(strength=0.1, delay_steps=3)
    assert [settings.strength_factor(step) for step in range(5)] == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_warmup_reaches_full_strength_at_its_last_step() -> None:
    settings = Settings(strength=0.1, delay_steps=2, warmup_steps=4)
    assert [settings.strength_factor(step) for step in range(8)] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_stop_ends_it_even_within_the_warmup() -> None:
    settings = Settings(strength=0.1, warmup_steps=4, stop_steps=2)
    assert [settings.strength_factor(step) for step in range(4)] == [0.25, 0.5, 0.0, 0.0]


@given(delay=st.integers(0, 20), warmup=st.integers(0, 20), length=st.one_of(st.none(), st.integers(1, 40)))
def test_schedule_rises_between_delay_and_stop_only(delay: int, warmup: int, length: int | None) -> None:
    stop = None if length is None else delay + length
    settings = Settings(strength=0.1, delay_steps=delay, warmup_steps=warmup, stop_steps=stop)
    factors = [settings.strength_factor(step) for step in range(100)]
    end = 100 if stop is None else stop
    assert factors[:delay] == [0.0] * delay
    assert set(factors[end:]) <= {0.0}
    active = factors[delay:end]
    assert all(0 < factor <= 1 for factor in active)
    assert active == sorted(active)
    assert set(active[max(0, warmup - 1) :]) <= {1.0}
    assert all(factor < 1 for factor in active[: max(0, warmup - 1)])
