"""The promises of the regularizer: bit-identity, equality with a loss term, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import oracle
from reference.pairwise import pairwise_cases
from reference.training import WEIGHTS, batches, loss_of, small_net
from torch import Tensor, nn
from typing_extensions import override

from lightning_gcsr import (
    L2,
    CoherenceMeasure,
    CoherentRegularizer,
    ElasticNet,
    Gate,
    GateReport,
    GroupLasso,
    Penalty,
    Schedule,
)

UPDATES = ["gradient", "proximal", "dual_averaging"]
NOW = Schedule(warmup=0)
GATES: dict[str, Gate | None] = {
    "default": Gate(),
    "none": None,
    "direction_model": Gate("direction", "model"),
    "agreement_parameter_averaged": Gate("agreement", "parameter", averaging=0.5),
    "temporal_model": Gate("temporal", "model"),
    "temporal_element": Gate("temporal"),
    "direction_element": Gate("direction"),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01),
}


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: CoherentRegularizer | None,
    steps: int = 4,
    loss_scale: float | Tensor = 1.0,
    report: Callable[[int], bool] = lambda step: True,
) -> list[GateReport | None]:
    """A plain loop; the loss scale is divided out again before the step, as a ``GradScaler`` does."""
    reports = []
    for step, batch in enumerate(batches(steps, dtype=next(net.parameters()).dtype)):
        optimizer.zero_grad()
        (loss_of(net, batch) * loss_scale).backward()
        if regularizer is not None:
            reports.append(regularizer.before_step(optimizer, loss_scale, report=report(step)))
        for parameter in net.parameters():
            parameter.grad.div_(loss_scale)
        optimizer.step()
        if regularizer is not None:
            regularizer.after_step(optimizer)
    return reports


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that training changes: parameters, and the tensors of the optimizer."""
    tensors = [parameter.detach().clone() for parameter in net.parameters()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value.clone() for value in state.values() if isinstance(value, Tensor)]
    return tensors


