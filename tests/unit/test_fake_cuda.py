"""Steps on fake CUDA tensors, which need no GPU: no host synchronization, no mix-up of devices, few calls into torch.

``FakeTensorMode`` raises where a number is read from a tensor and where tensors of two devices meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from reference.pairwise import pairwise_cases
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gcsr import L1, L2, CoherentRegularizer, ElasticNet, Gate, GroupLasso, Schedule
from lightning_gcsr.core import chunk_layout
from lightning_gcsr.core.schedule import Clock

GATES: dict[str, Gate | None] = {"none": None, "default": Gate()}
for _scope in ("model", "parameter", "element"):
    for _measure in ("direction", "agreement", "temporal"):
        GATES[f"{_measure}_{_scope}"] = Gate(_measure, _scope, averaging=0)
    for _measure in ("direction", "agreement"):
        GATES[f"{_measure}_{_scope}_averaged"] = Gate(_measure, _scope, averaging=0.9, tolerance=0)

CASES = pairwise_cases(
    {
        "gate": list(GATES),
        "penalty": [L1(), L2(), ElasticNet(0.5), GroupLasso(0), GroupLasso(1)],
        "update": ["gradient", "proximal", "dual_averaging"],
        "optimizer": ["sgd", "adamw", "rmsprop", "adagrad"],
        "tensor_lr": [False, True],
        "scaled": ["no", "float", "tensor"],
        "report": [False, True],
        "dtype": [torch.float32, torch.bfloat16, torch.float64, torch.complex64],
        "chunk_size": [6, 1 << 24],
        "after": ["stepped", "skipped", "found_inf"],
        "devices": ["one", "two"],
    }
)


class WatchCopies(TorchDispatchMode):
    """Raises where a tensor is copied from the GPU to the CPU, which waits for the GPU too; counts all calls.

    ``prim.device`` is how a fake tensor looks up its device, and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return result
        self.calls[str(func)] += 1
        results = result if isinstance(result, list | tuple) else [result]
        given = [x for a in args for x in (a if isinstance(a, list | tuple) else [a]) if isinstance(x, Tensor)]
        if any(isinstance(r, Tensor) and r.device.type == "cpu" for r in results):
            assert not any(x.device.type == "cuda" for x in given), f"{func} copies from the GPU to the CPU"
        return result


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchCopies]:
    """Tensors made within are fake; a regularizer's constructor, which may read numbers, takes no norms."""
    monkeypatch.setattr(CoherentRegularizer, "weight_norms", lambda self: {})
    with FakeTensorMode(), WatchCopies() as watch:
        yield watch


def net_of(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, second_half_on: str = "cuda:0"
) -> nn.ParameterList:
    devices = ["cuda:0" if i < len(shapes) / 2 else second_half_on for i in range(len(shapes))]
    net = nn.ParameterList(
        nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        for shape, device in zip(shapes, devices, strict=True)
    )
    for parameter in net:
        parameter.grad = torch.zeros_like(parameter)
    return net


