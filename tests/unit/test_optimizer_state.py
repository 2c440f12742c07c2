"""Training goes on in the smaller network as it would have in the zeroed one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_gcsr import carry_optimizer_state, shrink_units


def in_groups(parameters: Any) -> list[dict[str, Any]]:
    weights, biases = [], []
    for parameter in parameters:
        (weights if parameter.dim() > 1 else biases).append(parameter)
    return [{"params": biases, "lr": 0.02}, {"params": weights, "weight_decay": 0.1}]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
        lambda parameters: torch.optim.Adam(in_groups(parameters), lr=0.01, amsgrad=True, foreach=True),
    ],
    ids=["SGD", "AdamW, fused", "Adam, two groups, foreach"],
)
def test_steps_are_those_of_the_zeroed_network(make: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs, targets = torch.randn(8, 4), torch.randn(8, 3)
    optimizer = make(net.parameters())

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(network(inputs), targets).backward()
        optimizer.step()

    for _ in range(3):
        step(net, optimizer)
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias, net[2].weight.T):
            tensor[[1, 4]] = 0
    smaller, report = shrink_units(net, inputs)
    new = make(smaller.parameters())
    carry_optimizer_state(optimizer, new, net, smaller, report)
    step(net, optimizer)
    step(smaller, new)
    assert torch.allclose(smaller[0].weight, net[0].weight[[0, 2, 3, 5]], atol=1e-6)
    assert torch.allclose(smaller[2].weight, net[2].weight[:, [0, 2, 3, 5]], atol=1e-6)
    with pytest.raises(ValueError, match=r"`new_optimizer` must be of the class of the old one"):
        carry_optimizer_state(optimizer, torch.optim.Adagrad(smaller.parameters()), net, smaller, report)
    with pytest.raises(ValueError, match=r"`report` must be the one on this network, .* than '0.\w+' has now"):
        carry_optimizer_state(optimizer, make(net.parameters()), net, net, report)


@pytest.mark.parametrize("name", ["SGD", "Adafactor"])
def test_state_has_the_sizes_and_the_device_of_the_new_parameters(name: str) -> None:
    """A Trainer leaves its optimizers on the CPU, and the next one may train elsewhere."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs = torch.randn(8, 4)

    def make(network: nn.Module) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(network.parameters(), lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))

    optimizer = make(net)
    net(inputs).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        net[0].weight[[1, 4]] = 0
    smaller, report = shrink_units(net, inputs)
    new = make(smaller)
    carry_optimizer_state(optimizer, new, net, smaller, report)
    state = new.state[smaller[2].weight]
    if name == "Adafactor":
        assert (state["row_var"].shape, state["col_var"].shape) == ((3, 1), (1, 4))
    smaller(inputs).square().sum().backward()
    new.step()
    elsewhere = make(smaller.to("meta"))
    carry_optimizer_state(optimizer, elsewhere, net, smaller, report)
    devices = {value.device.type for key, value in elsewhere.state[smaller[2].weight].items() if key != "step"}
    assert devices == {"meta"}
