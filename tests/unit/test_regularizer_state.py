"""What a regularizer remembers, when it acts, and what it refuses."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from reference.training import batches, loss_of, small_net
from torch import Tensor, nn

from lightning_gcsr import L2, CoherentRegularizer, ElasticNet


def sgd(net: nn.Module, **more: object) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, **more)


def step(regularizer: CoherentRegularizer, optimizer: torch.optim.Optimizer, net: nn.Module, gradient: float) -> float:
    """One step with this number as every gradient; the strength at which it was regularized."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
    report = regularizer.before_step(optimizer)
    optimizer.step()
    regularizer.after_step(optimizer)
    return float(report.strength)


# --- schedule ------------------------------------------------------------------------------------------------------


def test_strength_follows_delay_warmup_and_stop() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4, delay_steps=2, warmup_steps=2, stop_steps=5)
    optimizer = sgd(net)
    assert [step(regularizer, optimizer, net, 0.01) for _ in range(7)] == [0, 0, 0.2, 0.4, 0.4, 0, 0]


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_nothing_happens_before_the_delay_and_after_the_stop(update: str) -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4, coherence=None, update=update, delay_steps=1, stop_steps=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    changed = []
    for _ in range(3):
        before = net[0].weight.detach().clone()
        step(regularizer, optimizer, net, 0.0)
        changed.append(not torch.equal(net[0].weight, before))
    assert changed == [False, True, False]


def test_steps_are_counted_for_each_optimizer() -> None:
    net = small_net()
    first, second = torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.SGD(net[4].parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.4, delay_steps=2)
    assert [step(regularizer, first, net, 0.01) for _ in range(3)] == [0, 0, 0.4]
    assert step(regularizer, second, net, 0.01) == 0
    assert step(regularizer, first, net, 0.01) == 0.4


def test_a_step_without_gradients_counts_too() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4, delay_steps=1)
    regularizer.before_step(sgd(net))
    assert step(regularizer, sgd(net), net, 0.01) == 0.4


def test_an_optimizer_without_regularized_parameters_reports_nothing() -> None:
    net = small_net()
    biases = torch.optim.SGD([net[0].bias], lr=0.1)
    net[0].bias.grad = torch.ones_like(net[0].bias)
    regularizer = CoherentRegularizer(net, strength=0.4, delay_steps=1)
    assert regularizer.before_step(biases).names == ()
    assert torch.equal(net[0].bias.grad, torch.ones_like(net[0].bias))
    assert step(regularizer, sgd(net), net, 0.01) == 0  # it was not this optimizer's step


# --- state ---------------------------------------------------------------------------------------------------------


def primitives_only(value: object) -> bool:
    if type(value) is dict:
        return all(type(key) is str and primitives_only(item) for key, item in value.items())
    return type(value) in (int, float, str, bool)


@pytest.mark.parametrize("measure", ["direction", "agreement", "temporal", None])
def test_state_is_primitive_and_loads_weights_only(measure: str | None) -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4, coherence=measure, delay_steps=2)
    for number in (0.01, math.nan):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, number)
        regularizer.before_step(sgd(net))
    state = regularizer.state_dict()
    assert primitives_only(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded == state
    other = CoherentRegularizer(small_net(), strength=0.4, coherence=measure, delay_steps=2)
    other.load_state_dict(loaded)
    assert other.state_dict() == state
    assert int(other.nonfinite_steps) == 1


def test_state_does_not_change_with_later_steps() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4)
    step(regularizer, sgd(net), net, 0.01)
    state = regularizer.state_dict()
    before = copy.deepcopy(state)
    other = CoherentRegularizer(net, strength=0.4)
    other.load_state_dict(state)
    for each in (regularizer, other):
        step(each, sgd(net), net, math.nan)
    assert state == before


@pytest.mark.parametrize("measure", ["direction", "agreement", None])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_resumed_run_makes_the_steps_of_the_one_that_was_not(update: str, measure: str | None) -> None:
    data = batches(8)
    arguments = {"strength": 0.2, "coherence": measure, "update": update, "delay_steps": 2, "warmup_steps": 4}

    def run(net: nn.Module, optimizer: torch.optim.Optimizer, regularizer: CoherentRegularizer, part: list) -> None:
        for batch in part:
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            regularizer.before_step(optimizer)
            optimizer.step()
            regularizer.after_step(optimizer)

    net = small_net()
    optimizer, regularizer = sgd(net, momentum=0.9), CoherentRegularizer(net, **arguments)
    run(net, optimizer, regularizer, data[:4])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), regularizer.state_dict()))
    resumed = small_net()
    resumed.load_state_dict(saved[0])
    resumed_optimizer, resumed_regularizer = sgd(resumed, momentum=0.9), CoherentRegularizer(resumed, **arguments)
    resumed_optimizer.load_state_dict(saved[1])
    resumed_regularizer.load_state_dict(saved[2])
    run(net, optimizer, regularizer, data[4:])
    run(resumed, resumed_optimizer, resumed_regularizer, data[4:])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))
    assert regularizer.state_dict() == resumed_regularizer.state_dict()


