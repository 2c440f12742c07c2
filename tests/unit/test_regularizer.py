"""The regularized step against the slow one, and the promises of the design."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import oracle
from reference.training import WEIGHTS, batches, loss_of, small_net, train_slowly
from torch import Tensor, nn

from lightning_gcsr import CoherentRegularizer, ElasticNet, GateReport, GroupLasso, Penalty
from lightning_gcsr.core.penalties import resolve_penalty

SPECS = {"l1": ("l1",), "l2": ("l2",), "elastic_net": ("elastic_net", 0.5), "group_lasso": ("group_lasso", 0)}
MEASURES = ["direction", "agreement", "temporal", None]
SCOPES = ["model", "parameter", "element"]
UPDATES = ["gradient", "proximal"]
DEFAULT_THRESHOLD = {"direction": 0.1}
STEPS = 8


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    regularizer: CoherentRegularizer | None,
    loss_scale: float | Tensor = 1.0,
) -> list[GateReport]:
    """A plain loop; the loss scale is divided out again before the step, as a ``GradScaler`` does."""
    reports = []
    for batch in data:
        optimizer.zero_grad()
        (loss_of(net, batch) * loss_scale).backward()
        if regularizer is not None:
            reports.append(regularizer.before_step(optimizer, loss_scale))
        for parameter in net.parameters():
            parameter.grad.div_(loss_scale)
        optimizer.step()
        if regularizer is not None:
            regularizer.after_step(optimizer)
    return reports


def sgd(net: nn.Module, lr: float | Tensor = 0.1, momentum: float = 0.9, **more: object) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, **more)


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that training changes: parameters, and the tensors of the optimizer."""
    tensors = [parameter.detach().clone() for parameter in net.parameters()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value.clone() for value in state.values() if isinstance(value, Tensor)]
    return tensors


def assert_identical(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_like_the_oracle(
    net: nn.Module,
    reports: list[GateReport],
    slow_net: nn.Module,
    steps: list[oracle.Step],
    measure: str | None,
    precision: float,
) -> None:
    for parameter, expected in zip(net.parameters(), slow_net.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=precision, atol=precision)
    for report, step in zip(reports, steps, strict=True):
        assert report.names == WEIGHTS
        assert float(report.injected) == pytest.approx(step.injected, abs=1e-7)
        shares = [float(gate.double().mean()) for gate in step.gates]
        assert report.injected_by_parameter.tolist() == pytest.approx(shares, abs=1e-7)
        if measure is None:
            assert report.coherence.isnan()
            assert report.coherence_by_parameter.isnan().all()
        else:
            assert float(report.coherence) == pytest.approx(step.coherence, abs=precision)
            assert report.coherence_by_parameter.tolist() == pytest.approx(step.coherence_by_parameter, abs=precision)


# --- against the slow step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", MEASURES)
def test_training_is_that_of_the_slow_step(measure: str | None, scope: str, update: str, name: str) -> None:
    arguments = {"strength": 0.5, "coherence": measure, "scope": scope, "update": update}
    threshold = DEFAULT_THRESHOLD.get(measure, 0.0)
    slow_net, steps = train_slowly(SPECS[name], [[0.5] * 3] * STEPS, measure, scope, threshold, update, 0.1, 0.9)
    for dtype, precision in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        net = small_net(dtype)
        regularizer = CoherentRegularizer(net, name, **arguments)
        reports = train(net, sgd(net), batches(STEPS, dtype=dtype), regularizer)
        assert_like_the_oracle(net, reports, slow_net, steps, measure, precision)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", ["direction", "agreement", "temporal"])
def test_the_slow_step_both_injects_and_suppresses(measure: str, scope: str) -> None:
    """Else the comparison above would prove little."""
    threshold = DEFAULT_THRESHOLD.get(measure, 0.0)
    _, steps = train_slowly(SPECS["l1"], [[0.5] * 3] * STEPS, measure, scope, threshold, "gradient", 0.1, 0.9)
    gates = torch.cat([gate.reshape(-1) for step in steps for gate in step.gates])
    assert 0 < gates.double().mean() < 1


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.05, 0.3])
@pytest.mark.parametrize("scope", ["model", "parameter"])
@pytest.mark.parametrize("measure", ["direction", "agreement", "temporal"])
def test_thresholds_decide_as_in_the_slow_step(measure: str, scope: str, threshold: float) -> None:
    slow_net, steps = train_slowly(SPECS["l1"], [[0.05] * 3] * STEPS, measure, scope, threshold, "gradient", 0.1)
    net = small_net()
    regularizer = CoherentRegularizer(
        net, strength=0.05, coherence=measure, scope=scope, threshold=threshold, update="gradient"
    )
    reports = train(net, sgd(net, momentum=0), batches(STEPS), regularizer)
    assert_like_the_oracle(net, reports, slow_net, steps, measure, 1e-12)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", MEASURES)
