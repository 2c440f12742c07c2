"""Methods of others: each ends a tiny training with the zeros that it promises, and does what its paper says."""

import dataclasses
import importlib.metadata
from typing import Any

import pytest
import run as command
import torch
from batches import Dataset
from grid import Run, Study
from methods import Method
from optimizers import AdaBreg, LinBreg, linearized_bregman
from pat import has_torchao, pat_lasso
from problems import Problem
from rich.console import Console
from spred import Factors, Product, spred_optimizer
from torch import nn
from training import train

from lightning_gcsr.core.parameter_selection import select_parameters

SGD = Problem("digits", "deep_mlp", epochs=6, lr=0.02, batch_size=64)
ADAMW = dataclasses.replace(SGD, optimizer="adamw", lr=0.002)
needs_torchao = pytest.mark.skipif(not has_torchao(), reason="torchao is not installed")
# torch says this of an enumeration of torchao's.
pytestmark = pytest.mark.filterwarnings("ignore:.*Enum subclass.*")


@pytest.mark.parametrize(
    ("problem", "method", "least", "most"),
    [
        pytest.param(SGD, Method("pat_top_k", target_sparsity=0.75), 0.7495, 0.7505, marks=needs_torchao),
        pytest.param(ADAMW, Method("pat_top_k", target_sparsity=0.75), 0.7495, 0.7505, marks=needs_torchao),
        pytest.param(SGD, Method("pat_lasso", strength=0.05), 0.1, 0.95, marks=needs_torchao),
        pytest.param(ADAMW, Method("pat_lasso", strength=0.3), 0.1, 0.95, marks=needs_torchao),
        (SGD, Method("linearized_bregman", strength=0.3, initial_density=0.2), 0.5, 0.95),
        (ADAMW, Method("linearized_bregman", strength=0.3, initial_density=0.2), 0.5, 0.95),
        (SGD, Method("spred", strength=0.01, cut=0.01), 0.05, 0.95),
        (ADAMW, Method("spred", strength=0.1, cut=0.01), 0.05, 0.95),
        (SGD, Method("magnitude_pruning", target_sparsity=0.75, prunings=50), 0.7495, 0.7505),
        (ADAMW, Method("magnitude_pruning", target_sparsity=0.75, prunings=50), 0.7495, 0.7505),
    ],
    ids=lambda value: getattr(value, "method", getattr(value, "optimizer", None)),
)
def test_training_ends_with_the_zeros_that_are_promised(
    problem: Problem, method: Method, least: float, most: float, digits: Dataset
) -> None:
    outcome = train(problem, method, 0, digits)
    assert least <= 1 - outcome.nonzeros / outcome.weights <= most
    assert outcome.test_accuracy > 0.7


def quadratic() -> tuple[nn.Linear, torch.Tensor]:
    """A linear map and where a quadratic loss wants its weights to be."""
    module = nn.Linear(6, 4, bias=False)
    return module, torch.randn(4, 6)


def descend(module: nn.Linear, goal: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        ((module.weight - goal).square().sum() / 2).backward()
        optimizer.step()


# -- linearized Bregman iterations ------------------------------------------------------------------------------------


def test_linbreg_follows_the_formula_and_ends_at_the_least_loss() -> None:
    """V ← v − τ·g(w), w = soft(v, λ), from v = w + λ·sign(w): written out in numbers."""
    module, goal = quadratic()
    problem = dataclasses.replace(SGD, momentum=0.0, lr=0.1)
    optimizer = linearized_bregman(module, problem, 0.5, initial_density=0.3)
    assert isinstance(optimizer, LinBreg)
    weight = module.weight.detach().clone()
    dual = weight + 0.5 * weight.sign()
    assert (weight == 0).any()
    for step in range(400):
        descend(module, goal, optimizer, 1)
        dual = dual - 0.1 * (weight - goal)
        weight = torch.sign(dual) * (dual.abs() - 0.5).clamp_min(0)
        if step in (0, 1, 20):
            torch.testing.assert_close(module.weight.detach(), weight)
    # Unlike a penalty, the iterations do not shrink what they let in.
    torch.testing.assert_close(module.weight.detach(), goal, atol=1e-3, rtol=1e-3)


def test_bregman_weights_enter_the_later_the_smaller_they_are() -> None:
    module, _ = quadratic()
    optimizer = linearized_bregman(module, dataclasses.replace(SGD, momentum=0.0, lr=0.01), 0.5, initial_density=1e-9)
    goal = torch.linspace(0.1, 2.4, 24).view(4, 6)
    descend(module, goal, optimizer, 50)
    entered = module.weight.detach().flatten() != 0
    assert 0 < int(entered.sum()) < 24
    assert entered.tolist() == sorted(entered.tolist())


def test_adabreg_takes_adams_steps_and_counts_them_at_the_sparse_weights() -> None:
    module, goal = quadratic()
    optimizer = linearized_bregman(module, dataclasses.replace(ADAMW, lr=0.01), 0.05, initial_density=0.5)
    assert isinstance(optimizer, AdaBreg)
    start = module.weight.detach().clone()
    descend(module, goal, optimizer, 1)
    moved = (module.weight.detach() - start)[start != 0].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), atol=1e-4, rtol=0)  # Adam's first step is lr


