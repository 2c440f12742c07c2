"""The four penalties against autograd and against a search for the proximal map."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import oracle

from lightning_gcsr import L1, L2, ElasticNet, GroupLasso, Penalty
from lightning_gcsr.core.penalties import resolve_penalty

PAIRS = [
    pytest.param(L1(), ("l1",), id="l1"),
    pytest.param(L2(), ("l2",), id="l2"),
    pytest.param(ElasticNet(0.3), ("elastic_net", 0.3), id="elastic_net"),
    pytest.param(ElasticNet(0.0), ("elastic_net", 0.0), id="elastic_net-all-l2"),
    pytest.param(ElasticNet(1), ("elastic_net", 1), id="elastic_net-all-l1"),
    pytest.param(GroupLasso(), ("group_lasso", 0), id="group_lasso"),
    pytest.param(GroupLasso(1), ("group_lasso", 1), id="group_lasso-1"),
    pytest.param(GroupLasso(-1), ("group_lasso", -1), id="group_lasso-minus-1"),
]
PENALTIES = [pytest.param(pair.values[0], id=pair.id) for pair in PAIRS]

numbers = st.one_of(st.just(0.0), st.floats(1e-3, 10.0), st.floats(-10.0, -1e-3))
steps = st.one_of(st.just(0.0), st.floats(1e-3, 5.0))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=4))
    return torch.from_numpy(draw(hnp.arrays("float64", shape, elements=numbers)))


@pytest.mark.parametrize(("penalty", "spec"), PAIRS)
@settings(max_examples=15)
@given(weight=weights())
def test_value_is_the_formula(penalty: Penalty, spec: oracle.Spec, weight: torch.Tensor) -> None:
    value = penalty.value(weight)
    assert value.shape == ()
    torch.testing.assert_close(value, oracle.penalty_value(spec, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("penalty", "spec"), PAIRS)
@settings(max_examples=15)
@given(weight=weights())
def test_gradient_is_the_derivative_of_the_value(penalty: Penalty, spec: oracle.Spec, weight: torch.Tensor) -> None:
    gradient = penalty.gradient(weight)
    torch.testing.assert_close(gradient, oracle.penalty_gradient(spec, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_own_value_differentiates_to_own_gradient(penalty: Penalty) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(penalty.value(weight), weight)
    torch.testing.assert_close(penalty.gradient(weight.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("penalty", "spec"), PAIRS)
@settings(max_examples=15)
@given(weight=weights(), step=steps)
def test_prox_is_what_a_search_finds(penalty: Penalty, spec: oracle.Spec, weight: torch.Tensor, step: float) -> None:
    result = penalty.prox(weight, step)
    torch.testing.assert_close(result, oracle.numeric_prox(spec, weight, step), rtol=0, atol=1e-6)
    torch.testing.assert_close(result, oracle.prox(spec, weight, step), rtol=1e-12, atol=1e-12)


@given(weight=weights(), step=steps, ratio=st.floats(0.0, 1.0))
def test_prox_of_elastic_net_fulfils_the_optimality_condition(weight: torch.Tensor, step: float, ratio: float) -> None:
    """W − v ∈ s·∂Ω(v): equal where v ≠ 0, at most s·a where v = 0; ratio 0 and 1 are L2 and L1."""
    result = ElasticNet(ratio).prox(weight, step)
    pull = weight - result
    alive = result != 0
    expected = step * (ratio * result.sign() + (1 - ratio) * result)
    torch.testing.assert_close(pull[alive], expected[alive], rtol=1e-9, atol=1e-9)
    assert (pull[~alive].abs() <= step * ratio + 1e-12).all()


@given(weight=weights(), step=steps, dim=st.sampled_from([0, 1, -1]))
def test_prox_of_group_lasso_fulfils_the_optimality_condition(weight: torch.Tensor, step: float, dim: int) -> None:
    result = GroupLasso(dim).prox(weight, step)
    for before, after in zip(weight.unbind(dim), result.unbind(dim), strict=True):
        limit = step * math.sqrt(before.numel())
        if (after != 0).any():
            torch.testing.assert_close(before - after, limit * after / after.norm(), rtol=1e-8, atol=1e-8)
        else:
            assert before.norm() <= limit + 1e-12


@pytest.mark.parametrize("penalty", PENALTIES)
@settings(max_examples=15)
@given(weight=weights())
def test_prox_of_step_zero_changes_nothing(penalty: Penalty, weight: torch.Tensor) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        same = weight.to(dtype)
        assert torch.equal(penalty.prox(same, 0.0), same)


@pytest.mark.parametrize("penalty", [L1(), ElasticNet(0.5), GroupLasso()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_prox_zeros_are_positive_zeros(penalty: Penalty, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.1, -0.1], [-0.0, 0.0], [-0.2, 0.2]], dtype=dtype)
    result = penalty.prox(weight, 1.0)
    assert (result == 0).all()
    assert not result.signbit().any()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_results_have_the_dtype_of_the_weight_and_leave_it_alone(penalty: Penalty, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4).to(dtype)
    before = weight.clone()
    for result in (penalty.gradient(weight), penalty.prox(weight, 0.1), penalty.prox(weight, torch.tensor(0.1))):
        assert result.dtype == dtype
        assert result.shape == weight.shape
    penalty.prox(weight, 0.1).add_(1)  # a tensor of its own
    assert torch.equal(weight, before)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("step_dtype", "precision"), [(torch.float32, 1e-6), (torch.float64, 0.0)])
def test_a_tensor_step_is_as_good_as_a_number(penalty: Penalty, step_dtype: torch.dtype, precision: float) -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    result = penalty.prox(weight, torch.tensor(0.25, dtype=step_dtype))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, penalty.prox(weight, 0.25), rtol=precision, atol=0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_step_for_each_weight_is_as_good_as_one_for_all(penalty: Penalty) -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    steps = torch.rand(3, 4, dtype=torch.float64) * (torch.rand(3, 4) < 0.7)
    result = penalty.prox(weight, steps)
    for number, step in enumerate(steps.flatten().tolist()):
        torch.testing.assert_close(result.flatten()[number], penalty.prox(weight, step).flatten()[number])
    assert torch.equal(result[steps == 0], weight[steps == 0])


@pytest.mark.parametrize("penalty", [L1(), L2(), ElasticNet(), GroupLasso(0)])
@pytest.mark.parametrize("shape", [(1000, 1000), (100_000,)], ids=["matrix", "vector"])
def test_half_precision_value_does_not_overflow(penalty: Penalty, shape: tuple[int, ...]) -> None:
    weight = torch.full(shape, 2.0, dtype=torch.float16)
    value = penalty.value(weight)
    assert value.isfinite()
    torch.testing.assert_close(value.double(), penalty.value(weight.double()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("penalty", [L1(), L2(), ElasticNet(), GroupLasso(0)])
def test_large_half_precision_weights_keep_a_finite_gradient(penalty: Penalty) -> None:
    weight = torch.full((4, 4), 60000.0, dtype=torch.float16)
    weight[0] = 1e-4
    expected = penalty.gradient(weight.double())
    torch.testing.assert_close(penalty.gradient(weight).double(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=["vector", "column"])
def test_group_lasso_gradient_of_the_smallest_weights_is_finite(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tiny = 6e-8 if dtype == torch.float16 else 1e-40
    gradient = GroupLasso(0).gradient(torch.full(shape, tiny, dtype=dtype))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_zero_group_has_gradient_and_prox_zero(dim: int) -> None:
    weight = torch.zeros(3, 3)
    weight.select(dim, 1).fill_(2.0)
    for result in (GroupLasso(dim).gradient(weight), GroupLasso(dim).prox(weight, 0.1)):
        assert not result.isnan().any()
        assert (result.select(dim, 0) == 0).all()
        assert (result.select(dim, 2) == 0).all()
        assert (result.select(dim, 1) != 0).all()


@pytest.mark.parametrize("penalty", [L1(), L2(), ElasticNet(), GroupLasso()])
def test_empty_weights_have_value_zero(penalty: Penalty) -> None:
    weight = torch.empty(0, 3)
    assert penalty.value(weight) == 0
    assert penalty.gradient(weight).shape == penalty.prox(weight, 1.0).shape == (0, 3)


def test_negative_dim_counts_from_the_end() -> None:
    weight = torch.randn(2, 3, 4)
    for dim in (-1, -2, -3):
        assert torch.equal(GroupLasso(dim).gradient(weight), GroupLasso(dim + 3).gradient(weight))
        assert GroupLasso(dim).value(weight) == GroupLasso(dim + 3).value(weight)


def test_groups_are_the_slices_along_dim() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert GroupLasso(0).value(weight) == pytest.approx(math.sqrt(2) * 5)
    assert GroupLasso(1).value(weight) == pytest.approx(math.sqrt(2) * 7)


def test_group_lasso_on_a_vector_is_l1() -> None:
    weight = torch.tensor([1.5, -0.2, 0.0], dtype=torch.float64)
    assert GroupLasso().value(weight) == L1().value(weight)
    torch.testing.assert_close(GroupLasso().gradient(weight), L1().gradient(weight))
    torch.testing.assert_close(GroupLasso().prox(weight, 0.5), L1().prox(weight, 0.5))


@pytest.mark.parametrize(("dim", "shape"), [(2, (3, 4)), (-3, (3, 4)), (1, (3,)), (0, ())])
def test_dim_that_the_weight_lacks_is_an_error(dim: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"`dim` must name a dimension .* got dim={dim}\. Use dim=0"):
        GroupLasso(dim).value(torch.ones(shape))


def _complex_weight() -> torch.Tensor:
    return torch.tensor([[3 + 4j, 0j], [-1j, 0.3 - 0.4j]], dtype=torch.complex128)


def test_complex_l1_gradient_is_the_unit_number() -> None:
    weight = _complex_weight()
    expected = torch.tensor([[0.6 + 0.8j, 0j], [-1j, 0.6 - 0.8j]], dtype=torch.complex128)
    torch.testing.assert_close(L1().gradient(weight), expected)
    assert L1().value(weight) == pytest.approx(6.5)


def test_complex_l1_prox_shortens_the_magnitude() -> None:
    result = L1().prox(_complex_weight(), 1.0)
    expected = torch.tensor([[2.4 + 3.2j, 0j], [0j, 0j]], dtype=torch.complex128)
    torch.testing.assert_close(result, expected)
    assert (result[1] == 0).all()


@pytest.mark.parametrize(("penalty", "spec"), PAIRS)
def test_complex_gradient_is_the_derivative_of_the_value(penalty: Penalty, spec: oracle.Spec) -> None:
    weight = torch.randn(3, 2, dtype=torch.complex128)
    assert not penalty.value(weight).is_complex()
    torch.testing.assert_close(penalty.value(weight), oracle.penalty_value(spec, weight))
    torch.testing.assert_close(penalty.gradient(weight), oracle.penalty_gradient(spec, weight))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_complex_prox_of_step_zero_is_the_weight(penalty: Penalty) -> None:
    weight = torch.randn(3, 2, dtype=torch.complex128)
    torch.testing.assert_close(penalty.prox(weight, 0.0), weight)
    torch.testing.assert_close(penalty.prox(weight, torch.tensor(0.0)), weight)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_complex_prox_goes_down_the_penalty(penalty: Penalty) -> None:
    """V minimizes ½|v−w|² + s·Ω(v): no small change of v is better."""
    weight, step = torch.randn(3, 2, dtype=torch.complex128), 0.3
    best = penalty.prox(weight, step)

    def objective(v: torch.Tensor) -> torch.Tensor:
        return (v - weight).abs().square().sum() / 2 + step * penalty.value(v)

    for _ in range(50):
        assert objective(best) <= objective(best + 1e-3 * torch.randn_like(best)) + 1e-15


@pytest.mark.parametrize(
    ("name", "kind"), [("l1", L1), ("l2", L2), ("elastic_net", ElasticNet), ("group_lasso", GroupLasso)]
)
def test_names_resolve_to_penalties(name: str, kind: type[Penalty]) -> None:
    assert type(resolve_penalty(name)) is kind


def test_a_penalty_object_resolves_to_itself() -> None:
    penalty = ElasticNet(0.1)
    assert resolve_penalty(penalty) is penalty


def test_unknown_name_is_told_the_near_one() -> None:
    with pytest.raises(ValueError, match=r"`penalty` must be one of .*got penalty='grup_laso'\. Did you mean 'group_l"):
        resolve_penalty("grup_laso")


def test_far_name_is_told_all() -> None:
    with pytest.raises(
        ValueError, match=r"must be one of \['l1', 'l2', 'elastic_net', 'group_lasso'\], got .*'zzz'\.$"
    ):
        resolve_penalty("zzz")


@pytest.mark.parametrize(
    ("value", "advice"),
    [(L1, r"Write L1\(\) instead"), (GroupLasso, r"Write GroupLasso\(\) instead"), (3, "Subclass `Penalty`")],
)
def test_a_class_or_a_number_is_no_penalty(value: object, advice: str) -> None:
    with pytest.raises(TypeError, match=rf"`penalty` must be a name or a Penalty, got .*{advice}"):
        resolve_penalty(value)


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [(-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("half", TypeError), (True, TypeError)],
)
def test_bad_l1_ratio_is_an_error(ratio: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"`l1_ratio` must be a number in \[0, 1\], got l1_ratio="):
        ElasticNet(ratio)


@pytest.mark.parametrize("dim", [0.0, "0", None, True])
def test_dim_must_be_an_integer(dim: object) -> None:
    with pytest.raises(TypeError, match=r"`dim` must be an integer, got dim="):
        GroupLasso(dim)


def test_penalties_print_their_arguments() -> None:
    assert [repr(p) for p in (L1(), ElasticNet(0.25), GroupLasso(-1))] == [
        "L1()",
        "ElasticNet(l1_ratio=0.25)",
        "GroupLasso(dim=-1)",
    ]


def test_a_penalty_needs_all_three_maps() -> None:
    class Half(Penalty):
        def value(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.sum()

    with pytest.raises(TypeError, match="abstract"):
        Half()