def test_strengths_by_name_fan_in_and_schedule_compose(measure: str | None, scope: str, update: str) -> None:
    fan_in = {"0.weight": 6, "2.weight": 5, "4.weight": 4}
    sizes = {"0.weight": 30, "2.weight": 20, "4.weight": 8}
    mean = sum(fan_in[name] * sizes[name] for name in WEIGHTS) / sum(sizes.values())
    base = {"0.weight": 0.2, "2.weight": 0.05, "4.weight": 0.05}
    full = [base[name] * fan_in[name] / mean for name in WEIGHTS]
    factors = [0, 0, 1 / 3, 2 / 3, 1, 1, 0, 0]
    strengths = [[factor * strength for strength in full] for factor in factors]
    threshold = DEFAULT_THRESHOLD.get(measure, 0.0)
    slow_net, steps = train_slowly(SPECS["l1"], strengths, measure, scope, threshold, update, 0.1, 0.9)

    net = small_net()
    regularizer = CoherentRegularizer(
        net,
        strength={r"^0\.": 0.2, ".": 0.05},
        coherence=measure,
        scope=scope,
        update=update,
        strength_scale="fan_in",
        delay_steps=2,
        warmup_steps=3,
        stop_steps=6,
    )
    reports = train(net, sgd(net), batches(STEPS), regularizer)
    for parameter, expected in zip(net.parameters(), slow_net.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)
    assert [float(report.injected) for report in reports] == pytest.approx([step.injected for step in steps])
    assert [float(report.strength) for report in reports] == pytest.approx([0.2 * factor for factor in factors])


GRADIENTS = st.one_of(st.just(0.0), st.floats(1e-3, 2.0), st.floats(-2.0, -1e-3))


@given(
    data=st.data(),
    name=st.sampled_from(list(SPECS)),
    measure=st.sampled_from(MEASURES),
    scope=st.sampled_from(SCOPES),
    strength=st.sampled_from([1e-3, 0.5, 3.0]),
)
def test_any_gradients_and_weights_give_the_slow_step(
    data: st.DataObject, name: str, measure: str | None, scope: str, strength: float
) -> None:
    shapes = data.draw(st.lists(hnp.array_shapes(min_dims=2, max_dims=3, max_side=3), min_size=1, max_size=3))
    net = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes])
    for parameter in net:
        parameter.data = torch.from_numpy(data.draw(hnp.arrays("float64", parameter.shape, elements=GRADIENTS)))
    optimizer = torch.optim.SGD(net, lr=0.1)
    regularizer = CoherentRegularizer(net, name, strength=strength, coherence=measure, scope=scope, update="gradient")
    previous = None
    for _ in range(2):
        loss_gradients = []
        for parameter in net:
            gradient = torch.from_numpy(data.draw(hnp.arrays("float64", parameter.shape, elements=GRADIENTS)))
            parameter.grad = gradient.clone()
            loss_gradients.append(gradient)
        weights = [parameter.detach().clone() for parameter in net]
        threshold = DEFAULT_THRESHOLD.get(measure, 0.0)
        step = oracle.regularized_step(
            SPECS[name], weights, loss_gradients, previous, [strength] * len(shapes), measure, scope, threshold
        )
        numbers = [step.coherence, *step.coherence_by_parameter]
        report = regularizer.before_step(optimizer)
        if measure is not None:
            assert [float(report.coherence), *report.coherence_by_parameter] == pytest.approx(numbers, abs=1e-12)
        # A cosine within rounding of the threshold may fall to either side of it.
        exact_zero = [number == 0 and threshold == 0 for number in numbers]
        if all(z or abs(n - threshold) > 1e-9 for z, n in zip(exact_zero, numbers, strict=True)):
            for parameter, expected in zip(net, step.gradients, strict=True):
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)
        previous = loss_gradients