def assert_identical(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def trained(optimizer: str = "sgd", dtype: torch.dtype = torch.float32, **arguments: Any) -> list[Tensor]:
    """What training leaves behind; without arguments, plain training."""
    steps, scale = arguments.pop("steps", 4), arguments.pop("loss_scale", 1.0)
    report = arguments.pop("report", lambda step: True)
    net = small_net(dtype)
    stepping = OPTIMIZERS[optimizer](net)
    regularizer = CoherentRegularizer(net, **({"schedule": NOW} | arguments)) if arguments else None
    train(net, stepping, regularizer, steps, scale, report)
    return state_of(net, stepping)


# --- nothing where nothing is due ----------------------------------------------------------------------------------

IDLE: dict[str, tuple[dict[str, Any], int]] = {
    "zero strength": ({"strength": 0}, 4),
    "zero strengths by name": ({"strength": {"0": 0.0, "2": 0.0}, "gate": None}, 4),
    "zero strength, averaged": ({"strength": 0.0, "gate": Gate("direction", "model", averaging=0.9)}, 4),
    "delay": ({"strength": 0.5, "gate": None, "schedule": Schedule(delay=4, warmup=0)}, 4),
    "shut, model": ({"strength": 0.5, "gate": Gate("agreement", "model", threshold=1.0)}, 4),
    "shut, parameter": ({"strength": 0.5, "gate": Gate("direction", "parameter", threshold=1.0)}, 4),
    "first temporal step, model": ({"strength": 0.5, "gate": Gate("temporal", "model")}, 1),
    "first temporal step, element": ({"strength": 0.5, "gate": Gate("temporal")}, 1),
}


@pytest.mark.parametrize(
    "case",
    pairwise_cases(
        {
            "idle": list(IDLE),
            "update": UPDATES,
            "optimizer": list(OPTIMIZERS),
            "penalty": ["l1", "l2", "elastic_net", "group_lasso"],
            "report": [True, False],
        }
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_zero_strength_and_a_shut_gate_leave_training_bit_identical(case: dict[str, Any]) -> None:
    arguments, steps = IDLE[case["idle"]]
    found = trained(
        case["optimizer"],
        penalty=case["penalty"],
        update=case["update"],
        steps=steps,
        report=lambda step: case["report"],
        **arguments,
    )
    assert_identical(found, trained(case["optimizer"], steps=steps))


def test_an_opposed_gradient_at_element_scope_is_left_bit_identical() -> None:
    net = small_net(torch.float32)
    for parameter in net.parameters():
        parameter.grad = -parameter.detach().clone()
    regularizer = CoherentRegularizer(net, strength=1e-3, gate=Gate(averaging=0), schedule=NOW, update="gradient")
    regularizer.before_step(OPTIMIZERS["sgd"](net))
    assert all(torch.equal(parameter.grad, -parameter.detach()) for parameter in net.parameters())


@pytest.mark.parametrize("update", UPDATES)
def test_no_gradient_is_ever_created(update: Any) -> None:
    net = small_net()
    optimizer = OPTIMIZERS["sgd"](net)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=None, update=update)
    report = regularizer.before_step(optimizer)
    optimizer.step()
    regularizer.after_step(optimizer)
    assert report.names == ()
    assert float(report.injected) == 0
    assert regularizer.before_step(optimizer, report=False) is None
    assert all(parameter.grad is None for parameter in net.parameters())
    assert_identical(list(net.parameters()), list(small_net().parameters()))


@pytest.mark.parametrize("update", UPDATES)
def test_parameters_outside_the_optimizer_and_without_a_strength_never_change(update: Any) -> None:
    net = small_net()
    optimizer = torch.optim.SGD([*net[0].parameters(), *net[4].parameters()], lr=0.1)
    regularizer = CoherentRegularizer(net, strength={r"^[02]\.": 0.1}, gate=None, update=update)
    plain = small_net()
    plain_optimizer = torch.optim.SGD([*plain[0].parameters(), *plain[4].parameters()], lr=0.1)
    for module in (net, plain):
        loss_of(module, batches(1)[0]).backward()
    report = regularizer.before_step(optimizer)
    optimizer.step()
    plain_optimizer.step()
    regularizer.after_step(optimizer)
    assert report.names == ("0.weight",)
    changed = [n for n, p in net.named_parameters() if not torch.equal(p, plain.get_parameter(n))]
    assert changed == ["0.weight"]
    assert torch.equal(net[2].weight.grad, plain[2].weight.grad)


@pytest.mark.parametrize("update", UPDATES)
def test_of_two_optimizers_each_decision_sees_its_own_parameters(update: Any) -> None:
    net = small_net()
    first, second = torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.SGD(net[4].parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=Gate("agreement", "model"), schedule=NOW, update=update)
    net[0].weight.grad = net[0].weight.detach().clone()  # fully agrees
    net[4].weight.grad = -net[4].weight.detach().clone()  # fully opposes
    before = [layer.weight.detach().clone() for layer in (net[0], net[4])]
    gradients = [layer.weight.grad.clone() for layer in (net[0], net[4])]
    reports = [regularizer.before_step(first), regularizer.before_step(second)]
    assert [report.names for report in reports] == [("0.weight",), ("4.weight",)]
    assert [float(report.injected) for report in reports] == [1.0, 0.0]
    if update == "gradient":
        assert not torch.equal(net[0].weight.grad, gradients[0])
        assert torch.equal(net[4].weight.grad, gradients[1])
        return
    regularizer.after_step(second)
    assert torch.equal(net[0].weight, before[0])
    assert torch.equal(net[4].weight, before[1])
    regularizer.after_step(first)
    torch.testing.assert_close(net[0].weight.detach(), oracle.prox(("l1",), before[0], 0.01))


def test_tied_weights_are_penalized_once() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    net["head"].weight = net["embedding"].weight
    weight: Tensor = net["head"].weight
    weight.grad = torch.zeros_like(weight)
    regularizer = CoherentRegularizer(net, strength=0.25, gate=None, update="gradient")
    regularizer.before_step(OPTIMIZERS["sgd"](net))
    assert torch.equal(weight.grad, 0.25 * weight.detach().sign())


# --- the same as a term of the loss --------------------------------------------------------------------------------


def trained_with_a_loss_term(spec: oracle.Spec, strength: float, dtype: torch.dtype) -> list[Tensor]:
    net = small_net(dtype)
    optimizer = OPTIMIZERS["sgd"](net)
    for batch in batches(4, dtype=dtype):
        optimizer.zero_grad()
        weights = [net.get_parameter(name) for name in WEIGHTS]
        if spec == ("l1",):
            penalty = sum(weight.abs().sum() for weight in weights)
        else:
            penalty = sum(oracle.penalty_value(spec, weight) for weight in weights).to(dtype)
        (loss_of(net, batch) + strength * penalty).backward()
        optimizer.step()
    return state_of(net, optimizer)


@pytest.mark.parametrize(("strength", "dtype"), [(0.037, torch.float32), (2.0, torch.float64)])
def test_ungated_l1_is_the_loss_term_exactly(strength: float, dtype: torch.dtype) -> None:
    expected = trained_with_a_loss_term(("l1",), strength, dtype)
    found = trained(dtype=dtype, strength=strength, gate=None, update="gradient")
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) == 0.0


@pytest.mark.parametrize("spec", [("l2",), ("elastic_net", 0.5), ("group_lasso", 0)], ids=str)
def test_an_ungated_penalty_is_the_loss_term(spec: oracle.Spec) -> None:
    expected = trained_with_a_loss_term(spec, 0.037, torch.float64)
    found = trained(dtype=torch.float64, penalty=spec[0], strength=0.037, gate=None, update="gradient")
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12)


