"""Which optimizers can be regularized, and how far a proximal step goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gcsr.core.optimizers import check_optimizer, proximal_step_size, stepped_parameters

FAMILIAR = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]


@pytest.mark.parametrize("kind", FAMILIAR)
def test_first_order_optimizers_pass(kind: type[torch.optim.Optimizer]) -> None:
    check_optimizer(kind(nn.Linear(2, 2).parameters(), lr=0.1))


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LBFGS is not supported: .* Use SGD, Adam or another first-order optimizer"):
        check_optimizer(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))


def test_maximize_is_refused_in_any_group() -> None:
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": layers[0].parameters()}, {"params": layers[1].parameters(), "maximize": True}]
    with pytest.raises(ValueError, match=r"maximize=True is not supported: .* Negate the loss and use maximize=False"):
        check_optimizer(torch.optim.SGD(groups, lr=0.1))


def test_stepped_parameters_come_in_the_order_of_the_optimizer() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": [second.weight, second.bias], "lr": 0.3}, {"params": [first.weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    names = {id(first.weight): "first", id(second.weight): "second", id(first.bias): "not stepped"}
    found = [(name, parameter, group["lr"]) for name, parameter, group in stepped_parameters(optimizer, names)]
    assert [(name, lr) for name, _, lr in found] == [("second", 0.3), ("first", 0.1)]
    assert found[0][1] is second.weight


def steady_gradient_moves(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: float) -> float:
    """How far a gradient that never changes moves a weight in one step, in the long run."""
    before = 0.0
    for _ in range(400):
        before = float(parameter.detach())
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return before - float(parameter.detach())


@given(
    lr=st.floats(1e-4, 1.0),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    nesterov=st.booleans(),
)
def test_proximal_step_under_sgd_is_what_a_steady_gradient_moves(
    lr: float, momentum: float, dampening: float, nesterov: bool
) -> None:
    nesterov = nesterov and momentum > 0 and dampening == 0
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)
    expected = steady_gradient_moves(optimizer, parameter, 0.25)
    assert proximal_step_size(optimizer.param_groups[0], 0.25) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        lambda parameters, lr: torch.optim.RMSprop(parameters, lr, momentum=0.9),
    ],
)
def test_proximal_step_under_adaptive_optimizers_is_lr_times_strength(make: object) -> None:
    optimizer = make([nn.Parameter(torch.zeros(2))], lr=0.5)
    assert proximal_step_size(optimizer.param_groups[0], 0.25) == 0.125


def test_proximal_step_of_a_tensor_lr_is_a_tensor() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr, momentum=0.75)
    step = proximal_step_size(optimizer.param_groups[0], 0.25)
    assert isinstance(step, torch.Tensor)
    assert float(step) == pytest.approx(0.5)