# --- nothing where nothing is due ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, lambda net: torch.optim.Adam(net.parameters())], ids=["sgd", "adam"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("strength", [0, 0.0, {"0": 0.0, "2": 0.0}], ids=["int", "float", "mapping"])
def test_zero_strength_leaves_training_bit_identical(
    strength: object, measure: str | None, update: str, make: Callable
) -> None:
    results = []
    for regularize in (False, True):
        net = small_net(torch.float32)
        optimizer = make(net)
        regularizer = CoherentRegularizer(net, strength=strength, coherence=measure, update=update)
        reports = train(net, optimizer, batches(4, dtype=torch.float32), regularizer if regularize else None)
        assert all(float(report.injected) == 0 and float(report.strength) == 0 for report in reports)
        results.append(state_of(net, optimizer))
    assert_identical(*results)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("measure", "scope", "threshold", "steps"),
    [("direction", "model", 1.0, 4), ("direction", "parameter", 1.0, 4), ("agreement", "model", 1.0, 4)]
    + [("temporal", scope, None, 1) for scope in SCOPES],
)
@pytest.mark.parametrize("penalty", list(SPECS))
def test_a_shut_gate_leaves_training_bit_identical(
    penalty: str, measure: str, scope: str, threshold: float | None, steps: int, update: str
) -> None:
    results = []
    for regularize in (False, True):
        net = small_net(torch.float32)
        optimizer = sgd(net)
        regularizer = CoherentRegularizer(
            net, penalty, strength=0.5, coherence=measure, scope=scope, threshold=threshold, update=update
        )
        reports = train(net, optimizer, batches(steps, dtype=torch.float32), regularizer if regularize else None)
        assert all(float(report.injected) == 0 for report in reports)
        results.append(state_of(net, optimizer))
    assert_identical(*results)


def test_an_opposed_gradient_at_element_scope_is_left_bit_identical() -> None:
    net = small_net(torch.float32)
    for parameter in net.parameters():
        parameter.grad = -parameter.detach().clone()
    CoherentRegularizer(net, strength=0.5, update="gradient").before_step(sgd(net))
    for parameter in net.parameters():
        assert torch.equal(parameter.grad, -parameter.detach())


def test_no_gradient_is_ever_created() -> None:
    net = small_net()
    optimizer = sgd(net)
    for update in UPDATES:
        regularizer = CoherentRegularizer(net, strength=0.1, coherence=None, update=update)
        report = regularizer.before_step(optimizer)
        optimizer.step()
        regularizer.after_step(optimizer)
        assert report.names == ()
        assert float(report.injected) == 0
        assert report.coherence_by_parameter.numel() == report.injected_by_parameter.numel() == 0
        assert all(parameter.grad is None for parameter in net.parameters())
        assert_identical(list(net.parameters()), list(small_net().parameters()))


def test_only_parameters_with_a_gradient_take_part() -> None:
    net = small_net()
    net[2].weight.grad = torch.ones_like(net[2].weight)
    report = CoherentRegularizer(net, strength=0.1, coherence=None).before_step(sgd(net))
    assert report.names == ("2.weight",)
    assert net[0].weight.grad is None
    assert float(report.grad_norm) == pytest.approx(math.sqrt(20))


