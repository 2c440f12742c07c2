"""The sums, the cosine and the gate."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import oracle

from lightning_gcsr.core.blocks import SIZE, SIZE_ELSEWHERE
from lightning_gcsr.core.old_gate import Gate, Sums, cosine, element_coherent, inner, inner_by_row, rough_square

NUMBERS = st.one_of(st.just(0.0), st.floats(1e-3, 100.0), st.floats(-100.0, -1e-3))


@st.composite
def vector_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    size = draw(st.integers(1, 12))
    left, right = (draw(hnp.arrays("float64", size, elements=NUMBERS)) for _ in range(2))
    return torch.from_numpy(left), torch.from_numpy(right)


def cosine_of(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(cosine(inner(left, left), inner(left, right), inner(right, right)))


def sums_of(gradients: list[torch.Tensor], companions: list[torch.Tensor]) -> Sums:
    squares = torch.stack([inner(c, c) for c in companions])
    return Sums(
        torch.stack([inner(g, g) for g in gradients]),
        torch.stack([inner(g, c) for g, c in zip(gradients, companions, strict=True)]),
        squares,
        squares,
        torch.stack([inner(g, g) for g in gradients]),
    )


# --- inner ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten_million_equal_numbers() -> torch.Tensor:
    return torch.full((10_000_000,), 0.0123)


def test_inner_of_ten_million_equal_numbers_is_exact(ten_million_equal_numbers: torch.Tensor) -> None:
    exact = float(np.float32(0.0123)) ** 2 * 10_000_000
    assert float(inner(ten_million_equal_numbers, ten_million_equal_numbers)) == pytest.approx(exact, rel=1e-6)


def test_cosine_of_ten_million_equal_numbers_with_themselves_is_one(ten_million_equal_numbers: torch.Tensor) -> None:
    assert 1 - 1e-6 <= cosine_of(ten_million_equal_numbers, ten_million_equal_numbers) <= 1


@given(pair=vector_pairs())
def test_inner_is_the_exact_sum(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    left, right = pair
    exact = math.fsum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True))
    scale = math.fsum(abs(a * b) for a, b in zip(left.tolist(), right.tolist(), strict=True))
    result = inner(left, right)
    assert result.dtype == torch.float64
    assert result.shape == ()
    assert float(result) == pytest.approx(exact, abs=1e-14 * scale)


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 150_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_inner_takes_every_number_once_at_chunk_borders(size: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    exact = float(np.dot(left.double().numpy(), right.double().numpy()))
    scale = float(left.double().norm() * right.double().norm())
    result = inner(left, right)
    assert result.dtype == torch.float64
    assert float(result) == pytest.approx(exact, abs=1e-7 * scale)


@pytest.mark.parametrize("size", [100, 70_000])
def test_inner_of_sixteen_bits_does_not_overflow(size: int) -> None:
    big = torch.full((size,), 300.0, dtype=torch.float16)
    assert float(inner(big, big)) == pytest.approx(size * 90_000, rel=1e-6)
    small = torch.full((size,), 1e-4, dtype=torch.float16)
    assert float(inner(small, small)) == pytest.approx(size * float(small[0]) ** 2, rel=1e-6)


@pytest.mark.parametrize("size", [10, 70_000])
def test_inner_of_complex_is_the_real_part(size: int) -> None:
    left, right = torch.randn(size, dtype=torch.complex128), torch.randn(size, dtype=torch.complex128)
    result = inner(left, right)
    assert not result.is_complex()
    assert float(result) == pytest.approx(float((left.conj() * right).sum().real), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (300, 400)])
def test_inner_of_views_is_that_of_their_copies(shape: tuple[int, int]) -> None:
    base, other = torch.randn(shape), torch.randn(shape[::-1])
    left, strided = base.t(), torch.randn(2 * shape[1], shape[0])[::2]
    assert not left.is_contiguous()
    assert float(inner(left, other)) == float(inner(left.contiguous(), other))
    assert float(inner(other, left)) == float(inner(other, left.contiguous()))
    assert float(inner(strided, left)) == float(inner(strided.contiguous(), left.contiguous()))


def test_inner_of_nothing_is_zero() -> None:
    assert float(inner(torch.empty(0, 3), torch.empty(0, 3))) == 0.0


def test_inner_of_non_finite_numbers_is_not_finite() -> None:
    for bad in (math.nan, math.inf):
        for size in (3, 70_000):
            left = torch.ones(size)
            left[-1] = bad
            assert not inner(left, left).isfinite()


# --- cosine --------------------------------------------------------------------------------------------------------


@given(pair=vector_pairs())
def test_cosine_is_that_of_two_flat_vectors(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    left, right = pair
    assert cosine_of(left, right) == pytest.approx(oracle.coherence(left.numpy(), right.numpy()), abs=1e-12)


@given(pair=vector_pairs(), a=st.floats(1e-6, 1e6), b=st.floats(1e-6, 1e6))
def test_cosine_does_not_depend_on_scale(pair: tuple[torch.Tensor, torch.Tensor], a: float, b: float) -> None:
    left, right = pair
    assert cosine_of(a * left, b * right) == pytest.approx(cosine_of(left, right), abs=1e-12)
    assert cosine_of(-a * left, b * right) == pytest.approx(-cosine_of(left, right), abs=1e-12)


@given(pair=vector_pairs(), random=st.randoms(use_true_random=False))
def test_cosine_does_not_depend_on_order(pair: tuple[torch.Tensor, torch.Tensor], random: object) -> None:
    left, right = pair
    order = list(range(len(left)))
    random.shuffle(order)
    assert cosine_of(left[order], right[order]) == pytest.approx(cosine_of(left, right), abs=1e-12)
    assert cosine_of(right, left) == pytest.approx(cosine_of(left, right), abs=1e-12)


@given(pair=vector_pairs())
def test_cosine_stays_in_its_range(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    left, right = pair
    assert -1 <= cosine_of(left, right) <= 1
    if (left != 0).any():
        assert cosine_of(left, 3 * left) == pytest.approx(1, abs=1e-12)
        assert cosine_of(left, -3 * left) == pytest.approx(-1, abs=1e-12)


def test_rounding_never_leaves_the_range() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    assert float(cosine(one, one * (1 + 1e-9), one)) == 1.0
    assert float(cosine(one, -one * (1 + 1e-9), one)) == -1.0


@pytest.mark.parametrize(("left", "right"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_zero_gradient_has_coherence_zero(left: float, right: float) -> None:
    assert cosine_of(torch.full((3,), left), torch.full((3,), right)) == 0.0


def test_nan_is_not_hidden() -> None:
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    for sums in ((nan, nan, one), (one, nan, nan), (nan, nan, nan)):
        assert cosine(*sums).isnan()


@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_norms_of_extreme_size_neither_vanish_nor_overflow(size: float) -> None:
    square = torch.tensor(size, dtype=torch.float64) ** 2
    assert float(cosine(square, square, square)) == pytest.approx(1.0)


def test_cosine_works_tensor_by_tensor() -> None:
    result = cosine(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([-6.0, 0.0, 1.0]), torch.tensor([9.0, 1.0, 4.0]))
    assert result.tolist() == [-1.0, 0.0, 0.5]


# --- inner_by_row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("rows", [1, 3])
def test_inner_by_row_is_that_of_each_row(rows: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(rows, 4, 5).to(dtype), torch.randn(rows, 4, 5).to(dtype)
    found = inner_by_row(left, right, rows)
    assert [float(x) for x in found] == pytest.approx([float(inner(left[i], right[i])) for i in range(rows)], rel=1e-5)
    assert [float(x) for x in inner_by_row(left[:, :0], right[:, :0], rows)] == [0.0] * rows


def test_sums_over_the_largest_block_are_exact() -> None:
    equal = torch.full((SIZE,), 0.1)
    [found] = inner_by_row(equal, equal, 1)
    assert float(found) == pytest.approx(SIZE * float(equal[0]) ** 2, rel=1e-6)
    signs = torch.randn(SIZE_ELSEWHERE).sign()
    assert float(rough_square(signs)) == SIZE_ELSEWHERE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20])
def test_rough_square_shows_what_is_not_finite(bad: float) -> None:
    numbers = torch.randn(3, 1000)
    assert rough_square(numbers).isfinite()
    numbers[1, 500] = bad
    assert not rough_square(numbers).isfinite()
    assert not rough_square(numbers.to(torch.complex64)).isfinite()


# --- element_coherent ----------------------------------------------------------------------------------------------


@given(pair=vector_pairs())
def test_element_is_coherent_where_signs_do_not_oppose(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    left, right = pair
    expected = [oracle.same_sign(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    assert element_coherent(left, right).tolist() == expected
    assert element_coherent(right, left).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_zero_element_counts_as_coherent(dtype: torch.dtype) -> None:
    left, right = torch.tensor([0, 0, -0.0, 1, -1]).to(dtype), torch.tensor([1, -1, 1, 0, -0.0]).to(dtype)
    assert element_coherent(left, right).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("size", [1, 40])
def test_nan_gradient_is_not_coherent(dtype: torch.dtype, size: int) -> None:
    nan, one = torch.full((size,), math.nan).to(dtype), torch.ones(size).to(dtype)
    assert not element_coherent(nan, one).any()
    assert not element_coherent(nan, nan).any()


def test_nothing_is_coherent_under_a_limit_that_is_nan() -> None:
    numbers = torch.tensor([1.0, 0.0, math.inf])
    assert not element_coherent(numbers, numbers, torch.tensor(math.nan)).any()


@pytest.mark.parametrize(
    ("dtype", "tiny"),
    [
        (torch.float16, 6e-8),
        (torch.bfloat16, 1e-30),
        (torch.float32, 1e-30),
        (torch.float32, 1e-44),
        (torch.float64, 1e-300),
        (torch.complex64, 1e-30),
    ],
)
def test_tiny_opposed_elements_are_not_coherent(dtype: torch.dtype, tiny: float) -> None:
    left, right = torch.tensor([tiny, -tiny]).to(dtype), torch.tensor([-tiny, -tiny]).to(dtype)
    if dtype == torch.float64:
        left, right = torch.tensor([tiny, -tiny], dtype=dtype), torch.tensor([-tiny, -tiny], dtype=dtype)
    assert (left != 0).all()
    assert element_coherent(left, right).tolist() == [False, True]


def test_complex_elements_cohere_where_the_angle_is_at_most_a_right_one() -> None:
    left = torch.tensor([1 + 0j, 1 + 0j, 1 + 0j, 1j, 1j])
    right = torch.tensor([1 + 5j, -1 + 5j, 2j, 1 + 1j, 1 - 1j])
    assert element_coherent(left, right).tolist() == [True, False, True, True, False]


def test_elements_are_not_changed() -> None:
    left, right = torch.randn(5), torch.randn(5)
    copies = left.clone(), right.clone()
    element_coherent(left, right)
    assert torch.equal(left, copies[0])
    assert torch.equal(right, copies[1])


# --- Gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "expected"), [("direction", 0.1), ("agreement", 0.0), ("temporal", 0.0), (None, 0.0)]
)
def test_default_threshold(measure: str | None, expected: float) -> None:
    assert Gate(measure, "model").threshold == expected


def test_threshold_zero_is_not_the_default() -> None:
    assert Gate("direction", "model", 0.0).threshold == 0.0
    assert Gate("direction", "parameter", -1).threshold == -1.0


def test_only_temporal_needs_the_last_gradient() -> None:
    assert [Gate(m, "model").uses_previous_gradient for m in ("direction", "agreement", "temporal", None)] == [
        False,
        False,
        True,
        False,
    ]


def test_element_scope_decides_by_element_unless_always_open() -> None:
    assert Gate("agreement", "element").by_element
    assert not Gate(None, "element").by_element
    assert not Gate("agreement", "parameter").by_element
    assert not Gate("agreement", "model").by_element


def test_companions_are_those_of_the_table() -> None:
    g, r = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    assert Gate("direction", "model").companion(g, r, 0.5).tolist() == [1.5, 1.5]
    assert Gate("agreement", "model").companion(g, r, 0.5).tolist() == [1.0, -1.0]
    assert Gate("temporal", "model").uses_previous_gradient


@given(
    pairs=st.lists(vector_pairs(), min_size=1, max_size=4),
    scope=st.sampled_from(["model", "parameter"]),
    threshold=st.floats(-1, 1),
)
def test_gate_opens_where_coherence_reaches_the_threshold(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], scope: str, threshold: float
) -> None:
    gradients, companions = [list(side) for side in zip(*pairs, strict=True)]
    sums = sums_of(gradients, companions)
    apart = [oracle.coherence(g.numpy(), c.numpy()) for g, c in pairs]
    together = oracle.coherence(oracle.flatten(gradients), oracle.flatten(companions))
    assert float(sums.coherence) == pytest.approx(together, abs=1e-12)
    assert sums.coherence_by_parameter.tolist() == pytest.approx(apart, abs=1e-12)
    decisions = Gate("agreement", scope, threshold).decide(sums)
    assert decisions.dtype == torch.bool
    for decision, value in zip(decisions.tolist(), [together] * len(pairs) if scope == "model" else apart, strict=True):
        if abs(value - threshold) > 1e-9:
            assert decision == (value >= threshold)


@pytest.mark.parametrize("scope", ["model", "parameter"])
def test_coherence_equal_to_the_threshold_injects(scope: str) -> None:
    vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert Gate("agreement", scope, 1.0).decide(sums_of([vector], [vector])).tolist() == [True]
    assert Gate("agreement", scope, -1.0).decide(sums_of([vector], [-vector])).tolist() == [True]
    assert Gate("agreement", scope, 0.0).decide(sums_of([vector * 0], [vector])).tolist() == [True]
    assert Gate("agreement", scope, 0.1).decide(sums_of([vector * 0], [vector])).tolist() == [False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", ["model", "parameter"])
@pytest.mark.parametrize("measure", ["direction", "agreement", "temporal"])
def test_non_finite_gradient_anywhere_closes_every_gate(measure: str, scope: str, bad: float) -> None:
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    sums = sums_of([good, broken, good], [good, good, good])
    assert not sums.finite
    assert Gate(measure, scope).decide(sums).tolist() == [False, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("agrement", "model"), r"`coherence` must be one of 'direction', .*got coherence='agrement'.*'agreement'\?"),
        (("none", "model"), r"`coherence` must be one of 'direction', 'agreement', 'temporal', None, got"),
        ((0, "model"), r"`coherence` must be one of .*got coherence=0\."),
        (("agreement", "elment"), r"`scope` must be one of .*got scope='elment'\. Did you mean 'element'\?"),
        (("agreement", None), r"`scope` must be one of 'model', 'parameter', 'element', got scope=None"),
        (("direction", "model", 1.1), r"`threshold` must be a number in \[-1, 1\], got threshold=1\.1"),
        (("direction", "model", -1.1), r"`threshold` must be a number in \[-1, 1\], got threshold=-1\.1"),
        (("direction", "model", math.nan), r"`threshold` must be a number in \[-1, 1\], got threshold=nan"),
        (("direction", "element", 0.1), r"`threshold` must be None at scope='element'.*got threshold=0\.1.*leave it"),
        (("direction", "element", 0.0), r"`threshold` must be None at scope='element'.*got threshold=0\.0"),
        ((None, "model", 0.5), r"`threshold` must be None where coherence=None, got threshold=0\.5\. Name a coher"),
        ((None, "element", 0.0), r"`threshold` must be None where coherence=None, got threshold=0\.0"),
    ],
)
def test_bad_gate_arguments_are_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(*arguments)


@pytest.mark.parametrize("threshold", ["0.1", True, torch.tensor(0.1)])
def test_threshold_must_be_a_number(threshold: object) -> None:
    with pytest.raises(TypeError, match=r"`threshold` must be a number in \[-1, 1\], got threshold="):
        Gate("direction", "model", threshold)
