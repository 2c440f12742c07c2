"""What a regularizer remembers and measures: state dicts, copies, replaced parameters and groups, spans and norms."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import oracle
from reference.pairwise import pairwise_cases
from reference.training import WEIGHTS, batches, loss_of, small_net
from torch import Tensor, nn

from lightning_gcsr import L1, L2, Clock, CoherentRegularizer, ElasticNet, Gate, GroupLasso, Schedule
from lightning_gcsr.core import chunk_layout

NOW = Schedule(warmup=0)
UPDATES = ["gradient", "proximal", "dual_averaging"]
GATES: dict[str, Gate | None] = {
    "none": None,
    "eased_averaged": Gate(averaging=0.9, tolerance=0.5),
    "direction_model_averaged": Gate("direction", "model", averaging=0.9),
    "agreement_parameter": Gate("agreement", "parameter"),
}


def optimizer_of(net: nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return {"adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[kind](net.parameters(), lr=0.01)


def run(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: CoherentRegularizer,
    part: list[tuple[Tensor, Tensor]],
) -> None:
    for batch in part:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        regularizer.before_step(optimizer)
        optimizer.step()
        regularizer.after_step(optimizer)


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


# --- resuming ------------------------------------------------------------------------------------------------------

CASES = pairwise_cases(
    {
        "gate": list(GATES),
        "update": UPDATES,
        "optimizer": ["sgd", "adamw", "adagrad"],
        "penalty": ["l1", "group_lasso"],
        "chunk_sizes": [(1 << 18, 1 << 18), (8, 1 << 18), (1 << 18, 8)],
        "schedule": [NOW, Schedule(delay=2, warmup=4)],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_resumed_run_makes_the_steps_of_the_one_that_was_not(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it lays its weights out otherwise, as on another device; the file holds plain tensors and numbers."""
    data = batches(8)
    arguments = {"strength": 0.2, "gate": GATES[case["gate"]], "update": case["update"], "schedule": case["schedule"]}
    monkeypatch.setattr(chunk_layout, "CPU_SIZE", case["chunk_sizes"][0])
    net = small_net()
    optimizer, regularizer = (
        optimizer_of(net, case["optimizer"]),
        CoherentRegularizer(net, case["penalty"], **arguments),
    )
    run(net, optimizer, regularizer, data[:4])
    state = saved_and_loaded((net.state_dict(), optimizer.state_dict(), regularizer.state_dict()))
    run(net, optimizer, regularizer, data[4:])

    monkeypatch.setattr(chunk_layout, "CPU_SIZE", case["chunk_sizes"][1])
    other = small_net()
    other.load_state_dict(state[0])
    other_optimizer = optimizer_of(other, case["optimizer"])
    other_optimizer.load_state_dict(state[1])
    resumed = CoherentRegularizer(other, case["penalty"], **arguments)
    resumed.load_state_dict(state[2])
    again = CoherentRegularizer(other, case["penalty"], **arguments)
    again.load_state_dict(resumed.state_dict())  # saved before the first step
    run(other, other_optimizer, again, data[4:])
    for one, expected in zip(other.parameters(), net.parameters(), strict=True):
        if case["chunk_sizes"][0] == case["chunk_sizes"][1] or case["gate"] == "none":
            assert torch.equal(one, expected)
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    assert again.state_dict().keys() == regularizer.state_dict().keys()


def test_a_resumed_run_goes_on_where_a_parameter_joined_later() -> None:
    """Its average is younger than those of the others, and stays so."""
    ends = []
    for resumes in (False, True):
        net = small_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        arguments = {"strength": 0.02, "gate": GATES["eased_averaged"], "schedule": NOW}
        regularizer = CoherentRegularizer(net, **arguments)
        for number, batch in enumerate(batches(8)):
            net[2].weight.requires_grad_(number >= 3)
            if resumes and number == 4:
                state = saved_and_loaded(regularizer.state_dict())
                regularizer = CoherentRegularizer(net, **arguments)
                regularizer.load_state_dict(state)
            run(net, optimizer, regularizer, [batch])
        assert regularizer.state_dict()["counts"] == {"0.weight": 8, "2.weight": 5, "4.weight": 8}
        ends.append(net)
    assert_same_weights(*ends)