def test_a_changed_strength_takes_effect_after_loading() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4)
    step(regularizer, sgd(net), net, 0.01)
    changed = CoherentRegularizer(net, strength=0.7)
    changed.load_state_dict(regularizer.state_dict())
    assert step(changed, sgd(net), net, 0.01) == 0.7


# --- collapse ------------------------------------------------------------------------------------------------------


def test_weight_norms_are_those_of_now() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1)
    with torch.no_grad():
        net[2].weight.fill_(2.0)
    norms = regularizer.weight_norms()
    assert list(norms) == ["0.weight", "2.weight", "4.weight"]
    assert norms["2.weight"] == pytest.approx(math.sqrt(20 * 4))
    assert norms["0.weight"] == pytest.approx(net[0].weight.norm().item())


def test_a_layer_collapses_below_a_millionth_of_its_first_norm() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1)
    assert regularizer.collapsed() == {}
    first = net[2].weight.norm().item()
    with torch.no_grad():
        net[2].weight.mul_(2e-6)
    assert regularizer.collapsed() == {}
    assert list(regularizer.collapsed(1e-5)) == ["2.weight"]
    with torch.no_grad():
        net[2].weight.mul_(0.25)
    assert regularizer.collapsed() == {"2.weight": (pytest.approx(first * 5e-7), pytest.approx(first))}


def test_a_dead_layer_has_collapsed_but_one_born_dead_has_not() -> None:
    net = small_net()
    with torch.no_grad():
        net[0].weight.zero_()
    regularizer = CoherentRegularizer(net, strength=0.1)
    with torch.no_grad():
        net[2].weight.zero_()
    assert list(regularizer.collapsed()) == ["2.weight"]


def test_the_first_norm_survives_a_resume() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1)
    with torch.no_grad():
        net[2].weight.mul_(1e-7)
    resumed = CoherentRegularizer(net, strength=0.1)
    assert resumed.collapsed() == {}
    resumed.load_state_dict(regularizer.state_dict())
    assert list(resumed.collapsed()) == ["2.weight"]


# --- refusals and questions ----------------------------------------------------------------------------------------


def test_lbfgs_is_refused_before_anything_happens() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1)
    with pytest.raises(ValueError, match="LBFGS is not supported"):
        regularizer.before_step(torch.optim.LBFGS(net.parameters()))
    assert regularizer.state_dict()["steps"] == {}


def test_maximize_is_refused_before_anything_happens() -> None:
    net = small_net()
    loss_of(net, batches(1)[0]).backward()
    before = net[0].weight.grad.clone()
    with pytest.raises(ValueError, match="maximize=True is not supported"):
        CoherentRegularizer(net, strength=0.1, coherence=None, update="gradient").before_step(sgd(net, maximize=True))
    assert torch.equal(net[0].weight.grad, before)


def test_nothing_to_regularize_is_an_error() -> None:
    with pytest.raises(ValueError, match="There is nothing to regularize"):
        CoherentRegularizer(nn.LayerNorm(3), strength=0.1)


def test_selection_arguments_reach_the_selection() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1, include=[r"^0", r"^2"], exclude=["weight"])
    assert list(regularizer.parameters) == ["0.bias", "2.bias"]
    assert regularizer.parameters["0.bias"] is net[0].bias


def test_the_strength_is_the_largest_one_before_scaling() -> None:
    net = small_net()
    assert CoherentRegularizer(net, strength={r"^0": 0.2, ".": 0.5}).strength == 0.5
    assert CoherentRegularizer(net, strength=0.1, strength_scale="fan_in").strength == 0.1


def test_stepped_by_names_the_parameters_of_an_optimizer_in_its_order() -> None:
    net = small_net()
    optimizer = torch.optim.SGD([net[4].weight, net[4].bias, net[0].weight], lr=0.1)
    assert CoherentRegularizer(net, strength=0.1).stepped_by(optimizer) == ["4.weight", "0.weight"]


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ("l1", []),
        ("l2", ["0.weight"]),
        (L2(), ["0.weight"]),
        ("elastic_net", ["0.weight"]),
        (ElasticNet(1.0), []),
        ("group_lasso", []),
    ],
)
def test_decayed_by_names_what_decays_twice(penalty: object, expected: list[str]) -> None:
    net = small_net()
    groups = [{"params": net[0].parameters(), "weight_decay": 0.1}, {"params": net[2].parameters()}]
    regularizer = CoherentRegularizer(net, penalty, strength=0.1)
    assert regularizer.decayed_by(torch.optim.SGD(groups, lr=0.1)) == expected
    assert regularizer.decayed_by(sgd(net)) == []


def test_tied_weights_are_penalized_once() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    net["head"].weight = net["embedding"].weight
    regularizer = CoherentRegularizer(net, strength=0.25, coherence=None, update="gradient")
    weight: Tensor = net["head"].weight
    weight.grad = torch.zeros_like(weight)
    regularizer.before_step(sgd(net))
    assert torch.equal(weight.grad, 0.25 * weight.detach().sign())
