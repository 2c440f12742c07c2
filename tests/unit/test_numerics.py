"""Sums that are exact enough to decide by."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_gcsr.core.coherence import cosine
from lightning_gcsr.core.numerics import inner, inner_products, wide


@pytest.mark.parametrize("product", [inner, lambda a, b: inner_products([a], [b])[0]], ids=["inner", "inner_products"])
def test_products_of_many_equal_numbers_are_exact(product: object) -> None:
    """A plain float32 dot product of 10 million equal numbers is off by a thousandth."""
    numbers = torch.full((1 << 18,), 0.0123) if product is not inner else torch.full((10_000_000,), 0.0123)
    exact = float(np.float32(0.0123)) ** 2 * len(numbers)
    square = product(numbers, numbers).double()
    assert float(square) == pytest.approx(exact, rel=1e-6)
    assert 1 - 1e-6 <= float(cosine(square, square, square)) <= 1


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 150_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_inner_takes_every_number_once_at_the_borders_of_its_runs(size: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    exact = (left.to(torch.complex128).conj() * right.to(torch.complex128)).real
    result = inner(left, right)
    assert result.dtype == torch.float64
    assert result.shape == ()
    assert float(result) == pytest.approx(math.fsum(exact.tolist()), abs=1e-7 * float(exact.abs().sum() + 1))


def test_inner_of_sixteen_bits_neither_overflows_nor_vanishes() -> None:
    for number in (300.0, 1e-4):
        numbers = torch.full((70_000,), number, dtype=torch.float16)
        assert float(inner(numbers, numbers)) == pytest.approx(70_000 * float(numbers[0]) ** 2, rel=1e-6)


def test_inner_of_views_is_that_of_their_copies() -> None:
    left, strided = torch.randn(300, 400).t(), torch.randn(800, 300)[::2]
    assert float(inner(strided, left)) == float(inner(strided.contiguous(), left.contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sums_show_what_is_not_finite(bad: float) -> None:
    numbers = torch.ones(70_000)
    numbers[-1] = bad
    assert not inner(numbers, numbers).isfinite()
    assert not inner_products([numbers], [numbers])[0].isfinite()


def test_wide_raises_16_bits_and_nothing_else() -> None:
    raised = {dtype: wide(torch.ones(2, dtype=dtype)).dtype for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    assert raised == {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