@pytest.mark.parametrize(
    ("what", "arguments", "optimizer"),
    [
        ("averages", {"gate": GATES["eased_averaged"]}, "sgd"),
        ("counts", {"gate": GATES["eased_averaged"]}, "sgd"),
        ("mean_squares", {"gate": None, "update": "proximal"}, "adamw"),
        ("latent_weights", {"gate": None, "update": "dual_averaging"}, "sgd"),
        ("began", {"gate": None, "schedule": Schedule(delay=0.25, warmup=8)}, "sgd"),
    ],
)
def test_every_part_of_the_state_is_needed(what: str, arguments: dict[str, Any], optimizer: str) -> None:
    """Else the comparison above would prove little."""
    data = batches(6)
    ends, strength = [], 0.02
    for forgets in (False, True):
        net = small_net()
        stepping = optimizer_of(net, optimizer)
        regularizer = CoherentRegularizer(net, strength=strength, **({"schedule": NOW} | arguments))
        for number, batch in enumerate(data):
            if number == 3:
                state = regularizer.state_dict()
                assert state[what]
                if forgets:
                    state[what] = None if what == "began" else {}
                    if what == "latent_weights":
                        del state["thresholds"]
                regularizer = CoherentRegularizer(net, strength=strength, **({"schedule": NOW} | arguments))
                regularizer.load_state_dict(state)
            stepping.zero_grad()
            loss_of(net, batch).backward()
            regularizer.before_step(stepping, clock=Clock(number, number / 6))
            stepping.step()
            regularizer.after_step(stepping)
        ends.append(net)
    assert not torch.equal(ends[0][0].weight, ends[1][0].weight)


def test_the_state_is_a_copy_on_both_ways() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.2, schedule=NOW, update="dual_averaging")
    optimizer = optimizer_of(net)
    run(net, optimizer, regularizer, batches(2))
    state = regularizer.state_dict()
    before = copy.deepcopy(state)
    other = CoherentRegularizer(net, strength=0.2, schedule=NOW, update="dual_averaging")
    other.load_state_dict(state)
    for each in (regularizer, other):
        run(net, optimizer, each, batches(2))
    for what in ("averages", "latent_weights", "thresholds"):
        assert all(torch.equal(state[what][name], before[what][name]) for name in WEIGHTS)
    assert state["steps"] == before["steps"]


def test_changed_settings_take_effect_after_loading() -> None:
    net = small_net()
    optimizer = optimizer_of(net)
    regularizer = CoherentRegularizer(net, strength=0.4, gate=GATES["eased_averaged"], schedule=NOW)
    run(net, optimizer, regularizer, batches(2))
    changed = CoherentRegularizer(net, strength=0.7, gate=None, exclude=["^0"])
    changed.load_state_dict(regularizer.state_dict())
    report = changed.before_step(optimizer)
    assert float(report.strength) == 0.7
    assert report.names == WEIGHTS[1:]
    assert changed.state_dict()["steps"] == {WEIGHTS[1]: 3}  # counted on, under the first weight that is left
    assert "averages" not in changed.state_dict()


def test_weights_that_are_left_out_after_loading_do_not_stand_for_a_second_optimizer() -> None:
    net = small_net()
    optimizer = optimizer_of(net)
    batch = next(iter(batches(1)))
    loss_of(net, batch).backward()
    regularizer = CoherentRegularizer(net, target_sparsity=0.5)
    regularizer.before_step(optimizer, clock=Clock(0, 0.0))
    regularizer.after_step(optimizer)
    changed = CoherentRegularizer(net, target_sparsity=0.5, exclude=["^0"])
    changed.load_state_dict(regularizer.state_dict())
    changed.before_step(optimizer, clock=Clock(1, 0.5))


@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
def test_temporal_forgets_its_predecessor_on_load_and_remembers_it_during_a_delay(scope: Any) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    regularizer = CoherentRegularizer(
        net, strength=10.0, gate=Gate("temporal", scope), schedule=Schedule(delay=1, warmup=0), update="gradient"
    )
    injected = []
    for number in (1.0, 2.0, -1.0, -3.0, math.nan, -1.0, "load", -1.0, -1.0):
        if isinstance(number, str):
            regularizer.load_state_dict(regularizer.state_dict())
            continue
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, number)
        injected.append(float(regularizer.before_step(optimizer).injected))
    assert injected == [0, 1, 0, 1, 0, 1, 0, 1]


# --- copies and replaced objects -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("update", UPDATES)
def test_a_copy_regularizes_the_copied_module_and_goes_on_by_itself(update: Any, copied: Any) -> None:
    net = small_net()
    optimizer = optimizer_of(net, "adamw")
    regularizer = CoherentRegularizer(net, strength=0.2, gate=GATES["eased_averaged"], schedule=NOW, update=update)
    run(net, optimizer, regularizer, batches(3))
    other, other_optimizer, other_regularizer = copied((net, optimizer, regularizer))
    kept = [parameter.detach().clone() for parameter in net.parameters()]
    run(other, other_optimizer, other_regularizer, batches(5)[3:])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), kept, strict=True))
    run(net, optimizer, regularizer, batches(5)[3:])
    assert_same_weights(net, other)


