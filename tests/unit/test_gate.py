"""The gate: its defaults, its decisions, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gcsr import CoherenceMeasure, Gate
from lightning_gcsr.core.coherence import GradientStatistics


class Own(CoherenceMeasure):
    """A measure with a threshold of its own."""

    threshold = 0.3

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        return penalty_gradient


@pytest.mark.parametrize(
    ("arguments", "threshold", "tolerance", "averaging"),
    [
        ((), None, 0.1, 0.98),
        (("direction", "model"), 0.1, 0.0, 0.0),
        (("direction", "parameter", 0.0), 0.0, 0.0, 0.0),
        (("agreement", "model", None, None, 0.5), 0.0, 0.0, 0.5),
        (("agreement", "element", None, None, 0), None, 0.0, 0.0),
        (("agreement", "element", None, 0.5, 0), None, 0.5, 0.0),
        (("temporal", "parameter"), 0.0, 0.0, 0.0),
        ((Own(), "model"), 0.3, 0.0, 0.0),
        ((Own(), "model", -1), -1.0, 0.0, 0.0),
    ],
    ids=str,
)
def test_defaults_depend_on_measure_and_scope(
    arguments: Any, threshold: Any, tolerance: float, averaging: float
) -> None:
    gate = Gate(*arguments)
    assert (gate.threshold, gate.tolerance, gate.averaging) == (threshold, tolerance, averaging)
    assert gate.by_element is (gate.scope == "element")
    assert gate.uses_previous_gradient is (gate.coherence == "temporal")
    with pytest.raises(FrozenInstanceError):
        gate.scope = "model"
    if not isinstance(gate.coherence, Own):
        assert eval(repr(gate)) == gate  # what is printed could be typed in


def statistics(gradients: list[Tensor], companions: list[Tensor]) -> GradientStatistics:
    def products(left: list[Tensor], right: list[Tensor]) -> Tensor:
        return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)])

    squares = products(gradients, gradients)
    return GradientStatistics(
        squares, products(gradients, companions), products(companions, companions), squares, squares
    )


def test_it_opens_where_coherence_reaches_the_threshold_for_each_tensor_or_for_all() -> None:
    up = torch.tensor([3.0, 4.0], dtype=torch.float64)
    sums = statistics([up, up, 0 * up], [up, -up, up])
    assert sums.coherence_by_parameter.tolist() == [1, -1, 0]
    assert float(sums.coherence) == 0
    for threshold, expected in ((1.0, [1, 0, 0]), (0.0, [1, 0, 1]), (-1.0, [1, 1, 1]), (0.1, [1, 0, 0])):
        assert Gate("agreement", "parameter", threshold).decide(sums).tolist() == expected
    assert Gate("agreement", "model", 0.0).decide(sums).tolist() == [True] * 3
    assert Gate("agreement", "model", 0.1).decide(sums).tolist() == [False] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", ["model", "parameter"])
def test_a_gradient_that_is_not_finite_anywhere_closes_every_gate(scope: Any, bad: float) -> None:
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    sums = statistics([good, broken, good], [good, good, good])
    assert not sums.finite
    assert Gate("agreement", scope, -1.0).decide(sums).tolist() == [False] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"coherence": "agrement"},
            ValueError,
            r"`coherence` must be one of .*got coherence='agrement'.*'agreement'\?",
        ),
        ({"coherence": None}, ValueError, r"`coherence` must be a coherence measure, got coherence=None\. .*gate=None"),
        ({"scope": "elment"}, ValueError, r"`scope` must be one of .*got scope='elment'\. Did you mean 'element'\?"),
        (
            {"scope": "model", "threshold": 1.1},
            ValueError,
            r"`threshold` must be a number in \[-1, 1\], got threshold=1\.1",
        ),
        (
            {"scope": "model", "threshold": True},
            TypeError,
            r"`threshold` must be a number in \[-1, 1\], got threshold=True",
        ),
        ({"threshold": 0.0}, ValueError, r"`threshold` must be None at scope='element'.*got threshold=0\.0.*leave it"),
        ({"averaging": 1.0}, ValueError, r"`averaging` must be less than 1, got averaging=1\.0\. 0\.98 looks back"),
        ({"averaging": -0.1}, ValueError, r"`averaging` must be a number in \[0, 1\], got averaging=-0\.1\. Use 0"),
        ({"averaging": "0.9"}, TypeError, r"`averaging` must be a number in \[0, 1\], got averaging='0\.9'"),
        (
            {"coherence": "temporal", "averaging": 0.9},
            ValueError,
            r"`averaging` must be 0 where coherence='temporal', got averaging=0\.9\. Use 'agreement' or 'direction'",
        ),
        (
            {"tolerance": 1.1},
            ValueError,
            r"`tolerance` must be a number in \[0, 1\], got tolerance=1\.1\. It is a frac",
        ),
        ({"tolerance": math.nan}, ValueError, r"`tolerance` must be a number in \[0, 1\], got tolerance=nan"),
        (
            {"scope": "model", "tolerance": 0.5},
            ValueError,
            r"`tolerance` must be 0 unless coherence='agreement' and scope='element', got tolerance=0\.5\. Elsewhere",
        ),
        (
            {"coherence": "direction", "tolerance": 0.5},
            ValueError,
            r"`tolerance` must be 0 unless coherence='agreement'",
        ),
    ],
    ids=str,
)
def test_a_bad_argument_is_an_error(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Gate(**arguments)