# -- spred -----------------------------------------------------------------------------------------------------------


def test_products_begin_as_the_weights_and_weight_decay_on_factors_is_l1() -> None:
    weight = torch.randn(5, 3)
    u, v = Product().right_inverse(weight)
    torch.testing.assert_close(u * v, weight)
    # Over all factors of a weight, the decay is least where they are balanced, and |w| there.
    assert ((u.square() + v.square()) / 2 >= weight.abs() - 1e-6).all()
    balanced = weight.abs().sqrt()
    torch.testing.assert_close((balanced.square() + balanced.square()) / 2, weight.abs())


def test_spred_ends_at_the_soft_threshold_of_a_quadratic_loss() -> None:
    """The least value of ‖w − goal‖²/2 + λ‖w‖₁ is soft(goal, λ)."""
    module, goal = quadratic()
    network = nn.Sequential(module)
    factors = Factors(network, cut=1e-3)
    factors.setup(None, None, "fit")  # type: ignore[arg-type]
    optimizer = spred_optimizer(network, dataclasses.replace(SGD, lr=0.05, momentum=0.5), 0.4)
    descend(module, goal, optimizer, 3_000)
    factors.on_train_end(None, None)  # type: ignore[arg-type]
    [name] = [name for name, _ in network.named_parameters()]
    assert name == "0.weight"
    wanted = nn.functional.softshrink(goal, 0.4)
    torch.testing.assert_close(module.weight.detach(), wanted, atol=2e-3, rtol=0)
    assert int((module.weight == 0).sum()) == int((wanted == 0).sum()) > 0


# -- PAT ---------------------------------------------------------------------------------------------------------------


@needs_torchao
def test_pat_takes_gradients_at_the_pruned_weights() -> None:
    """In a closure, as Lightning calls it: z ← z − lr·g(w), w = soft(z, λ·Σ lr)."""
    module, goal = quadratic()
    latent = module.weight.detach().clone()
    weight = latent.clone()
    optimizer = pat_lasso(module, dataclasses.replace(SGD, momentum=0.0, lr=0.1), strength=0.2)
    for step in range(1, 6):

        def closure() -> Any:
            optimizer.zero_grad()
            loss = (module.weight - goal).square().sum() / 2
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        assert float(optimizer.step(closure).detach()) > 0  # type: ignore[no-untyped-call]
        latent = latent - 0.1 * (weight - goal)
        weight = nn.functional.softshrink(latent, 0.2 * 0.1 * step)
        torch.testing.assert_close(module.weight.detach(), weight)


@needs_torchao
def test_pat_keeps_zeros_from_the_start_of_healing_on() -> None:
    module, goal = quadratic()
    optimizer = pat_lasso(module, dataclasses.replace(SGD, lr=0.1), strength=2.0, healing_start=3)
    descend(module, goal, optimizer, 3)
    zeros = module.weight.detach() == 0
    assert zeros.any()
    descend(module, goal, optimizer, 200)
    assert torch.equal(module.weight.detach() == 0, zeros)
    torch.testing.assert_close(module.weight.detach()[~zeros], goal[~zeros], atol=1e-2, rtol=0)


@pytest.mark.parametrize(("version", "wanted"), [("0.17.0", False), ("0.18.0", True), ("1.0", True), (None, False)])
def test_torchao_that_is_missing_or_too_old_is_noticed(
    version: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    assert has_torchao() is wanted


def test_study_goes_without_pat_where_torchao_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [Run(SGD, method, 0) for method in (Method(), Method("pat_top_k", compression=4))]
    monkeypatch.setattr(command, "has_torchao", lambda: False)
    left = command._without_missing_packages(Study("s", runs, []), Console())
    assert [run.method.method for run in left.runs] == ["none"]
    assert "1 runs of PAT are left out: they need torchao." in capsys.readouterr().out


def test_rivals_leave_biases_alone(digits: Dataset) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = linearized_bregman(module, SGD, 5.0, initial_density=0.5)
    chosen, others = optimizer.param_groups
    assert {id(p) for p in chosen["params"]} == {id(p) for p in select_parameters(module).values()}
    assert all(parameter.dim() == 1 for parameter in others["params"])