@pytest.mark.parametrize("update", UPDATES)
def test_refresh_finds_parameters_that_were_replaced(update: Any) -> None:
    """A parameter of the same shape goes on with what is known of it; one of another shape begins anew."""
    net, plain = small_net(), small_net()
    optimizer, plain_optimizer = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    arguments = {"strength": 0.2, "gate": GATES["eased_averaged"], "schedule": NOW, "update": update}
    regularizer, plain_regularizer = CoherentRegularizer(net, **arguments), CoherentRegularizer(plain, **arguments)
    run(net, optimizer, regularizer, batches(2))
    run(plain, plain_optimizer, plain_regularizer, batches(2))
    assert regularizer.refresh() == []
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())
    assert regularizer.refresh() == ["2.weight"]
    run(net, torch.optim.SGD(net.parameters(), lr=0.1), regularizer, batches(4)[2:])
    run(plain, plain_optimizer, plain_regularizer, batches(4)[2:])
    assert_same_weights(net, plain)
    net[0], net[2] = nn.Linear(6, 7).double(), nn.Linear(7, 4).double()
    assert regularizer.refresh() == ["0.weight", "2.weight"]
    run(net, torch.optim.SGD(net.parameters(), lr=0.1), regularizer, batches(1))
    assert regularizer.state_dict()["counts"] == {"0.weight": 1, "2.weight": 1, "4.weight": 5}


@pytest.mark.parametrize("update", ["proximal", "dual_averaging"])
def test_a_loaded_optimizer_state_replaces_lr_and_is_followed(update: Any) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=None, update=update)
    run(net, optimizer, regularizer, batches(1))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(state)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = net[0].weight.detach().clone()
    regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    torch.testing.assert_close(net[0].weight.detach(), oracle.prox(("l1",), before, 0.05))
    assert regularizer.step_sizes(optimizer) == pytest.approx(dict.fromkeys(WEIGHTS, 0.5))


# --- schedule and clock --------------------------------------------------------------------------------------------


def strengths_of(schedule: Schedule, clocks: list[Clock | None], gate: Gate | None = None) -> list[float]:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4, gate=gate, schedule=schedule)
    return [float(regularizer.before_step(optimizer_of(net), clock=clock).strength) for clock in clocks]


def test_without_a_clock_the_steps_of_each_optimizer_are_counted() -> None:
    schedule = Schedule(delay=2, warmup=2, stop=5)
    assert strengths_of(schedule, [None] * 7) == [0, 0, 0.2, 0.4, 0.4, 0, 0]
    net = small_net()
    first, second = torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.SGD(net[4].parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.4, schedule=schedule)
    seen = [float(regularizer.before_step(o).strength) for o in (first, first, first, second, first)]
    assert seen == [0, 0, 0.2, 0, 0.4]


def test_a_clock_gives_the_progress_that_fractions_need() -> None:
    clocks = [Clock(step, step / 8) for step in range(8)]
    assert strengths_of(Schedule(delay=0.25, warmup=0.25, stop=0.75), clocks) == pytest.approx(
        [0, 0, 0, 0.2, 0.4, 0.4, 0, 0]
    )
    assert strengths_of(Schedule(delay=0.25, warmup=4), clocks) == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert strengths_of(Schedule(), clocks, Gate()) == pytest.approx([0.4 * min(1, s / 8 / 0.3) for s in range(8)])
    with pytest.raises(ValueError, match=r"The schedule has a fraction of the training's progress \(0\.3"):
        strengths_of(Schedule(), [None], Gate())


# --- what is measured of the weights -------------------------------------------------------------------------------


def slow_span(spec: oracle.Spec, weight: Tensor, relative: float = 1.0) -> float:
    """⟨w,w⟩/⟨w,r⟩ in float64 with exact sums, where the gradient is that of autograd."""
    weight = weight.detach().double()
    pull = math.fsum((weight * oracle.penalty_gradient(spec, weight)).flatten().tolist())
    return math.fsum(weight.square().flatten().tolist()) / (relative * pull)


