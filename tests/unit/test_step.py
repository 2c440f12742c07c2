"""Every step of the regularizer against the slow one, and what a step never does."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import oracle
from reference.pairwise import pairwise_cases
from reference.slow_regularizer import SlowRegularizer, StepSize
from reference.training import WEIGHTS, batches, loss_of, small_net
from torch import Tensor, nn

from lightning_gcsr import L1, L2, CoherentRegularizer, ElasticNet, Gate, GateReport, GroupLasso, Penalty, Schedule
from lightning_gcsr.core import chunk_layout
from lightning_gcsr.core.chunks import Scratch
from lightning_gcsr.core.members import Member

PENALTIES: dict[str, tuple[Penalty, oracle.Spec]] = {
    "l1": (L1(), ("l1",)),
    "l2": (L2(), ("l2",)),
    "elastic_net": (ElasticNet(0.3), ("elastic_net", 0.3)),
    "group_lasso_0": (GroupLasso(0), ("group_lasso", 0)),
    "group_lasso_1": (GroupLasso(1), ("group_lasso", 1)),
}

GATES: dict[str, Gate | None] = {"none": None}
for _scope in ("model", "parameter", "element"):
    for _measure in ("direction", "agreement", "temporal"):
        GATES[f"{_measure}_{_scope}"] = Gate(_measure, _scope, averaging=0)
    for _measure in ("direction", "agreement"):
        GATES[f"{_measure}_{_scope}_averaged"] = Gate(_measure, _scope, averaging=0.7, tolerance=0)
GATES["eased"] = Gate(averaging=0, tolerance=0.4)
GATES["eased_averaged"] = Gate(averaging=0.7, tolerance=0.4)
GATES["strict"] = Gate("agreement", "parameter", threshold=0.2)


def _sgd(factor: float) -> StepSize:
    return lambda lr, history: lr * factor


def _rescaled(decay: float | None, factor: float = 1.0) -> StepSize:
    return lambda lr, history: lr * factor / oracle.root_mean_square(history, decay) if history else 0.0


OPTIMIZERS: dict[str, tuple[Any, StepSize]] = {
    "sgd": (lambda net: torch.optim.SGD(net.parameters(), lr=0.1), _sgd(1.0)),
    "momentum": (lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5, dampening=0.2), _sgd(0.8 / 0.5)),
    "groups": (
        lambda net: torch.optim.SGD(
            [{"params": net[:3].parameters(), "lr": 0.2}, {"params": net[3:].parameters()}], lr=0.1
        ),
        _sgd(1.0),
    ),
    "tensor lr": (lambda net: torch.optim.SGD(net.parameters(), lr=torch.tensor(0.125), momentum=0.5), _sgd(2.0)),
    "adamw": (lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95)), _rescaled(0.95)),
    "rmsprop": (
        lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01, alpha=0.9, momentum=0.5),
        _rescaled(0.9, 2.0),
    ),
    "adagrad": (lambda net: torch.optim.Adagrad(net.parameters(), lr=0.05), _rescaled(None)),
}

MEAN_FAN_IN = (30 * 6 + 20 * 5 + 8 * 4) / 58
STRENGTHS: dict[str, tuple[dict[str, Any], dict[str, float], list[float]]] = {
    "plain": ({"strength": 0.1, "schedule": Schedule(warmup=0)}, dict.fromkeys(WEIGHTS, 0.1), [1.0] * 7),
    "by name, fan-in, scheduled": (
        {
            "strength": {r"^0\.": 0.2, ".": 0.1},
            "strength_scale": "fan_in",
            "schedule": Schedule(delay=1, warmup=3, stop=6),
        },
        {name: s * fan_in / MEAN_FAN_IN for name, s, fan_in in zip(WEIGHTS, (0.2, 0.1, 0.1), (6, 5, 4), strict=True)},
        [0, 1 / 3, 2 / 3, 1, 1, 1, 0],
    ),
}
ABSENT: dict[str, dict[int, list[str]]] = {
    "never": {},
    "one in mid-training": {3: ["2.weight"], 4: ["2.weight"]},
    "the last one joins later": {0: ["4.weight"], 1: ["4.weight"]},
    "the middle one joins later": {0: ["2.weight"], 1: ["2.weight"]},
}

CASES = pairwise_cases(
    {
        "gate": list(GATES),
        "penalty": list(PENALTIES),
        "update": ["gradient", "proximal", "dual_averaging"],
        "optimizer": list(OPTIMIZERS),
        "strength": list(STRENGTHS),
        "chunk_size": [8, 1 << 18],
        "report": [True, False],
        "loss_scale": [1.0, 64.0, torch.tensor(1024.0)],
        "absent": list(ABSENT),
        "broken": [None, math.nan, math.inf],
    }
)


def lrs_of(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, float]:
    lr = {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: lr[id(parameter)] for name, parameter in named.items()}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().double(), expected.double(), rtol=1e-8, atol=1e-12)


def assert_report_of(
    report: GateReport, step: oracle.Step, slow: SlowRegularizer, gradients: dict[str, Tensor]
) -> None:
    order = [list(gradients).index(name) for name in report.names]  # that of the chunks, not of the optimizer
    assert sorted(order) == list(range(len(gradients)))
    assert float(report.injected) == pytest.approx(step.injected, abs=1e-9)
    fractions = [float(step.gates[i].double().mean()) for i in order]
    assert report.injected_by_parameter.tolist() == pytest.approx(fractions, abs=1e-9)
    assert float(report.strength) == pytest.approx(slow.factor * max(slow.strengths.values()) * strength_share(slow))
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert bool(report.finite) is finite
    if slow.measure is None:
        assert report.coherence.isnan()
        assert report.coherence_by_parameter.isnan().all()
    elif finite:
        assert float(report.coherence) == pytest.approx(step.coherence, abs=1e-9)
        assert report.coherence_by_parameter.tolist() == pytest.approx(
            [step.coherence_by_parameter[i] for i in order], abs=1e-9
        )
    if finite:
        norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        assert float(report.grad_norm) == pytest.approx(norm)
    own = [slow.factor * slow.strengths[n] * r for n, r in zip(gradients, step.penalty_gradients, strict=True)]
    assert float(report.penalty_grad_norm) == pytest.approx(float(torch.cat([r.flatten() for r in own]).norm()))


def strength_share(slow: SlowRegularizer) -> float:
    """The largest strength before scaling, over that after it."""
    return (0.2 if slow.strengths["0.weight"] != slow.strengths["2.weight"] else 0.1) / max(slow.strengths.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_step_is_that_of_the_slow_regularizer(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_layout, "CPU_SIZE", case["chunk_size"])
    gate, (penalty, spec) = GATES[case["gate"]], PENALTIES[case["penalty"]]
    make, step_size = OPTIMIZERS[case["optimizer"]]
    arguments, strengths, factors = STRENGTHS[case["strength"]]
    scale = case["loss_scale"]

    net = small_net()
    named = {name: net.get_parameter(name) for name in WEIGHTS}
    optimizer = make(net)
    regularizer = CoherentRegularizer(net, penalty, gate=gate, update=case["update"], **arguments)
    slow = SlowRegularizer(spec, strengths, case["update"])
    if gate is None:
        slow.measure = None
    else:
        slow.measure, slow.scope, slow.threshold = str(gate.coherence), gate.scope, gate.threshold or 0.0
        slow.tolerance, slow.averaging = gate.tolerance or 0.0, gate.averaging or 0.0

    for number, (batch, factor) in enumerate(zip(batches(len(factors)), factors, strict=True)):
        optimizer.zero_grad()
        (loss_of(net, batch) * float(scale)).backward()
        for name in ABSENT[case["absent"]].get(number, []):
            named[name].grad = None
        broken = number == 2 and case["broken"] is not None
        if broken:
            named["0.weight"].grad[1, 2] = case["broken"]
        present = {name: parameter for name, parameter in named.items() if parameter.grad is not None}
        gradients = {name: parameter.grad.clone() / scale for name, parameter in present.items()}
        untouched = {name: parameter.grad.clone() for name, parameter in present.items()}
        weights = {name: parameter.detach().clone() for name, parameter in present.items()}

        step = slow.before(weights, gradients, factor)
        report = regularizer.before_step(optimizer, scale, report=case["report"])
        if report is None:
            assert not case["report"]
        else:
            assert_report_of(report, step, slow, gradients)
        for name, parameter in present.items():
            if case["update"] == "gradient" and not broken:
                assert_close(parameter.grad / scale, step.gradients[list(present).index(name)])
            else:
                torch.testing.assert_close(parameter.grad, untouched[name], rtol=0, atol=0, equal_nan=True)
            assert_close(parameter, slow.latents.get(name, weights[name]))

        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        if broken:  # a gradient scaler skips such a step
            regularizer.after_step(optimizer, skipped=True)
            assert all(torch.equal(parameter, weights[name]) for name, parameter in present.items())
            continue
        optimizer.step()
        stepped = {name: parameter.detach().clone() for name, parameter in present.items()}
        regularizer.after_step(optimizer)
        for name, expected in slow.after(stepped, lrs_of(optimizer, named), step_size).items():
            assert_close(named[name], expected)
            assert torch.equal(named[name] == 0, expected == 0)
            assert not (named[name] == 0).logical_and(named[name].signbit()).any()
    assert int(regularizer.nonfinite_steps) == (case["broken"] is not None)


NUMBERS = st.one_of(st.just(0.0), st.floats(1e-3, 2.0), st.floats(-2.0, -1e-3))


@given(
    data=st.data(),
    name=st.sampled_from(list(PENALTIES)),
    gate=st.sampled_from([name for name in GATES if "averaged" not in name]),
    strength=st.sampled_from([1e-3, 0.5, 3.0]),
)
@settings(max_examples=40)
def test_any_gradients_and_weights_give_the_slow_step(
    data: st.DataObject, name: str, gate: str, strength: float
) -> None:
    shapes = data.draw(st.lists(hnp.array_shapes(min_dims=2, max_dims=3, max_side=3), min_size=1, max_size=3))
    draw = lambda shape: torch.from_numpy(data.draw(hnp.arrays("float64", shape, elements=NUMBERS)))  # noqa: E731
    net = nn.ParameterList([nn.Parameter(draw(shape)) for shape in shapes])
    penalty, spec = PENALTIES[name]
    rule = GATES[gate]
    regularizer = CoherentRegularizer(
        net, penalty, strength=strength, gate=rule, schedule=Schedule(warmup=0), update="gradient", include=["."]
    )
    previous: list[Tensor | None] = [None] * len(shapes)
    for _ in range(2):
        loss_gradients = [draw(shape) for shape in shapes]
        for parameter, gradient in zip(net, loss_gradients, strict=True):
            parameter.grad = gradient.clone()
        step = oracle.regularized_step(
            spec,
            [parameter.detach() for parameter in net],
            loss_gradients,
            previous,
            [strength] * len(shapes),
            None if rule is None else str(rule.coherence),
            "model" if rule is None else rule.scope,
            (rule.threshold or 0.0) if rule else 0.0,
            (rule.tolerance or 0.0) if rule else 0.0,
        )
        threshold = (rule.threshold or 0.0) if rule else 0.0
        report = regularizer.before_step(torch.optim.SGD(net, lr=0.1))
        numbers = [step.coherence, *step.coherence_by_parameter]
        if rule is not None:
            assert [float(report.coherence), *report.coherence_by_parameter] == pytest.approx(numbers, abs=1e-12)
        # A cosine within rounding of the threshold may fall to either side of it.
        if all((n == 0 and threshold == 0) or abs(n - threshold) > 1e-9 for n in numbers) or gate == "eased":
            for parameter, expected in zip(net, step.gradients, strict=True):
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)
        previous = list(loss_gradients)


class HeldPart(Member):
    """A parameter of which this process holds some rows."""

    held = 0

    @property
    def weight(self) -> Tensor:
        return self.parameter[: self.held]

    @property
    def gradient(self) -> Tensor:
        return self.weight


def test_processes_that_hold_unequal_parts_treat_parameters_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up their sums in this order."""
    monkeypatch.setattr(chunk_layout, "CPU_SIZE", 16)
    group: dict[str, Any] = {}

    def order(held: int) -> list[str]:
        members = [HeldPart(name, nn.Parameter(torch.zeros(4, 4)), group, 1.0) for name in ("cut", "whole")]
        members[0].held, members[1].held = held, 4
        return [member.name for chunk in chunk_layout.cut(members, L1(), Scratch(), {}) for member in chunk.members]

    assert order(4) == order(0) == ["cut", "whole"]
