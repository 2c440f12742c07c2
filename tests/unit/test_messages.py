"""The one form of errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_gcsr.validation import (
    argument_error,
    check_choice,
    check_finite_number,
    check_integer,
    did_you_mean,
    near_names,
)


def test_an_error_names_argument_rule_value_and_way_out() -> None:
    error = argument_error("dim", "x", "must be an integer", "Use dim=0.", TypeError)
    assert type(error) is TypeError
    assert str(error) == "`dim` must be an integer, got dim='x'. Use dim=0."


def test_an_error_without_advice_ends_with_the_value() -> None:
    assert str(argument_error("dim", 3, "must be small")) == "`dim` must be small, got dim=3."


def test_near_names_come_best_first() -> None:
    known = ["layer1.bias", "head.weight", "layer1.weight"]
    assert near_names("layer1.wieght", known)[0] == "layer1.weight"
    assert len(near_names("layer1.wieght", known, count=2)) == 2


def test_the_first_names_stand_in_where_none_is_near() -> None:
    assert near_names("zzzz", ["abc", "def", "ghi", "jkl"], count=2) == ["abc", "def"]
    assert near_names("zzzz", []) == []
    assert near_names("abd", iter(["abc", "xyz"])) == ["abc"]


def test_a_hint_is_given_only_where_a_name_is_near() -> None:
    assert did_you_mean("elemnt", ["model", "element"]) == "Did you mean 'element'?"
    assert did_you_mean("qqq", ["model", "element"]) == ""
    assert did_you_mean(3, ["model"]) == ""


@pytest.mark.parametrize("value", ["a", None, "b"])
def test_choices_pass(value: object) -> None:
    check_choice("x", value, ["a", None, "b"])


@pytest.mark.parametrize("value", ["c", 0, False, 1.5, ["a"]])
def test_anything_but_a_choice_is_an_error(value: object) -> None:
    with pytest.raises(ValueError, match=r"`x` must be one of 'a', None, got x="):
        check_choice("x", value, ["a", None])


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.float64(1), np.int64(1)])
def test_numbers_in_bounds_pass(value: object) -> None:
    check_finite_number("x", value, minimum=0, maximum=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9])
def test_a_number_out_of_bounds_is_a_value_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"`x` must be a finite number of at least 0, got x=.*\. Use 0\."):
        check_finite_number("x", value, minimum=0, advice="Use 0.")


@pytest.mark.parametrize("value", ["1", None, True, False, 1j, [1]])
def test_anything_but_a_real_number_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=r"`x` must be a finite number, got x="):
        check_finite_number("x", value)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({}, "a finite number"),
        ({"minimum": 1}, "a finite number of at least 1"),
        ({"maximum": 2.5}, r"a finite number of at most 2\.5"),
        ({"minimum": -1, "maximum": 1}, r"a number in \[-1, 1\]"),
    ],
)
def test_the_rule_states_the_bounds(bounds: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=rf"`x` must be {words}, got x=nan"):
        check_finite_number("x", math.nan, **bounds)


@pytest.mark.parametrize("value", [0, 3, np.int32(2), 10**30])
def test_integers_pass(value: object) -> None:
    check_integer("x", value, minimum=0)


@pytest.mark.parametrize("value", [1.0, "1", None, True])
def test_anything_but_an_integer_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=r"`x` must be an integer of at least 0, got x="):
        check_integer("x", value, minimum=0)


def test_a_small_integer_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"`x` must be an integer of at least 0, got x=-1\. Use 0\."):
        check_integer("x", -1, minimum=0, advice="Use 0.")
    check_integer("x", -1)
