"""What the controller of the strength asks a regularizer: the way to zero, the steps so far, and how they are made."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import oracle
from reference.training import WEIGHTS, small_net
from torch import Tensor, nn
from typing_extensions import override

from lightning_gcsr import L1, CoherentRegularizer, ElasticNet, GroupLasso, Penalty
from lightning_gcsr.core.penalties import resolve_penalty

PENALTIES = {
    "l1": ("l1",),
    "l2": ("l2",),
    "elastic_net": ("elastic_net", 0.5),
    "group_lasso": ("group_lasso", 0),
}


def slow_span(spec: oracle.Spec, weight: Tensor, relative: float = 1.0) -> float:
    """⟨w,w⟩/⟨w,r⟩ in float64 with exact sums, where the gradient is that of autograd."""
    weight = weight.detach().double()
    pull = math.fsum((weight * oracle.penalty_gradient(spec, weight)).flatten().tolist())
    return math.fsum(weight.square().flatten().tolist()) / (relative * pull)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PENALTIES)
def test_spans_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    net = small_net(dtype)
    spans = CoherentRegularizer(net, name, strength=0.3).spans()
    precision = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert tuple(spans) == WEIGHTS
    for key, span in spans.items():
        assert type(span) is float
        assert span == pytest.approx(slow_span(PENALTIES[name], net.get_parameter(key)), rel=precision)


@pytest.mark.parametrize(
    ("penalty", "spec"),
    [(ElasticNet(0.1), ("elastic_net", 0.1)), (GroupLasso(1), ("group_lasso", 1)), (ElasticNet(1.0), ("l1",))],
    ids=repr,
)
def test_spans_know_the_arguments_of_the_penalty(penalty: Penalty, spec: oracle.Spec) -> None:
    net = small_net()
    for key, span in CoherentRegularizer(net, penalty, strength=0.3).spans().items():
        assert span == pytest.approx(slow_span(spec, net.get_parameter(key)), rel=1e-12)


@pytest.mark.parametrize("strength", [1e-6, 0.3, 1e6])
def test_spans_do_not_depend_on_the_strength(strength: float) -> None:
    """They are carried out by the strength, which a controller does not know yet."""
    assert CoherentRegularizer(small_net(), strength=strength).spans() == pytest.approx(
        CoherentRegularizer(small_net(), strength=1.0).spans()
    )


@pytest.mark.parametrize("name", PENALTIES)
def test_under_fan_in_a_tensor_that_gets_more_has_a_shorter_way(name: str) -> None:
    """The layers have 30, 20 and 8 weights, and 6, 5 and 4 of them feed an output."""
    net, mean = small_net(), (30 * 6 + 20 * 5 + 8 * 4) / 58
    spans = CoherentRegularizer(net, name, strength=0.3, strength_scale="fan_in").spans()
    for (key, span), fan_in in zip(spans.items(), (6, 5, 4), strict=True):
        assert span == pytest.approx(slow_span(PENALTIES[name], net.get_parameter(key), fan_in / mean), rel=1e-12)


def test_a_tensor_of_a_smaller_strength_of_its_own_has_a_longer_way() -> None:
    plain = CoherentRegularizer(small_net(), strength=0.3).spans()
    spans = CoherentRegularizer(small_net(), strength={r"^0": 0.1, r"^[24]": 0.4}).spans()
    assert spans == pytest.approx({"0.weight": 4 * plain["0.weight"]} | {key: plain[key] for key in WEIGHTS[1:]})


@given(size=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_where_all_magnitudes_are_alike_the_span_is_the_step_that_makes_the_zeros(size: float, seed: int) -> None:
    net = nn.Linear(7, 3, bias=False).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 7, generator=generator, dtype=torch.float64).sign() * size)
    for penalty in (L1(), GroupLasso(0), GroupLasso(1)):
        [span] = CoherentRegularizer(net, penalty, strength=1.0).spans().values()
        assert span == pytest.approx(size)
        assert not penalty.prox(net.weight.detach(), span * (1 + 1e-9)).any()
        assert penalty.prox(net.weight.detach(), span * (1 - 1e-6)).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_a_tensor_of_zeros_has_no_way_to_go_and_does_not_disturb_the_others(name: str) -> None:
    expected = CoherentRegularizer(small_net(), name, strength=0.3).spans()
    net = small_net()
    nn.init.zeros_(net[2].weight)
    assert CoherentRegularizer(net, name, strength=0.3).spans() == expected | {"2.weight": 0.0}


@pytest.mark.parametrize("name", ["l1", "group_lasso"])
def test_groups_and_weights_that_are_zero_already_do_not_count(name: str) -> None:
    net = small_net()
    with torch.no_grad():
        net[0].weight[1:3] = 0.0
    span = CoherentRegularizer(net, name, strength=0.3).spans()["0.weight"]
    assert span == pytest.approx(slow_span(PENALTIES[name], net[0].weight[[0, 3, 4]]))


class NoPull(L1):
    """A penalty that leaves all weights where they are."""

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


def test_where_the_penalty_does_not_pull_the_way_is_endless() -> None:
    net = small_net()
    nn.init.zeros_(net[4].weight)
    spans = CoherentRegularizer(net, NoPull(), strength=0.3).spans()
    assert spans == {"0.weight": math.inf, "2.weight": math.inf, "4.weight": 0.0}


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_spans_of_half_precision_neither_vanish_nor_overflow(size: float) -> None:
    """The square of these numbers is zero or infinite in float16, and so is the sum of many of them."""
    net = nn.Linear(300, 300, bias=False).half()
    nn.init.constant_(net.weight, size)
    [span] = CoherentRegularizer(net, strength=0.3).spans().values()
    assert span == pytest.approx(size, rel=1e-2)


def test_spans_of_complex_weights_are_of_their_magnitudes() -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.tensor([[3 + 4j, -6 - 8j]], dtype=torch.complex128))
    [span] = CoherentRegularizer(net, strength=0.3).spans().values()
    assert span == pytest.approx((25 + 100) / (5 + 10))


@pytest.mark.parametrize("name", PENALTIES)
def test_spans_are_those_of_now_and_change_nothing(name: str) -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, resolve_penalty(name), strength=0.3)
    with torch.no_grad():
        net[2].weight.mul_(0.25)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    spans = regularizer.spans()
    assert spans["2.weight"] == pytest.approx(slow_span(PENALTIES[name], net[2].weight), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert not any(parameter.grad is not None for parameter in net.parameters())


# -- steps and groups ----------------------------------------------------------------------------------------------


def step(regularizer: CoherentRegularizer, optimizer: torch.optim.Optimizer) -> None:
    regularizer.before_step(optimizer)
    optimizer.step()
    regularizer.after_step(optimizer)


def test_steps_of_an_optimizer_are_its_own() -> None:
    net = small_net()
    first, second = torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.SGD(net[4].parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.3)
    assert (regularizer.steps_of(first), regularizer.steps_of(second)) == (0, 0)
    for optimizer in (first, second, first, first):
        step(regularizer, optimizer)
    assert (regularizer.steps_of(first), regularizer.steps_of(second)) == (3, 1)


def test_steps_of_an_optimizer_survive_a_resume_and_another_object_of_it() -> None:
    net = small_net()
    regularizer, other = CoherentRegularizer(net, strength=0.3), CoherentRegularizer(net, strength=0.3)
    step(regularizer, torch.optim.SGD(net.parameters(), lr=0.1))
    other.load_state_dict(regularizer.state_dict())
    optimizer = torch.optim.Adam(net.parameters())
    assert regularizer.steps_of(optimizer) == other.steps_of(optimizer) == 1


def test_an_optimizer_without_regularized_parameters_makes_no_steps() -> None:
    net = small_net()
    biases = torch.optim.SGD([net[0].bias], lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.3)
    step(regularizer, biases)
    assert regularizer.steps_of(biases) == 0
    assert regularizer.groups_of(biases) == {}


def test_groups_of_an_optimizer_are_those_of_each_regularized_parameter_in_its_order() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(
        [
            {"params": [net[4].weight, net[4].bias], "lr": 0.5},
            {"params": [net[2].bias], "lr": 9.0},
            {"params": net[0].parameters(), "lr": 0.25, "momentum": 0.9},
        ],
        lr=0.1,
    )
    groups = CoherentRegularizer(net, strength=0.3).groups_of(optimizer)
    assert list(groups) == ["4.weight", "0.weight"]
    assert groups["4.weight"] is optimizer.param_groups[0]  # a schedule changes it in place
    assert groups["0.weight"] is optimizer.param_groups[2]
    assert [(group["lr"], group["momentum"]) for group in groups.values()] == [(0.5, 0), (0.25, 0.9)]


def test_groups_of_an_optimizer_leave_out_what_is_not_selected() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.3, exclude=["^2"])
    assert list(regularizer.groups_of(torch.optim.SGD(net.parameters(), lr=0.1))) == ["0.weight", "4.weight"]