# --- loss scale, reports, accumulation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    pairwise_cases(
        {
            "gate": list(GATES),
            "update": UPDATES,
            "optimizer": list(OPTIMIZERS),
            "penalty": ["l1", "group_lasso"],
            "loss_scale": [1024.0, 1024, torch.tensor(1024.0)],
        }
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_neither_loss_scale_nor_report_changes_a_bit(case: dict[str, Any]) -> None:
    case = {**case, "gate": GATES[case["gate"]], "strength": 0.1}
    scale = case.pop("loss_scale")
    plain = trained(**case)
    assert_identical(trained(**case, loss_scale=scale), plain)
    assert_identical(trained(**case, report=lambda step: step == 2), plain)


@pytest.mark.parametrize("gate", list(GATES))
def test_four_small_batches_give_the_step_of_a_large_one(gate: str) -> None:
    results = []
    for parts in (1, 4):
        net = small_net()
        optimizer = OPTIMIZERS["sgd"](net)
        regularizer = CoherentRegularizer(net, strength=0.05, gate=GATES[gate], schedule=NOW)
        coherences = []
        for inputs, targets in batches(3):
            optimizer.zero_grad()
            for micro in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                (loss_of(net, micro) / parts).backward()
            coherences.append(regularizer.before_step(optimizer).coherence)
            optimizer.step()
            regularizer.after_step(optimizer)
        results.append([torch.stack(coherences), *state_of(net, optimizer)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8, equal_nan=True)


# --- gradients that are not finite ---------------------------------------------------------------------------------


def state_equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(state_equal(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


@pytest.mark.parametrize(
    "case",
    pairwise_cases(
        {
            "gate": list(GATES),
            "update": UPDATES,
            "optimizer": list(OPTIMIZERS),
            "bad": [math.nan, math.inf, -math.inf],
            "report": [True, False],
        }
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_a_gradient_that_is_not_finite_changes_nothing_that_is_kept(case: dict[str, Any]) -> None:
    """Neither gradients nor weights, averages, counts, mean squares, latent weights or thresholds."""
    net = small_net(torch.float32)
    optimizer = OPTIMIZERS[case["optimizer"]](net)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=GATES[case["gate"]], schedule=NOW, update=case["update"])
    train(net, optimizer, regularizer, 3)
    before = regularizer.state_dict()
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    net[2].weight.grad[1, 2] = case["bad"]
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    report = regularizer.before_step(optimizer, report=case["report"])
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)
    regularizer.after_step(optimizer, skipped=True)
    assert_identical([parameter.detach() for parameter in net.parameters()], weights)
    after = regularizer.state_dict()
    for what in ("steps", "nonfinite_steps"):
        before.pop(what)
    assert after.pop("nonfinite_steps") == 1
    after.pop("steps")
    assert state_equal(before, after)
    if report is not None:
        assert float(report.injected) == 0
        assert not report.finite


@pytest.mark.parametrize("gate", list(GATES))
def test_without_a_skip_a_gradient_that_is_not_finite_shrinks_nothing(gate: str) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=GATES[gate], schedule=NOW, update="proximal")
    train(net, optimizer, regularizer, 2)
    regularizer.before_step(optimizer, report=False)  # the gradients that it looked at are not those of the next step
    net[2].weight.grad[1, 2] = math.nan
    regularizer.before_step(optimizer, report=False)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    regularizer.after_step(optimizer)
    assert_identical([parameter.detach() for parameter in net.parameters()], before)


def test_steps_that_are_not_finite_are_counted_at_strength_zero_too() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.0, schedule=NOW)
    for number in (0.0, math.nan, 1.0, math.inf, 2.0):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, number)
        report = regularizer.before_step(OPTIMIZERS["sgd"](net))
        assert bool(report.finite) == math.isfinite(number)
    assert int(regularizer.nonfinite_steps) == 2


