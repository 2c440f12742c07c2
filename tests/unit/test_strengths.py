"""The strength of each parameter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcsr.core.strengths import assign_strengths, fan_in

# --- fan_in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), 1), ((7,), 1), ((3, 5), 5), ((16, 3, 5, 5), 75), ((4, 2, 3), 6), ((0, 3), 0)],
)
def test_fan_in_counts_the_weights_of_one_output(shape: tuple[int, ...], expected: float) -> None:
    assert fan_in(torch.empty(shape)) == expected


# --- assign_strengths ----------------------------------------------------------------------------------------------

SHAPES = {"conv.weight": (8, 3, 3, 3), "body.weight": (10, 20), "head.weight": (5, 10), "head.bias": (5,)}
PARAMETERS = {name: torch.empty(shape) for name, shape in SHAPES.items()}


def test_one_number_is_the_strength_of_all() -> None:
    assert assign_strengths(PARAMETERS, 0.25) == dict.fromkeys(PARAMETERS, 0.25)
    assert assign_strengths(PARAMETERS, 0) == dict.fromkeys(PARAMETERS, 0.0)


def test_the_first_matching_pattern_wins() -> None:
    strengths = assign_strengths(PARAMETERS, {"head": 0.1, "weight": 0.2, "bias": 0.3})
    assert strengths == {"conv.weight": 0.2, "body.weight": 0.2, "head.weight": 0.1, "head.bias": 0.1}
    assert assign_strengths(PARAMETERS, {"bias": 0.3, "head": 0.1})["head.bias"] == 0.3


def test_parameters_keep_their_order() -> None:
    assert list(assign_strengths(PARAMETERS, {"bias": 1.0, "head": 2.0, "conv": 3.0})) == [
        "conv.weight",
        "head.weight",
        "head.bias",
    ]


def test_unmatched_parameters_are_left_out() -> None:
    assert list(assign_strengths(PARAMETERS, {"conv": 0.1})) == ["conv.weight"]


def test_zero_beside_positive_is_left_out() -> None:
    assert assign_strengths(PARAMETERS, {"conv": 0.0, "weight": 0.1}) == {"body.weight": 0.1, "head.weight": 0.1}


def test_all_zero_is_kept() -> None:
    assert assign_strengths(PARAMETERS, {"conv": 0.0, "head": 0}) == {
        "conv.weight": 0.0,
        "head.weight": 0.0,
        "head.bias": 0.0,
    }


def test_a_strength_for_nothing_is_told_near_names() -> None:
    with pytest.raises(ValueError, match=r"`strength` must match the name .*got strength='haed'\. Near names: 'head\."):
        assign_strengths(PARAMETERS, {"haed": 0.1, "weight": 0.1})


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, {"weight": -1.0}])
def test_a_bad_strength_is_an_error(strength: object) -> None:
    with pytest.raises(ValueError, match="must be a finite number of at least 0"):
        assign_strengths(PARAMETERS, strength)


def test_an_unknown_scale_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"`strength_scale` must be one of 'uniform', 'fan_in', got .*mean 'uniform'\?"
    ):
        assign_strengths(PARAMETERS, 0.1, "unifrom")


def test_fan_in_scale_is_in_proportion_to_the_fan_in() -> None:
    strengths = assign_strengths(PARAMETERS, 0.1, "fan_in")
    ratios = {strengths[name] / fan_in(PARAMETERS[name]) for name in PARAMETERS}
    assert max(ratios) == pytest.approx(min(ratios))
    assert strengths["conv.weight"] > strengths["body.weight"] > strengths["head.weight"] > strengths["head.bias"] > 0


def test_fan_in_scale_multiplies_the_strength_of_the_pattern() -> None:
    plain = assign_strengths(PARAMETERS, {".": 1.0}, "fan_in")
    mixed = assign_strengths(PARAMETERS, {"head": 2.0, ".": 1.0}, "fan_in")
    assert mixed["head.weight"] == pytest.approx(2 * plain["head.weight"])
    assert mixed["conv.weight"] == pytest.approx(plain["conv.weight"])


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(shapes=st.lists(shapes, min_size=1, max_size=6), strength=st.floats(1e-6, 10))
def test_fan_in_scale_preserves_the_mean_over_weights(shapes: list[list[int]], strength: float) -> None:
    parameters = {str(i): torch.empty(shape) for i, shape in enumerate(shapes)}
    strengths = assign_strengths(parameters, strength, "fan_in")
    total = sum(parameter.numel() for parameter in parameters.values())
    weighted = sum(parameters[name].numel() * value for name, value in strengths.items())
    assert weighted == pytest.approx(strength * total, rel=1e-9)


@given(shapes=st.lists(shapes, min_size=2, max_size=6), data=st.data())
def test_strengths_are_those_of_a_plain_search(shapes: list[list[int]], data: st.DataObject) -> None:
    parameters = {f"layer{i}": torch.empty(shape) for i, shape in enumerate(shapes)}
    digits = data.draw(st.lists(st.integers(0, len(shapes) - 1), min_size=1, max_size=4, unique=True))
    mapping = {f"layer{digit}": data.draw(st.sampled_from([0.0, 0.5, 2.0])) for digit in digits}
    expected = {name: mapping[name] for name in parameters if name in mapping}
    if any(mapping.values()):
        expected = {name: value for name, value in expected.items() if value}
    assert assign_strengths(parameters, mapping) == expected
