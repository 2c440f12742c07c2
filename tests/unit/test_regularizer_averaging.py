"""Coherence of averaged gradients and with a tolerance: against the slow step, and what is promised of the two."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from reference import oracle
from reference.training import WEIGHTS, batches, loss_of, small_net, train_slowly
from torch import Tensor, nn

from lightning_gcsr import CoherentRegularizer, GateReport

SPECS = {"l1": ("l1",), "l2": ("l2",), "elastic_net": ("elastic_net", 0.5), "group_lasso": ("group_lasso", 0)}
SCOPES = ["model", "parameter", "element"]
UPDATES = ["gradient", "proximal"]
THRESHOLD = {"direction": 0.1, "agreement": 0.0}
STEPS = 8
BETA = 0.7


def sgd(net: nn.Module, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)


def train(
    net: nn.Module,
    regularizer: CoherentRegularizer,
    data: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: float = 1.0,
) -> list[GateReport]:
    """A plain loop; the loss scale is divided out again before the step, as a ``GradScaler`` does."""
    optimizer = sgd(net) if optimizer is None else optimizer
    reports = []
    for batch in data:
        optimizer.zero_grad()
        (loss_of(net, batch) * loss_scale).backward()
        reports.append(regularizer.before_step(optimizer, loss_scale))
        for parameter in net.parameters():
            parameter.grad.div_(loss_scale)
        optimizer.step()
        regularizer.after_step(optimizer)
    return reports


def assert_like_the_oracle(
    net: nn.Module, reports: list[GateReport], slow_net: nn.Module, steps: list[oracle.Step], precision: float = 1e-12
) -> None:
    for parameter, expected in zip(net.parameters(), slow_net.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=precision, atol=precision)
    for report, step in zip(reports, steps, strict=True):
        shares = [float(gate.double().mean()) for gate in step.gates]
        assert report.injected_by_parameter.tolist() == pytest.approx(shares, abs=1e-7)
        assert float(report.coherence) == pytest.approx(step.coherence, abs=precision)
        assert report.coherence_by_parameter.tolist() == pytest.approx(step.coherence_by_parameter, abs=precision)


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def injected_shares(reports: list[GateReport]) -> list[list[float]]:
    return [report.injected_by_parameter.tolist() for report in reports]


# --- against the slow step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", ["direction", "agreement"])
def test_averaged_training_is_that_of_the_slow_step(measure: str, scope: str, update: str, name: str) -> None:
    strengths = [[0.5] * 3] * STEPS
    slow_net, steps = train_slowly(
        SPECS[name], strengths, measure, scope, THRESHOLD[measure], update, 0.1, 0.9, averaging=BETA
    )
    for dtype, precision in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        net = small_net(dtype)
        regularizer = CoherentRegularizer(
            net, name, strength=0.5, coherence=measure, scope=scope, update=update, averaging=BETA
        )
        reports = train(net, regularizer, batches(STEPS, dtype=dtype))
        assert_like_the_oracle(net, reports, slow_net, steps, precision)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", ["direction", "agreement"])
def test_the_average_decides_otherwise_than_the_gradient(measure: str, scope: str) -> None:
    """Else the comparison above would prove little."""
    gates = []
    for averaging in (0.0, BETA):
        _, steps = train_slowly(
            SPECS["l1"],
            [[0.5] * 3] * STEPS,
            measure,
            scope,
            THRESHOLD[measure],
            "gradient",
            0.1,
            0.9,
            averaging=averaging,
        )
        gates.append(torch.cat([gate.reshape(-1) for step in steps for gate in step.gates]))
    assert 0 < gates[1].double().mean() < 1
    assert not torch.equal(*gates)


FAN_IN = {"0.weight": 6, "2.weight": 5, "4.weight": 4}
SIZES = {"0.weight": 30, "2.weight": 20, "4.weight": 8}
MEAN_FAN_IN = sum(FAN_IN[name] * SIZES[name] for name in WEIGHTS) / sum(SIZES.values())
BY_NAME = {"0.weight": 0.4, "2.weight": 0.1, "4.weight": 0.1}
SCALED = [BY_NAME[name] * FAN_IN[name] / MEAN_FAN_IN for name in WEIGHTS]
RAMP = [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 0]
SCHEDULE: dict[str, Any] = {"delay_steps": 1, "warmup_steps": 4, "stop_steps": 7}
EASED: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "plain": ({"strength": 0.4}, [[0.4] * 3] * STEPS),
    "warm-up": ({"strength": 0.4, **SCHEDULE}, [[0.4 * factor] * 3 for factor in RAMP]),
    "warm-up, fan-in, by name": (
        {"strength": {r"^0\.": 0.4, ".": 0.1}, "strength_scale": "fan_in", **SCHEDULE},
        [[factor * strength for strength in SCALED] for factor in RAMP],
    ),
}


@pytest.mark.parametrize("averaging", [0.0, BETA])
@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("case", list(EASED))
def test_training_with_a_tolerance_is_that_of_the_slow_step(
    case: str, update: str, name: str, averaging: float
) -> None:
    arguments, strengths = EASED[case]
    slow_net, steps = train_slowly(
        SPECS[name], strengths, "agreement", "element", 0.0, update, 0.1, 0.9, averaging=averaging, tolerance=0.6
    )
    net = small_net()
    regularizer = CoherentRegularizer(net, name, update=update, averaging=averaging, tolerance=0.6, **arguments)
    reports = train(net, regularizer, batches(STEPS))
    for parameter, expected in zip(net.parameters(), slow_net.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)
    for report, step in zip(reports, steps, strict=True):
        shares = [float(gate.double().mean()) for gate in step.gates]
        assert report.injected_by_parameter.tolist() == pytest.approx(shares, abs=1e-7)


@pytest.mark.parametrize("case", list(EASED))
def test_the_tolerance_decides_otherwise_than_none_and_than_one_without_its_factors(case: str) -> None:
    """Else the comparison above would prove little: neither ramp nor relative strength may be left out."""
    _, strengths = EASED[case]

    def gates(tolerance: float, now: list[list[float]]) -> Tensor:
        _, steps = train_slowly(SPECS["l1"], now, "agreement", "element", 0.0, "proximal", 0.1, tolerance=tolerance)
        return torch.cat([gate.reshape(-1) for step in steps for gate in step.gates])

    eased = gates(0.6, strengths)
    assert 0 < eased.double().mean() < 1
    assert not torch.equal(eased, gates(0.0, strengths))
    if case != "plain":
        assert not torch.equal(eased, gates(0.6, [[max(map(max, strengths))] * 3] * STEPS))


# --- the tolerance at a single weight ------------------------------------------------------------------------------


def one_step(gradients: list[float], weights: list[float], **arguments: Any) -> tuple[list[bool], GateReport]:
    """At which weights the penalty was injected."""
    net = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([weights]))
    before = torch.tensor([gradients])
    net.weight.grad = before.clone()
    report = CoherentRegularizer(net, **({"update": "gradient"} | arguments)).before_step(sgd(net))
    return (net.weight.grad != before)[0].tolist(), report


def test_a_gradient_that_opposes_by_no_more_than_the_tolerance_counts_as_coherent() -> None:
    # λ = 0.5 and c = 0.5: up to a quarter against the sign of the weight is let pass, the quarter itself too.
    gradients = [-0.2, -0.25, -0.3, 0.3, 0.2, 0.25, 0.3]
    weights = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    opened, report = one_step(gradients, weights, strength=0.5, tolerance=0.5)
    assert opened == [True, True, False, True, True, True, False]
    assert float(report.injected) == pytest.approx(5 / 7)
    assert one_step(gradients, weights, strength=0.5)[0] == [False, False, False, True, False, False, False]


def test_the_tolerance_grows_with_the_warm_up() -> None:
    """In the first of two steps of warm-up λ is 0.25, and half of that is 0.125."""
    arguments = {"strength": 0.5, "tolerance": 0.5, "warmup_steps": 2}
    assert one_step([-0.12, -0.13], [1.0, 1.0], **arguments)[0] == [True, False]


def test_the_tolerance_of_l2_is_a_share_of_the_weight() -> None:
    arguments = {"penalty": "l2", "strength": 0.5, "tolerance": 0.5}
    assert one_step([-0.4, -0.4, -0.4], [1.0, 2.0, -2.0], **arguments)[0] == [False, True, True]


def test_the_reported_coherence_is_without_the_tolerance() -> None:
    reports = [one_step([-0.2, 0.7], [1.0, 2.0], strength=0.5, tolerance=tolerance)[1] for tolerance in (0.0, 0.5, 1.0)]
    assert len({float(report.coherence) for report in reports}) == 1


def test_tolerance_opens_no_gate_at_a_gradient_that_is_not_finite() -> None:
    opened, report = one_step([math.nan, -0.1], [1.0, 1.0], strength=0.5, tolerance=1.0, update="proximal")
    assert float(report.injected) == 0
    assert not opened[1]


# --- loss scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "decision",
    [{"coherence": measure, "scope": scope} for measure in THRESHOLD for scope in SCOPES] + [{"tolerance": 0.5}],
    ids=str,
)
def test_the_loss_scale_changes_nothing(decision: dict[str, Any], update: str) -> None:
    """A scale that changes from step to step, as that of a ``GradScaler`` does, is not in the average either."""
    runs = []
    for scales in ([1.0] * 6, [1024.0] * 6, [1024.0, 1024.0, 512.0, 512.0, 4096.0, 1.0]):
        net = small_net()
        regularizer = CoherentRegularizer(net, strength=0.5, averaging=0.9, update=update, **decision)
        optimizer, reports = sgd(net), []
        for batch, scale in zip(batches(6), scales, strict=True):
            reports += train(net, regularizer, [batch], optimizer, scale)
        runs.append((net, reports))
    for net, reports in runs[1:]:
        assert same_weights(net, runs[0][0])
        assert injected_shares(reports) == injected_shares(runs[0][1])
        assert [float(r.coherence) for r in reports] == [float(r.coherence) for r in runs[0][1]]


# --- without averaging ---------------------------------------------------------------------------------------------


def test_without_averaging_nothing_is_kept() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.5, averaging=0.0)
    train(net, regularizer, batches(2))
    assert "averages" not in regularizer.state_dict()


@pytest.mark.parametrize("measure", ["direction", "agreement"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_first_step_is_the_same_with_and_without_averaging(scope: str, measure: str) -> None:
    """The average of one gradient is the gradient, in every bit; and it leaves the gradient itself alone."""
    nets = []
    for averaging in (0.0, 0.9):
        net = small_net()
        regularizer = CoherentRegularizer(
            net, strength=0.5, coherence=measure, scope=scope, averaging=averaging, update="gradient"
        )
        train(net, regularizer, batches(1))
        nets.append(net)
    assert same_weights(*nets)


@pytest.mark.parametrize("measure", ["direction", "agreement"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("update", UPDATES)
def test_at_strength_0_averaging_is_plain_training(update: str, scope: str, measure: str) -> None:
    net, plain = small_net(), small_net()
    regularizer = CoherentRegularizer(net, strength=0, coherence=measure, scope=scope, averaging=0.9, update=update)
    train(net, regularizer, batches(4))
    optimizer = sgd(plain)
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(plain, batch).backward()
        optimizer.step()
    assert same_weights(net, plain)


def test_the_average_grows_during_the_delay() -> None:
    """The first decision after a delay rests on all gradients so far, and not on one."""
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.5, averaging=0.9, delay_steps=3)
    train(net, regularizer, batches(3))
    assert regularizer.state_dict()["averages"]["steps"] == dict.fromkeys(WEIGHTS, 3)


# --- gradients that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "decision",
    [{"coherence": measure, "scope": scope} for measure in THRESHOLD for scope in SCOPES] + [{"tolerance": 1.0}],
    ids=str,
)
def test_a_gradient_that_is_not_finite_closes_all_gates_and_spoils_nothing(
    decision: dict[str, Any], update: str, broken: float
) -> None:
    net = small_net()
    optimizer = sgd(net, lr=0.01)
    regularizer = CoherentRegularizer(net, strength=1e-3, averaging=0.9, update=update, **decision)

    def step(spoilt: bool) -> GateReport:
        for parameter in net.parameters():
            parameter.grad = parameter.detach().sign()  # everything is coherent
        if spoilt:
            net[2].weight.grad[0, 0] = broken
        before = [parameter.grad.clone() for parameter in net.parameters()]
        report = regularizer.before_step(optimizer)
        if spoilt:
            for parameter, gradient in zip(net.parameters(), before, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)
        else:
            optimizer.step()
        weights = [parameter.detach().clone() for parameter in net.parameters()]
        regularizer.after_step(optimizer)
        if spoilt:  # as a GradScaler skips the optimizer's step; the proximal map has nothing to do either
            assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))
        return report

    assert float(step(spoilt=False).injected) == 1
    assert float(step(spoilt=True).injected) == 0
    averages = regularizer.state_dict()["averages"]["averages"]
    assert all(average.isfinite().all() for average in averages.values())
    after = step(spoilt=False)
    assert float(after.injected) == 1
    assert float(after.coherence) > 0
    assert int(regularizer.nonfinite_steps) == 1
    assert all(parameter.isfinite().all() for parameter in net.parameters())


# --- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", ["direction", "agreement"])
def test_norm_of_the_gradient_and_coherence_of_the_average_are_reported(measure: str, scope: str) -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.5, coherence=measure, scope=scope, averaging=0.5)
    optimizer = sgd(net)
    history: list[list[Tensor]] = []
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        gradients = [net.get_parameter(name).grad.clone() for name in WEIGHTS]
        history.append(gradients)
        averages = [oracle.average(series, 0.5) for series in zip(*history, strict=True)]
        signs = [net.get_parameter(name).detach().sign() for name in WEIGHTS]
        report = regularizer.before_step(optimizer)
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        assert float(report.grad_norm) == pytest.approx(norm, rel=1e-12)
        companions = signs
        if measure == "direction":
            companions = [average + 0.5 * sign for average, sign in zip(averages, signs, strict=True)]
        expected = oracle.coherence(oracle.flatten(averages), oracle.flatten(companions))
        assert float(report.coherence) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
    average_norm = float(torch.cat([average.flatten() for average in averages]).norm())
    assert average_norm != pytest.approx(norm, rel=1e-2)  # else the two would not be told apart


# --- sparse gradients ----------------------------------------------------------------------------------------------


def test_averaging_with_a_sparse_gradient_is_an_error() -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    embedding(torch.tensor([1, 4])).sum().backward()
    regularizer = CoherentRegularizer(embedding, strength=0.1, averaging=0.9)
    message = r"averaging=0\.9 does not go with the sparse gradient of 'weight'.*Use averaging=0 or .*`exclude`"
    with pytest.raises(ValueError, match=message):
        regularizer.before_step(sgd(embedding))


def test_a_sparse_gradient_that_is_excluded_does_not_mind() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(6, 3, sparse=True), "head": nn.Linear(3, 2)})
    regularizer = CoherentRegularizer(net, strength=0.1, averaging=0.9, exclude=["words"])
    net["head"](net["words"](torch.tensor([1, 4]))).sum().backward()
    assert regularizer.before_step(sgd(net, momentum=0.0)).names == ("head.weight",)


def test_tolerance_works_on_the_touched_rows_of_a_sparse_gradient() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    with torch.no_grad():
        embedding.weight.fill_(1.0)
    (embedding(torch.tensor([3, 1])) * torch.tensor([[-0.2, -0.3], [0.3, -0.2]])).sum().backward()
    regularizer = CoherentRegularizer(embedding, strength=0.5, tolerance=0.5, update="gradient")
    report = regularizer.before_step(sgd(embedding, momentum=0.0))
    assert float(report.injected) == 0.75
    expected = torch.tensor([[0.0, 0.0], [0.8, 0.3], [0.0, 0.0], [0.3, -0.3]])
    torch.testing.assert_close(embedding.weight.grad.to_dense(), expected)


# --- 16 bits and complex numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_average_of_16_bit_gradients_is_kept_in_32(dtype: torch.dtype) -> None:
    net = small_net(dtype)
    regularizer = CoherentRegularizer(net, strength=0.5, averaging=0.98, tolerance=0.5)
    train(net, regularizer, batches(2, dtype=dtype))
    averages = regularizer.state_dict()["averages"]["averages"]
    assert {average.dtype for average in averages.values()} == {torch.float32}


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_complex_gradients_are_averaged_as_numbers(tolerance: float) -> None:
    generator = torch.Generator().manual_seed(4)
    net = nn.Module()
    net.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128, generator=generator))
    regularizer = CoherentRegularizer(net, strength=0.5, averaging=0.5, tolerance=tolerance, update="gradient")
    gradients = [torch.randn(3, 4, dtype=torch.complex128, generator=generator) for _ in range(2)]
    for gradient in gradients:
        net.weight.grad = gradient.clone()
        regularizer.before_step(sgd(net))
    average, unit = gradients[0] / 3 + gradients[1] * 2 / 3, net.weight.detach().sgn()
    opened = ((average + tolerance * 0.5 * unit).conj() * unit).real >= 0
    assert 0 < opened.double().mean() < 1
    expected = torch.where(opened, gradients[1] + 0.5 * unit, gradients[1])
    torch.testing.assert_close(net.weight.grad, expected, rtol=1e-12, atol=1e-12)


# --- state ---------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {"strength": 0.4, "averaging": 0.9, "tolerance": 0.5, "warmup_steps": 6}


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("update", UPDATES)
def test_a_resumed_run_makes_the_steps_of_the_one_that_was_not(update: str) -> None:
    data, arguments = batches(8), RESUMED | {"update": update}
    net = small_net()
    optimizer, regularizer = sgd(net), CoherentRegularizer(net, **arguments)
    train(net, regularizer, data[:4], optimizer)
    state = saved_and_loaded((net.state_dict(), optimizer.state_dict(), regularizer.state_dict()))
    forgetful = copy.deepcopy(state)
    del forgetful[2]["averages"]
    train(net, regularizer, data[4:], optimizer)
    for (weights, momentum, numbers), as_expected in ((state, True), (forgetful, False)):
        other = small_net()
        other.load_state_dict(weights)
        other_optimizer, other_regularizer = sgd(other), CoherentRegularizer(other, **arguments)
        other_optimizer.load_state_dict(momentum)
        other_regularizer.load_state_dict(numbers)
        train(other, other_regularizer, data[4:], other_optimizer)
        assert same_weights(other, net) is as_expected


def test_averaging_can_be_turned_on_and_off_at_a_resume() -> None:
    net = small_net()
    with_averages = CoherentRegularizer(net, strength=0.4, averaging=0.9)
    train(net, with_averages, batches(2))
    without = CoherentRegularizer(net, strength=0.4)
    without.load_state_dict(with_averages.state_dict())
    assert without.state_dict()["steps"] == {"0.weight": 2}
    assert "averages" not in without.state_dict()
    with_averages.load_state_dict(without.state_dict())
    assert with_averages.state_dict()["averages"] == {"averages": {}, "steps": {}}


def test_a_parameter_may_be_left_out_at_a_resume() -> None:
    """As a changed strength takes effect, so does a changed selection."""
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.4, averaging=0.9)
    train(net, regularizer, batches(2))
    narrower = CoherentRegularizer(net, strength=0.4, averaging=0.9, exclude=["^0"])
    narrower.load_state_dict(regularizer.state_dict())
    assert list(narrower.state_dict()["averages"]["averages"]) == ["2.weight", "4.weight"]


def test_a_copy_goes_on_by_itself() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, **RESUMED)
    train(net, regularizer, batches(2))
    other_net, other = copy.deepcopy((net, regularizer))
    train(other_net, other, batches(4)[2:])
    assert regularizer.state_dict()["averages"]["steps"] == dict.fromkeys(WEIGHTS, 2)
    train(net, regularizer, batches(4)[2:])
    assert same_weights(net, other_net)