@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic_net", "group_lasso"])
def test_tiny_weights_never_bring_a_gradient_that_is_not_finite(penalty: Any) -> None:
    net = nn.Linear(1, 4)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1e-40], [1e-30], [-1e-20], [0.0]]))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    regularizer = CoherentRegularizer(net, penalty, strength=0.1, gate=None, include=["."], update="gradient")
    regularizer.before_step(OPTIMIZERS["sgd"](net))
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


# --- after the optimizer's step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["skipped", "found_inf"])
@pytest.mark.parametrize("update", ["proximal", "dual_averaging"])
@pytest.mark.parametrize("gate", ["default", "agreement_parameter_averaged", "none"])
def test_a_step_that_was_skipped_changes_neither_weights_nor_latent_weights_nor_thresholds(
    gate: str, update: Any, how: str
) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=GATES[gate], schedule=NOW, update=update)
    train(net, optimizer, regularizer, 2)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    kept = [regularizer.state_dict().get(what, {}) for what in ("latent_weights", "thresholds")]
    assert bool(kept[1]) is (update == "dual_averaging")
    loss_of(net, batches(1)[0]).backward()
    assert float(regularizer.before_step(optimizer).injected) > 0
    if how == "found_inf":  # a fused optimizer, which a GradScaler tells to leave everything as it is
        optimizer.found_inf = torch.tensor(1.0)
    regularizer.after_step(optimizer, skipped=how == "skipped")
    assert_identical([parameter.detach() for parameter in net.parameters()], before)
    after = [regularizer.state_dict().get(what, {}) for what in ("latent_weights", "thresholds")]
    assert state_equal(dict(enumerate(kept)), dict(enumerate(after)))
    optimizer.found_inf = torch.tensor(0.0)
    regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    assert not torch.equal(net[0].weight, before[0])


def test_after_step_shrinks_once_and_only_after_before_step() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=None, update="proximal")
    regularizer.after_step(optimizer)
    assert_identical(list(net.parameters()), list(small_net().parameters()))
    train(net, optimizer, regularizer, 1)
    once = net[0].weight.detach().clone()
    regularizer.after_step(optimizer)
    assert torch.equal(net[0].weight, once)


@pytest.mark.parametrize("gate", [None, Gate(averaging=0)])
def test_the_shrinkage_of_a_step_that_never_came_is_dropped(gate: Gate | None) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=gate, schedule=NOW, update="proximal")
    for gradient in (net[0].weight, net[2].weight):
        gradient.grad = gradient.detach().sign()
    regularizer.before_step(optimizer)
    net[2].weight.grad = None
    regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    assert not torch.equal(net[0].weight, small_net()[0].weight)
    assert torch.equal(net[2].weight, small_net()[2].weight)
    regularizer.before_step(optimizer)
    regularizer.load_state_dict(regularizer.state_dict())
    before = net[0].weight.detach().clone()
    regularizer.after_step(optimizer)
    assert torch.equal(net[0].weight, before)


# --- penalties and measures of one's own ---------------------------------------------------------------------------


class Careless(Penalty):
    """Half the square, with maps that return the very tensor they were given."""

    @override
    def value(self, weight: Tensor) -> Tensor:
        return weight.square().sum() / 2

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return weight

    @override
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return weight if not isinstance(step, Tensor) and step == 0 else weight / (1 + step)


class Direction(CoherenceMeasure):
    """What ``"direction"`` is."""

    threshold = 0.1

    @override
    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        return torch.add(gradient, penalty_gradient, alpha=strength)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("gate", list(GATES))