def optimizer_of(net: nn.Module, kind: str, tensor_lr: bool) -> torch.optim.Optimizer:
    lr = torch.tensor(0.1, device="cuda") if tensor_lr else 0.1
    made = {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }[kind]
    optimizer = made(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr  # a constructor would look whether it is negative
    return optimizer


def test_reading_a_number_and_copying_to_the_host_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests below would prove nothing."""
    with fake_cuda(monkeypatch):
        number = torch.zeros(3, device="cuda")
        for ask in (lambda t: t.sum().item(), lambda t: bool(t.sum() > 0), lambda t: t.tolist()):
            with pytest.raises(DataDependentOutputException):
                ask(number)
        with pytest.raises(AssertionError, match="copies from the GPU"):
            number.cpu()
        with pytest.raises(Exception, match="device"):
            number + torch.zeros(3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_step_reads_no_number_and_mixes_up_no_devices(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_layout, "SIZE_ELSEWHERE", case["chunk_size"])
    with fake_cuda(monkeypatch):
        second_half_on = {"one": "cuda:0", "two": "cuda:1"}[case["devices"]]
        net = net_of([(4, 5), (3, 4), (4, 5), (3, 2)], case["dtype"], second_half_on)
        optimizer = optimizer_of(net, case["optimizer"], case["tensor_lr"])
        schedule = Schedule(delay=1, warmup=2, stop=5)
        regularizer = CoherentRegularizer(
            net,
            case["penalty"],
            strength=0.1,
            gate=GATES[case["gate"]],
            update=case["update"],
            schedule=schedule,
            include=["."],
        )
        scale = {"no": 1.0, "float": 8.0, "tensor": torch.ones((), device="cuda")}[case["scaled"]]
        for number in range(6):
            net[2].grad = None if number == 3 else torch.zeros_like(net[2])
            report = regularizer.before_step(optimizer, scale, report=case["report"])
            if case["after"] == "found_inf":
                optimizer.found_inf = torch.zeros((), device="cuda")
            regularizer.after_step(optimizer, skipped=case["after"] == "skipped" and number == 2)
            if report is not None:
                values = [report.coherence, report.injected, report.grad_norm, report.coherence_by_parameter]
                assert all(value.device == net[0].device for value in values)
        assert net[0].dtype == case["dtype"]
        assert regularizer.nonfinite_steps.device == net[0].device


def test_weights_of_two_devices_in_turns_and_towards_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in which one half has gradients, an optimizer for each half, and the counts that a target asks for."""
    with fake_cuda(monkeypatch):
        net = net_of([(4, 5), (3, 4), (4, 5), (3, 2)], second_half_on="cuda:1")
        together = torch.optim.AdamW(net.parameters())
        halves = [torch.optim.AdamW(net[:2].parameters()), torch.optim.AdamW(net[2:].parameters())]
        regularizer = CoherentRegularizer(net, strength=0.1, schedule=Schedule(warmup=0), include=["."])
        for optimizer in [together, *halves, together]:
            regularizer.before_step(optimizer, torch.ones((), device="cuda:1"))
            regularizer.after_step(optimizer)
        net[0].grad = net[1].grad = None
        regularizer.before_step(together)
        regularizer.after_step(together)

        net = net_of([(4, 5), (3, 2)], second_half_on="cuda:1")
        targeted = CoherentRegularizer(net, target_sparsity=0.9, include=["."])
        optimizer = torch.optim.AdamW(targeted.parameters.values())
        targeted.before_step(optimizer, clock=Clock(0, 0.0))
        targeted.after_step(optimizer)
        targeted.before_step(optimizer, clock=Clock(1, 0.5))  # late enough for the growth to be adapted
        with pytest.raises(DataDependentOutputException):  # all else has been done when the counts are read
            targeted.after_step(optimizer)
        assert targeted.controller is not None
        assert targeted.controller.steps == 0


def calls_of(shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, optimizer: str, **arguments: Any) -> int:
    """The calls into torch's dispatcher of one default step, before and after the optimizer's."""
    with fake_cuda(monkeypatch) as watch:
        net = net_of(shapes)
        stepping = optimizer_of(net, optimizer, tensor_lr=False)
        regularizer = CoherentRegularizer(net, strength=0.1, schedule=Schedule(warmup=0), include=["."], **arguments)
        for _ in range(3):
            watch.calls.clear()
            regularizer.before_step(stepping, report=False)
            regularizer.after_step(stepping)
    return watch.calls.total()


def shapes_of(model: str) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        net = torchvision.models.get_model(model, weights=None)
    return [tuple(parameter.shape) for parameter in net.parameters() if parameter.dim() > 1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["resnet50", "vit_b_16"])
def test_a_default_step_of_a_large_network_makes_few_calls(
    model: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calls_of(shapes_of(model), monkeypatch, optimizer) <= 120


@pytest.mark.parametrize("arguments", [{}, {"update": "dual_averaging"}, {"gate": None}], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_thousand_tensors_take_as_many_calls_as_a_hundred(
    optimizer: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = ([(4, 4)] * count for count in (100, 1000))
    assert calls_of(many, monkeypatch, optimizer, **arguments) == calls_of(few, monkeypatch, optimizer, **arguments)