@pytest.mark.parametrize(
    ("penalty", "spec"),
    [(L1(), ("l1",)), (L2(), ("l2",)), (ElasticNet(0.1), ("elastic_net", 0.1)), (GroupLasso(1), ("group_lasso", 1))],
    ids=repr,
)
def test_spans_are_those_of_the_formula_with_relative_strengths(penalty: Any, spec: oracle.Spec) -> None:
    for dtype, precision in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        net = small_net(dtype)
        spans = CoherentRegularizer(net, penalty, strength={"^0": 0.1, "^[24]": 0.4}).spans()
        for name, relative in zip(WEIGHTS, (0.25, 1.0, 1.0), strict=True):
            assert spans[name] == pytest.approx(slow_span(spec, net.get_parameter(name), relative), rel=precision)


@given(size=st.floats(1e-3, 1e3))
def test_where_all_magnitudes_are_alike_the_span_is_the_step_that_makes_the_zeros(size: float) -> None:
    net = nn.Linear(7, 3, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 7, dtype=torch.float64).sign() * size)
    for penalty in (L1(), GroupLasso(0), GroupLasso(1)):
        [span] = CoherentRegularizer(net, penalty, strength=1.0).spans().values()
        assert span == pytest.approx(size)
        assert not penalty.prox(net.weight.detach(), span * (1 + 1e-9)).any()
        assert penalty.prox(net.weight.detach(), span * (1 - 1e-6)).all()


class NoPull(L1):
    """A penalty that leaves all weights where they are."""

    def gradient(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


def test_spans_of_weights_without_pull_are_infinite_and_of_zeros_zero() -> None:
    net = small_net()
    nn.init.zeros_(net[4].weight)
    assert CoherentRegularizer(net, NoPull(), strength=0.3).spans() == {
        "0.weight": math.inf,
        "2.weight": math.inf,
        "4.weight": 0.0,
    }


def test_norms_and_collapse_are_told_from_the_first_norm_even_after_a_resume() -> None:
    net = small_net()
    with torch.no_grad():
        net[0].weight.zero_()  # one born dead has not collapsed
    regularizer = CoherentRegularizer(net, strength=0.1)
    first = net[2].weight.norm().item()
    assert regularizer.weight_norms()["2.weight"] == pytest.approx(first)
    with torch.no_grad():
        net[2].weight.mul_(2e-6)
    assert regularizer.collapsed() == {}
    assert list(regularizer.collapsed(1e-5)) == ["2.weight"]
    with torch.no_grad():
        net[2].weight.mul_(0.25)
    expected = {"2.weight": (pytest.approx(first * 5e-7), pytest.approx(first))}
    assert regularizer.collapsed() == expected
    resumed = CoherentRegularizer(net, strength=0.1)
    assert resumed.collapsed() == {}
    resumed.load_state_dict(regularizer.state_dict())
    assert resumed.collapsed() == expected


def test_sparsity_and_penalty_count_trained_weights_only() -> None:
    net = small_net()
    with torch.no_grad():
        net[0].weight[:2] = 0.0
        net[2].weight.zero_()
    regularizer = CoherentRegularizer(net, strength=0.1)
    assert regularizer.sparsity() == (12 + 20) / 58
    net[2].weight.requires_grad_(False)
    assert regularizer.sparsity() == 12 / 38
    expected = sum(float(net[i].weight.detach().abs().sum()) for i in (0, 4))
    assert float(regularizer.penalty_value()) == pytest.approx(expected)
    net.requires_grad_(False)
    assert regularizer.sparsity() == 0.0


def test_an_optimizers_parameters_are_named_in_its_order() -> None:
    net = small_net()
    optimizer = torch.optim.SGD([net[4].weight, net[4].bias, net[0].weight], lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1)
    assert regularizer.stepped_by(optimizer) == ["4.weight", "0.weight"]
    assert regularizer.step_sizes(torch.optim.AdamW(net.parameters())) == dict.fromkeys(WEIGHTS, 0.0)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [("l1", []), ("l2", ["0.weight"]), ("elastic_net", ["0.weight"]), (ElasticNet(1.0), []), ("group_lasso", [])],
)
def test_decayed_by_names_what_decays_twice(penalty: Any, expected: list[str]) -> None:
    net = small_net()
    groups = [{"params": net[0].parameters(), "weight_decay": 0.1}, {"params": net[2].parameters()}]
    assert CoherentRegularizer(net, penalty, strength=0.1).decayed_by(torch.optim.SGD(groups, lr=0.1)) == expected


def test_the_strength_is_the_largest_one_before_scaling() -> None:
    net = small_net()
    assert CoherentRegularizer(net, strength={r"^0": 0.2, ".": 0.5}).strength == 0.5
    assert CoherentRegularizer(net, strength=0.1, strength_scale="fan_in").strength == 0.1
