"""The cosine, the measures, and the signs of single weights."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import oracle
from torch import Tensor

from lightning_gcsr import CoherenceMeasure, Gate
from lightning_gcsr.core.coherence import companion, cosine
from lightning_gcsr.core.penalties import L1

NUMBERS = st.one_of(st.just(0.0), st.floats(1e-3, 100.0), st.floats(-100.0, -1e-3))


@st.composite
def vector_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    size = draw(st.integers(1, 12))
    left, right = (draw(hnp.arrays("float64", size, elements=NUMBERS)) for _ in range(2))
    return torch.from_numpy(left), torch.from_numpy(right)


def cosine_of(left: Tensor, right: Tensor) -> float:
    return float(cosine((left * left).sum(), (left * right).sum(), (right * right).sum()))


@given(pair=vector_pairs(), a=st.floats(1e-6, 1e6), b=st.floats(1e-6, 1e6))
def test_cosine_is_that_of_two_flat_vectors_whatever_their_scale(
    pair: tuple[Tensor, Tensor], a: float, b: float
) -> None:
    left, right = pair
    expected = oracle.coherence(left.numpy(), right.numpy())
    assert cosine_of(a * left, b * right) == pytest.approx(expected, abs=1e-12)
    assert cosine_of(right, left) == pytest.approx(expected, abs=1e-12)
    assert cosine_of(-left, right) == pytest.approx(-expected, abs=1e-12)


def test_cosine_stays_in_its_range_and_shows_nan() -> None:
    one, nan = torch.tensor(1.0, dtype=torch.float64), torch.tensor(math.nan, dtype=torch.float64)
    assert float(cosine(one, one * (1 + 1e-9), one)) == 1.0
    assert float(cosine(one, -one * (1 + 1e-9), one)) == -1.0
    for zeros in ((0 * one, 0 * one, one), (one, 0 * one, 0 * one), (0 * one, 0 * one, 0 * one)):
        assert float(cosine(*zeros)) == 0.0
    assert all(cosine(*sums).isnan() for sums in ((nan, nan, one), (one, nan, nan)))
    for size in (1e-150, 1e150):  # the product of two squares would vanish or overflow
        assert float(cosine(one * size**2, one * size**2, one * size**2)) == pytest.approx(1.0)


def test_companions_are_those_of_the_table() -> None:
    g, r = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    assert companion("direction", g, r, 0.5).tolist() == [1.5, 1.5]
    assert companion("agreement", g, r, 0.5).tolist() == [1.0, -1.0]


@given(pair=vector_pairs())
def test_a_weight_is_coherent_where_signs_do_not_oppose(pair: tuple[Tensor, Tensor]) -> None:
    left, right = pair
    expected = [float(oracle.same_sign(a, b)) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    kept = left.clone(), right.clone()
    assert L1().signed(left, right).ge(0).tolist() == expected
    assert torch.equal(left, kept[0])
    assert torch.equal(right, kept[1])


@pytest.mark.parametrize(
    ("dtype", "tiny"),
    [(torch.float32, 1e-30), (torch.float32, 1e-44), (torch.float64, 1e-300), (torch.complex64, 1e-30)],
)
def test_tiny_opposed_weights_are_not_coherent_and_zeros_are(dtype: torch.dtype, tiny: float) -> None:
    """The product of two tiny numbers vanishes."""
    left = torch.tensor([tiny, -tiny, 0.0, 1.0, math.nan], dtype=dtype)
    right = torch.tensor([-tiny, -tiny, 1.0, 0.0, 1.0], dtype=dtype)
    assert L1().signed(left, right).ge(0).tolist() == [0, 1, 1, 1, 0]


def test_complex_weights_cohere_where_the_angle_is_at_most_a_right_one() -> None:
    left, right = torch.tensor([1, 1, 1, 1j, 1j]), torch.tensor([1 + 5j, -1 + 5j, 2j, 1 + 1j, 1 - 1j])
    assert L1().signed(left, right).ge(0).tolist() == [1, 0, 1, 1, 0]


# --- measures of one's own -----------------------------------------------------------------------------------------


class Flat(CoherenceMeasure):
    """Forgets the shape."""

    def __init__(self, size: int) -> None:
        self.size = size

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        return gradient.flatten()


class Number(CoherenceMeasure):
    """Gives no tensor."""

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Any:
        return 1.0


@pytest.mark.parametrize(
    ("measure", "error", "message"),
    [
        (Flat(3), ValueError, r"got coherence=Flat\(size=3\)\. For a gradient of shape \(2, 2\) it returned \(4,\)"),
        (Number(), ValueError, r"`coherence` must have a companion shaped like the gradient, .*it returned float"),
        (Number, TypeError, r"`coherence` must be an instance, got .*Write Number\(\)\."),
        (Number().companion, ValueError, r"`coherence` must be one of 'direction', 'agreement', 'temporal', got"),
    ],
)
def test_what_is_no_measure_is_refused(measure: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Gate(measure)
