"""Which optimizers can be regularized, and that one λ means the same under each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gcsr import CoherentRegularizer, Penalty
from lightning_gcsr.core.optimizers import (
    accumulates_squares,
    check_optimizer,
    learning_rate,
    momentum_factor,
    rescales_gradients,
    square_decay,
    stepped_parameters,
)

FAMILIAR = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]


@pytest.mark.parametrize("kind", FAMILIAR)
def test_first_order_optimizers_pass(kind: Any) -> None:
    optimizer = kind(nn.Linear(2, 2).parameters(), lr=0.1)
    check_optimizer(optimizer)
    assert rescales_gradients(optimizer.param_groups[0]) is (kind is not torch.optim.SGD)


def grouped(**second: Any) -> torch.optim.Optimizer:
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    return torch.optim.SGD([{"params": layers[0].parameters()}, {"params": layers[1].parameters(), **second}], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            torch.optim.LBFGS(nn.Linear(2, 2).parameters()),
            "LBFGS is not supported: .* Use SGD, Adam or another first-order",
        ),
        (grouped(maximize=True), "maximize=True is not supported: .* Negate the loss and use maximize=False"),
        (grouped(train_mode=True), "SGD is not supported: it evaluates an average .* without its schedule-free form"),
    ],
)
def test_what_cannot_be_regularized_is_refused_in_any_group(optimizer: torch.optim.Optimizer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_optimizer(optimizer)


def test_an_optimizer_without_a_learning_rate_is_refused() -> None:
    optimizer = grouped()
    optimizer.param_groups[1]["lr"] = None
    with pytest.raises(ValueError, match=r"SGD with lr=None is not supported: .* Give it a learning rate"):
        check_optimizer(optimizer)


def test_stepped_parameters_come_in_the_order_of_the_optimizer() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": [second.weight, second.bias], "lr": 0.3}, {"params": [first.weight]}]
    names = {id(first.weight): "first", id(second.weight): "second", id(first.bias): "not stepped"}
    found = list(stepped_parameters(torch.optim.SGD(groups, lr=0.1), names))
    assert [(name, group["lr"]) for name, _, group in found] == [("second", 0.3), ("first", 0.1)]
    assert found[0][1] is second.weight


def test_what_a_group_says_of_its_optimizer() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    rmsprop = torch.optim.RMSprop(parameters, lr=0.1, alpha=0.9, momentum=0.5)
    adam = torch.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.95))
    assert [square_decay(o.param_groups[0]) for o in (rmsprop, adam)] == [0.9, 0.95]
    assert [momentum_factor(o.param_groups[0]) for o in (rmsprop, adam)] == [2.0, 1.0]
    assert learning_rate({"lr": 0.5, "d": 0.25, "growth_rate": 3}) == 0.125  # Prodigy and its kin
    adagrad = torch.optim.Adagrad(parameters)
    assert accumulates_squares(adagrad.state[parameters[0]])
    assert not accumulates_squares(adam.state[parameters[0]])


# --- κ -------------------------------------------------------------------------------------------------------------


class Linear(Penalty):
    """Ω(w) = Σ w, whose gradient is 1 everywhere and whose proximal map is a shift."""

    elementwise = True

    @override
    def value(self, weight: Tensor) -> Tensor:
        return weight.sum()

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    @override
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return weight - step


def moved_by_the_penalty(
    make: Callable[..., torch.optim.Optimizer], update: Any, strength: float, steps: int
) -> Tensor:
    """How far each weight ends from where it ends without a penalty, in float64, over many steps."""
    ends = []
    for regularized in (True, False):
        generator = torch.Generator().manual_seed(1)
        weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
        net = nn.ParameterList([weight])
        optimizer = make([weight])
        regularizer = CoherentRegularizer(net, Linear(), strength=strength, gate=None, update=update, include=["."])
        for _ in range(steps):
            weight.grad = torch.randn(4, 5, generator=generator, dtype=torch.float64).sign()
            if regularized:
                regularizer.before_step(optimizer)
            optimizer.step()
            if regularized:
                regularizer.after_step(optimizer)
        ends.append(weight.detach().clone())
    return ends[1] - ends[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.5, "nesterov": True},
        {"dampening": 0.5},
    ],
    ids=str,
)
def test_under_sgd_the_proximal_step_moves_a_weight_as_far_as_the_injected_gradient(arguments: dict[str, Any]) -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, **arguments)

    both = [moved_by_the_penalty(make, update, 1e-6, 300) for update in ("gradient", "proximal")]
    late = [moved_by_the_penalty(make, update, 1e-6, 400) for update in ("gradient", "proximal")]
    per_step = [(b - a) / 100 for a, b in zip(both, late, strict=True)]  # once the momentum is in its steady state
    torch.testing.assert_close(per_step[0], per_step[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, eps=0.0), 0.01),
        (lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, eps=0.0), 0.02),
    ],
    ids=["adamw", "rmsprop"],
)
def test_where_gradients_are_rescaled_both_move_a_weight_by_lr_lambda_over_the_root_mean_square(
    make: Callable[..., torch.optim.Optimizer], size: float
) -> None:
    """To first order in λ, and on the average over weights; the gradients here are −1 and 1."""
    moved = {u: moved_by_the_penalty(make, u, 1e-5, 2000) / 2000 for u in ("gradient", "proximal")}
    torch.testing.assert_close(
        moved["proximal"], torch.full((4, 5), size * 1e-5, dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert float(moved["gradient"].mean()) == pytest.approx(size * 1e-5, rel=0.05)


def proximal_moves(make: Any, gradients: list[Tensor], update: Any = "proximal") -> list[float]:
    """How far the penalty at λ = 0.5 carries the first weight in each step, λ·lr·κ."""
    weight = nn.Parameter(torch.full((2, 2), 100.0, dtype=torch.float64))
    optimizer = make([weight])
    regularizer = CoherentRegularizer(nn.ParameterList([weight]), strength=0.5, gate=None, update=update, include=["."])
    moves = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        regularizer.before_step(optimizer)
        before = float(weight[0, 0].detach())
        regularizer.after_step(optimizer)
        moves.append(before - float(weight[0, 0].detach()))
    return moves


def test_under_adagrad_the_step_shrinks_with_the_sum_of_squares() -> None:
    gradients = [torch.full((2, 2), 2.0, dtype=torch.float64)] * 4
    moves = proximal_moves(lambda p: torch.optim.Adagrad(p, lr=0.1), gradients)
    assert moves == pytest.approx([0.1 * 0.5 / (2 * math.sqrt(t)) for t in (1, 2, 3, 4)])


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad])
def test_where_the_root_mean_square_is_zero_or_not_known_the_penalty_waits(make: Any) -> None:
    zero, one, nan = (torch.full((2, 2), number, dtype=torch.float64) for number in (0.0, 1.0, math.nan))
    moves = proximal_moves(lambda p: make(p, lr=0.1), [nan, zero, zero, one, one])
    assert moves[:3] == [0.0, 0.0, 0.0]
    assert all(0 < move < 100 and math.isfinite(move) for move in moves[3:])


def test_a_tensor_without_gradient_does_not_hold_up_the_others() -> None:
    net = nn.ParameterList([nn.Parameter(torch.full((2, 2), 1.0)) for _ in range(2)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.5, gate=None, update="proximal", include=["."])
    net[0].grad, net[1].grad = torch.zeros(2, 2), torch.full((2, 2), 2.0)
    regularizer.before_step(optimizer)
    assert regularizer.step_sizes(optimizer) == pytest.approx({"0": 0.0, "1": 0.05})
    regularizer.after_step(optimizer)
    assert torch.equal(net[0].detach(), torch.full((2, 2), 1.0))
    torch.testing.assert_close(net[1].detach(), torch.full((2, 2), 0.975))