@pytest.mark.parametrize("update", UPDATES)
def test_a_parameter_outside_the_optimizer_never_changes(update: str) -> None:
    net = small_net()
    optimizer = torch.optim.SGD([*net[0].parameters(), *net[4].parameters()], lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, coherence=None, update=update)
    for batch in batches(3):
        net.zero_grad()
        loss_of(net, batch).backward()
        left_alone = net[2].weight.grad.clone()
        report = regularizer.before_step(optimizer)
        optimizer.step()
        regularizer.after_step(optimizer)
        assert report.names == ("0.weight", "4.weight")
        assert torch.equal(net[2].weight.grad, left_alone)
    assert torch.equal(net[2].weight, small_net()[2].weight)
    assert not torch.equal(net[0].weight, small_net()[0].weight)


@pytest.mark.parametrize("update", UPDATES)
def test_of_two_optimizers_each_decision_sees_its_own_parameters(update: str) -> None:
    net = small_net()
    first, second = torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.SGD(net[4].parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, coherence="agreement", scope="model", update=update)
    net[0].weight.grad = net[0].weight.detach().clone()  # fully agrees
    net[4].weight.grad = -net[4].weight.detach().clone()  # fully opposes
    gradients = [layer.weight.grad.clone() for layer in (net[0], net[4])]
    reports = [regularizer.before_step(first), regularizer.before_step(second)]
    assert [report.names for report in reports] == [("0.weight",), ("4.weight",)]
    assert [float(report.injected) for report in reports] == [1.0, 0.0]
    if update == "gradient":
        assert not torch.equal(net[0].weight.grad, gradients[0])
        assert torch.equal(net[4].weight.grad, gradients[1])
    else:
        before = [layer.weight.detach().clone() for layer in (net[0], net[4])]
        regularizer.after_step(second)
        assert torch.equal(net[0].weight, before[0])
        assert torch.equal(net[4].weight, before[1])
        regularizer.after_step(first)
        torch.testing.assert_close(net[0].weight.detach(), oracle.prox(("l1",), before[0], 0.01))


def test_weights_without_a_strength_are_left_alone() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength={r"^2\.": 0.1}, coherence=None, update="gradient")
    train(net, sgd(net), batches(1), None)
    before = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    assert regularizer.before_step(sgd(net)).names == ("2.weight",)
    changed = [name for name, parameter in net.named_parameters() if not torch.equal(parameter.grad, before[name])]
    assert changed == ["2.weight"]


# --- the same as a term of the loss --------------------------------------------------------------------------------


def _trained_with_a_loss_term(spec: oracle.Spec, strength: float, dtype: torch.dtype) -> list[Tensor]:
    net = small_net(dtype)
    optimizer = sgd(net)
    for batch in batches(STEPS, dtype=dtype):
        optimizer.zero_grad()
        weights = [net[i].weight for i in (0, 2, 4)]
        if spec == ("l1",):
            penalty = sum(weight.abs().sum() for weight in weights)
        else:
            penalty = sum(oracle.penalty_value(spec, weight) for weight in weights).to(dtype)
        (loss_of(net, batch) + strength * penalty).backward()
        optimizer.step()
    return state_of(net, optimizer)


def _trained_without_a_gate(name: str, strength: float, dtype: torch.dtype) -> list[Tensor]:
    net = small_net(dtype)
    optimizer = sgd(net)
    regularizer = CoherentRegularizer(net, name, strength=strength, coherence=None, update="gradient")
    train(net, optimizer, batches(STEPS, dtype=dtype), regularizer)
    return state_of(net, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e-3, 0.037, 2.0])