def test_a_penalty_of_ones_own_trains_as_the_built_in_one_that_it_imitates(gate: str, update: Any) -> None:
    arguments = {"strength": {"^0": 0.2, ".": 0.1}, "gate": GATES[gate], "update": update, "dtype": torch.float64}
    found = trained(penalty=Careless(), **arguments)
    for one, other in zip(found, trained(penalty="l2", **arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("scope", "averaging", "update"),
    [
        ("model", 0.0, "gradient"),
        ("parameter", 0.9, "proximal"),
        ("element", 0.0, "dual_averaging"),
        ("element", 0.9, "gradient"),
    ],
)
def test_a_measure_of_ones_own_trains_as_the_built_in_one_that_it_imitates(
    scope: Any, averaging: float, update: Any
) -> None:
    results = []
    for measure in (Direction(), "direction"):
        gate = Gate(measure, scope, averaging=averaging)
        assert gate.threshold == (None if scope == "element" else 0.1)
        results.append(trained(strength={"^0": 2.0, ".": 0.5}, gate=gate, update=update))
    assert_identical(*results)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # that there is a newer one
def test_the_directions_of_the_older_weight_norm_are_refused_unless_no_zeros_are_made() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.utils.weight_norm(nn.Linear(8, 2)))
    with pytest.raises(ValueError, match=r"'1.weight_v' holds the directions .* exclude=\['weight_v'\]"):
        CoherentRegularizer(net, strength=0.1)
    assert list(CoherentRegularizer(net, strength=0.1, exclude=["weight_v"]).parameters) == ["0.weight", "1.weight_g"]
    for penalty in (L2(), ElasticNet(0.0)):
        assert "1.weight_v" in CoherentRegularizer(net, penalty, strength=0.1).parameters


def test_a_penalty_that_does_not_fit_a_weight_says_so_at_once() -> None:
    with pytest.raises(ValueError, match=r"`dim` must name a dimension .* has the shape \(5, 6\), got dim=2"):
        CoherentRegularizer(small_net(), GroupLasso(2), strength=0.1)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate": "agreement"}, TypeError, r"`gate` must be a Gate or None, got gate='agreement'\. Write gate=Gate"),
        ({"schedule": 3}, TypeError, r"`schedule` must be a Schedule, got schedule=3\. Write schedule=Schedule"),
        (
            {"update": "proximl"},
            ValueError,
            r"`update` must be one of .*got update='proximl'\. Did you mean 'proximal'",
        ),
        ({"penalty": "l3"}, ValueError, r"`penalty` must be one of .*got penalty='l3'"),
        ({"strength": -1.0}, ValueError, r"`strength` must be a finite number of at least 0, got strength=-1\.0"),
        ({"strength_scale": "fanin"}, ValueError, r"`strength_scale` must be one of 'uniform', 'fan_in'"),
        ({"include": "weight"}, TypeError, r"`include` must be a list of regular expressions"),
        ({"exclude": ["."]}, ValueError, "There is nothing to regularize"),
    ],
    ids=str,
)
def test_a_bad_argument_is_an_error_at_construction(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CoherentRegularizer(small_net(), **({"strength": 0.1} | arguments))


def test_an_optimizer_that_is_not_supported_is_refused_before_anything_happens() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1, gate=None, update="gradient")
    loss_of(net, batches(1)[0]).backward()
    before = net[0].weight.grad.clone()
    with pytest.raises(ValueError, match="maximize=True is not supported"):
        regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1, maximize=True))
    assert torch.equal(net[0].weight.grad, before)
    assert regularizer.state_dict()["steps"] == {}


@pytest.mark.parametrize("update", ["proximal", "dual_averaging"])
def test_an_optimizer_made_anew_with_other_groups_gives_each_its_learning_rate(update: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.01, gate=None, schedule=Schedule(warmup=0), update=update)
    for anew in (False, True):
        if anew:
            optimizer = torch.optim.SGD(
                [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(net, (0.1, 0.001), strict=True)]
            )
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(1.0)
                parameter.grad = torch.zeros_like(parameter)
        regularizer.before_step(optimizer)
        optimizer.step()
        regularizer.after_step(optimizer)
    shrunk = [float((1 - layer.weight).detach().double().max()) for layer in net]
    assert shrunk == pytest.approx([0.1 * 0.01, 0.001 * 0.01], rel=0.02)
