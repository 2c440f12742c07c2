"""A step never asks the device for a number: on a GPU that would make the host wait for all that is queued."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gcsr import CoherentRegularizer

DECISIONS: list[dict[str, Any]] = [
    {"coherence": coherence, "scope": scope}
    for coherence in ("direction", "agreement", "temporal")
    for scope in ("model", "parameter", "element")
] + [{"coherence": None}]
DECISIONS += [
    {"coherence": coherence, "scope": scope, "averaging": 0.9}
    for coherence in ("direction", "agreement")
    for scope in ("model", "parameter", "element")
]
DECISIONS += [{"averaging": 0.9, "tolerance": 0.5, "warmup_steps": 5}]


class NoHostNumbers(TorchDispatchMode):
    """Raises where a tensor becomes a Python number, as ``item``, ``float``, ``bool`` and ``tolist`` make it."""

    def __enter__(self) -> Any:
        # On a CPU `tolist` reads the memory without going through torch's dispatcher.
        self.no_list = mock.patch.object(Tensor, "tolist", side_effect=AssertionError("tolist asks the device"))
        self.no_list.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        self.no_list.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
            raise AssertionError(f"{func} asks the device for a number")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ask", [Tensor.item, float, bool, lambda t: t.tolist(), lambda t: torch.equal(t, t)])
def test_the_watch_notices(ask: Any) -> None:
    number = torch.ones(())
    with NoHostNumbers(), pytest.raises(AssertionError, match="asks the device"):
        ask(number)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("decision", DECISIONS, ids=str)
def test_a_step_asks_for_no_number(decision: dict[str, Any], penalty: Any, update: Any) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1), momentum=0.9, foreach=False)
    regularizer = CoherentRegularizer(net, penalty, strength=0.1, update=update, **decision)
    scale = torch.tensor(1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        (net(torch.randn(6, 5)).square().mean() * scale).backward()
        with NoHostNumbers():
            report = regularizer.before_step(optimizer, loss_scale=scale)
            regularizer.after_step(optimizer)
    assert 0 <= float(report.injected) <= 1