def test_ungated_l1_is_the_loss_term_exactly(strength: float, dtype: torch.dtype) -> None:
    expected = _trained_with_a_loss_term(("l1",), strength, dtype)
    result = _trained_without_a_gate("l1", strength, dtype)
    assert max(float((a - b).abs().max()) for a, b in zip(result, expected, strict=True)) == 0.0


@pytest.mark.parametrize("name", ["l2", "elastic_net", "group_lasso"])
def test_ungated_penalty_is_the_loss_term(name: str) -> None:
    expected = _trained_with_a_loss_term(SPECS[name], 0.037, torch.float64)
    for tensor, other in zip(_trained_without_a_gate(name, 0.037, torch.float64), expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12)


# --- accumulation and loss scale -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", MEASURES)
def test_four_small_batches_give_the_step_of_a_large_one(measure: str | None, scope: str) -> None:
    results = []
    for parts in (1, 4):
        net = small_net()
        optimizer = sgd(net)
        regularizer = CoherentRegularizer(net, strength=0.05, coherence=measure, scope=scope, update="gradient")
        coherences = []
        for inputs, targets in batches(4):
            optimizer.zero_grad()
            for micro in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                (loss_of(net, micro) / parts).backward()
            coherences.append(regularizer.before_step(optimizer).coherence)
            optimizer.step()
        results.append((torch.stack(coherences), state_of(net, optimizer)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-8, equal_nan=True)
    for tensor, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1024.0, 1024, torch.tensor(1024.0)], ids=["float", "int", "tensor"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", MEASURES)
def test_loss_scale_changes_nothing(measure: str | None, scope: str, update: str, scale: float | Tensor) -> None:
    results = []
    for loss_scale in (1.0, scale):
        net = small_net(torch.float32)
        optimizer = sgd(net)
        regularizer = CoherentRegularizer(net, strength=0.1, coherence=measure, scope=scope, update=update)
        reports = train(net, optimizer, batches(4, dtype=torch.float32), regularizer, loss_scale)
        columns = [(r.coherence, r.injected, r.grad_norm, r.penalty_grad_norm) for r in reports]
        results.append((columns, state_of(net, optimizer)))
    for left, right in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(a, b) or (a.isnan() and b.isnan()) for a, b in zip(left, right, strict=True))
    assert_identical(results[0][1], results[1][1])


# --- non-finite gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_non_finite_gradient_suppresses_everywhere(measure: str | None, scope: str, update: str, bad: float) -> None:
    net = small_net()
    optimizer = sgd(net)
    regularizer = CoherentRegularizer(net, strength=0.1, coherence=measure, scope=scope, update=update)
    train(net, optimizer, batches(1), regularizer)
    loss_of(net, batches(1)[0]).backward()
    net[2].weight.grad[1, 2] = bad
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    report = regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    assert float(report.injected) == 0
    assert not report.finite
    for parameter, gradient, weight in zip(net.parameters(), gradients, weights, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(parameter, weight)
    assert int(regularizer.nonfinite_steps) == 1


def test_non_finite_steps_are_counted() -> None:
    net = small_net()
    optimizer = sgd(net)
    regularizer = CoherentRegularizer(net, strength=0.1)
    assert int(regularizer.nonfinite_steps) == 0
    for bad in (0.0, math.nan, 1.0, math.inf, 2.0):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, bad)
        report = regularizer.before_step(optimizer)
        assert bool(report.finite) == math.isfinite(bad)
    assert int(regularizer.nonfinite_steps) == 2


def test_a_non_finite_gradient_is_counted_at_strength_zero_too() -> None:
    net = small_net()
    net[0].weight.grad = torch.full_like(net[0].weight, math.nan)
    regularizer = CoherentRegularizer(net, strength=0.0)
    regularizer.before_step(sgd(net))
    assert int(regularizer.nonfinite_steps) == 1


@pytest.mark.parametrize("name", ["l1", "l2", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("tiny", [1e-40, 1e-30, 1e-20])
def test_tiny_weights_never_bring_a_non_finite_gradient(name: str, tiny: float) -> None:
    net = nn.Linear(1, 4, bias=True)
    with torch.no_grad():
        net.weight.fill_(tiny)
        net.bias.fill_(-tiny)
    optimizer = sgd(net)
    regularizer = CoherentRegularizer(net, name, strength=0.1, coherence=None, include=["."], update="gradient")
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    regularizer.before_step(optimizer)
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


# --- temporal ------------------------------------------------------------------------------------------------------


def _temporal(scope: str, gradients: list[float], update: str = "gradient") -> tuple[list[float], CoherentRegularizer]:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    regularizer = CoherentRegularizer(net, strength=10.0, coherence="temporal", scope=scope, update=update)
    injected = []
    for number in gradients:
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, number)
        injected.append(float(regularizer.before_step(optimizer).injected))
        optimizer.step()
        regularizer.after_step(optimizer)
    return injected, regularizer


@pytest.mark.parametrize("scope", SCOPES)
def test_temporal_compares_with_the_last_step_and_the_first_suppresses(scope: str) -> None:
    assert _temporal(scope, [1.0, 2.0, -1.0, -3.0, 0.0, 1.0])[0] == [0, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("scope", SCOPES)
def test_temporal_remembers_the_loss_gradient_without_the_penalty(scope: str) -> None:
    """With strength 10 a remembered penalty of mixed signs would close some of the gates."""
    assert _temporal(scope, [1.0, 1.0, 1.0, 1.0])[0] == [0, 1, 1, 1]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_temporal_memory_survives_a_non_finite_gradient(scope: str, bad: float) -> None:
    assert _temporal(scope, [1.0, bad, 1.0, bad, -1.0])[0] == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("scope", SCOPES)
def test_temporal_has_no_predecessor_until_a_finite_gradient(scope: str) -> None:
    assert _temporal(scope, [math.nan, math.inf, 1.0, 1.0])[0] == [0, 0, 0, 1]


@pytest.mark.parametrize("scope", SCOPES)
def test_temporal_forgets_its_predecessor_on_load(scope: str) -> None:
    _, regularizer = _temporal(scope, [1.0, 1.0])
    regularizer.load_state_dict(regularizer.state_dict())
    optimizer = torch.optim.SGD(regularizer.parameters.values(), lr=0.0)
    injected = []
    for _ in range(2):
        for parameter in regularizer.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        injected.append(float(regularizer.before_step(optimizer).injected))
    assert injected == [0, 1]


def test_temporal_remembers_during_the_delay() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1, coherence="temporal", scope="model", delay_steps=1)
    injected = []
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        injected.append(float(regularizer.before_step(sgd(net)).injected))
    assert injected == [0, 1]


def test_temporal_tensor_without_predecessor_suppresses_alone_at_parameter_scope() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1, coherence="temporal", scope="parameter")
    net[0].weight.grad = torch.ones_like(net[0].weight)
    regularizer.before_step(sgd(net))
    for layer in (net[0], net[2]):
        layer.weight.grad = torch.ones_like(layer.weight)
    assert regularizer.before_step(sgd(net)).injected_by_parameter.tolist() == [1, 0]


def test_temporal_tensor_without_predecessor_shares_the_one_decision_at_model_scope() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1, coherence="temporal", scope="model")
    net[0].weight.grad = torch.ones_like(net[0].weight)
    regularizer.before_step(sgd(net))
    for layer in (net[0], net[2]):
        layer.weight.grad = torch.ones_like(layer.weight)
    report = regularizer.before_step(sgd(net))
    assert report.injected_by_parameter.tolist() == [1, 1]
    assert float(report.coherence) == pytest.approx(math.sqrt(30 / 50))


# --- report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SPECS))
def test_report_states_norms_strength_and_shares(name: str) -> None:
    net = small_net()
    loss_of(net, batches(1)[0]).backward()
    gradients = [net[i].weight.grad.clone() for i in (0, 2, 4)]
    weights = [net[i].weight.detach() for i in (0, 2, 4)]
    report = CoherentRegularizer(net, name, strength={r"^0": 0.3, ".": 0.1}, warmup_steps=2).before_step(sgd(net))
    step = oracle.regularized_step(
        SPECS[name], weights, gradients, None, [0.15, 0.05, 0.05], "agreement", "element", 0.0
    )
    penalty = [s * r for s, r in zip([0.15, 0.05, 0.05], step.penalty_gradients, strict=True)]
    assert report.names == WEIGHTS
    assert float(report.strength) == pytest.approx(0.15)
    assert float(report.grad_norm) == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()))
    assert float(report.penalty_grad_norm) == pytest.approx(float(torch.cat([p.flatten() for p in penalty]).norm()))
    assert float(report.injected) == pytest.approx(step.injected)
    assert 0 < step.injected < 1
    assert float(report.coherence) == pytest.approx(step.coherence)
    assert report.coherence_by_parameter.tolist() == pytest.approx(step.coherence_by_parameter)
    assert bool(report.finite)
    for field in ("coherence", "injected", "strength", "grad_norm", "penalty_grad_norm", "finite"):
        assert getattr(report, field).shape == ()
    for field in ("coherence_by_parameter", "injected_by_parameter"):
        assert getattr(report, field).shape == (3,)


def test_agreement_at_strength_zero_is_still_measured() -> None:
    net = small_net()
    for parameter in net.parameters():
        parameter.grad = parameter.detach().sign()
    report = CoherentRegularizer(net, strength=0.0, coherence="agreement", scope="model").before_step(sgd(net))
    assert float(report.coherence) == pytest.approx(1.0)
    assert float(report.penalty_grad_norm) == 0.0


# --- penalties of one's own ----------------------------------------------------------------------------------------


class Careless(Penalty):
    """Half the square, with maps that return the very tensor they were given."""

    def value(self, weight: Tensor) -> Tensor:
        return weight.square().sum() / 2

    def gradient(self, weight: Tensor) -> Tensor:
        return weight

    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return weight if step == 0 else weight / (1 + step)


@pytest.mark.parametrize("strength_scale", ["uniform", "fan_in"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_penalty_that_returns_its_input_does_no_harm(
    measure: str | None, scope: str, update: str, strength_scale: str
) -> None:
    results = []
    for penalty in ("l2", Careless()):
        net = small_net()
        optimizer = sgd(net)
        regularizer = CoherentRegularizer(
            net, penalty, strength=0.1, coherence=measure, scope=scope, update=update, strength_scale=strength_scale
        )
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            before = [parameter.detach().clone() for parameter in net.parameters()]
            regularizer.before_step(optimizer)
            assert_identical(before, [parameter.detach() for parameter in net.parameters()])
            optimizer.step()
            regularizer.after_step(optimizer)
        results.append(state_of(net, optimizer))
    for tensor, other in zip(*results, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12)


def test_penalty_value_sums_over_the_regularized_weights() -> None:
    net = small_net()
    for name, spec in SPECS.items():
        expected = sum(float(oracle.penalty_value(spec, net[i].weight.detach())) for i in (0, 2, 4))
        assert float(CoherentRegularizer(net, name, strength=0.1).penalty_value()) == pytest.approx(expected)


@pytest.mark.parametrize("penalty", ["l1", ElasticNet(0.2), GroupLasso(1)])
def test_penalty_may_be_a_name_or_an_object(penalty: object) -> None:
    regularizer = CoherentRegularizer(small_net(), penalty, strength=0.1)
    assert repr(regularizer.penalty) == repr(resolve_penalty(penalty))


def test_a_penalty_that_does_not_fit_a_weight_says_so_at_once() -> None:
    with pytest.raises(ValueError, match=r"`dim` must name a dimension .* has the shape \(5, 6\), got dim=2"):
        CoherentRegularizer(small_net(), GroupLasso(2), strength=0.1)
