"""Dual averaging: latent weights, thresholds that grow through open gates, and weights that others replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import oracle
from reference.training import WEIGHTS, batches, loss_of, small_net
from torch import Tensor, nn

from lightning_gcsr import CoherentRegularizer, Gate, Schedule, prune_small


def regularizer_of(net: nn.Module, **arguments: Any) -> CoherentRegularizer:
    settings = {"strength": 0.1, "gate": None, "schedule": Schedule(warmup=0), "update": "dual_averaging"}
    return CoherentRegularizer(net, **(settings | arguments))


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, regularizer: CoherentRegularizer, gradient: Tensor | None = None
) -> None:
    optimizer.zero_grad()
    loss_of(net, batches(1, dtype=next(net.parameters()).dtype)[0]).backward()
    if gradient is not None:
        net[0].weight.grad.copy_(gradient)
    regularizer.before_step(optimizer)
    optimizer.step()
    regularizer.after_step(optimizer)


def test_a_threshold_grows_only_where_its_gate_is_open() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    regularizer = regularizer_of(net, gate=Gate(averaging=0, tolerance=0))
    held = net[0].weight.detach().sign()
    held[:, :3] *= -1  # the loss holds on to the first three columns
    step(net, optimizer, regularizer, held)
    thresholds = regularizer.state_dict()["thresholds"]["0.weight"]
    assert torch.equal(thresholds[:, :3], torch.zeros(5, 3))
    torch.testing.assert_close(thresholds[:, 3:], torch.full((5, 3), 0.05), check_dtype=False)


def test_the_parameters_hold_latent_weights_only_around_the_optimizers_step() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    regularizer = regularizer_of(net)
    for _ in range(2):
        step(net, optimizer, regularizer)
    state = regularizer.state_dict()
    latent, threshold = state["latent_weights"]["0.weight"], state["thresholds"]["0.weight"]
    sparse = net[0].weight.detach().clone()
    torch.testing.assert_close(sparse, oracle.prox(("l1",), latent, threshold))
    assert (sparse == 0).any()
    assert regularizer.sparsity() > 0
    optimizer.zero_grad()
    loss_of(net, batches(1)[0]).backward()
    regularizer.before_step(optimizer)
    assert torch.equal(net[0].weight, latent)
    regularizer.after_step(optimizer, skipped=True)
    assert torch.equal(net[0].weight, sparse)


def halve(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].weight.mul_(0.5)


def load(net: nn.Module) -> None:
    net.load_state_dict({name: value * 2 for name, value in net.state_dict().items()})


def halve_a_row(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].weight[1] *= 0.5


REPLACEMENTS: dict[str, Callable[[nn.Module], object]] = {
    "one row": halve_a_row,
    "in place": halve,
    "load_state_dict": load,
    "prune_small": lambda net: prune_small(net, 0.3),
}


@pytest.mark.parametrize("penalty", ["l1", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("replace", list(REPLACEMENTS))
def test_latent_weights_follow_replaced_weights(replace: str, penalty: Any) -> None:
    """With no further gradient and no further growth, the next step gives the weights that were put there."""
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = regularizer_of(net, penalty=penalty, schedule=Schedule(warmup=0, stop=2))
    for _ in range(2):
        step(net, optimizer, regularizer)
    before = {name: value.clone() for name, value in regularizer.state_dict()["latent_weights"].items()}
    untouched = net[0].weight.detach().clone()
    REPLACEMENTS[replace](net)
    replaced = {name: net.get_parameter(name).detach().clone() for name in WEIGHTS}
    assert not torch.equal(replaced["0.weight"], untouched)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    for name in WEIGHTS:
        torch.testing.assert_close(net.get_parameter(name).detach(), replaced[name])
        assert torch.equal(net.get_parameter(name) == 0, replaced[name] == 0)
    if replace in ("prune_small", "one row"):  # of weights that stay as they were, the latent weights stay too
        kept = replaced["0.weight"] == untouched
        if penalty == "group_lasso":  # and of groups that stay
            kept = kept.all(1, keepdim=True).expand_as(kept)
        assert kept.any() or (replace, penalty) == ("prune_small", "group_lasso")
        after = regularizer.state_dict()["latent_weights"]["0.weight"]
        assert torch.equal(after[kept], before["0.weight"][kept])


def test_a_state_that_was_saved_within_a_step_keeps_its_latent_weights() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    regularizer = regularizer_of(net)
    step(net, optimizer, regularizer)
    regularizer.before_step(optimizer)  # the parameters are the latent weights, no proximal map of these
    state = regularizer.state_dict()
    resumed = regularizer_of(net)
    resumed.load_state_dict(state)
    resumed.before_step(optimizer)
    assert torch.equal(net[0].weight, state["latent_weights"]["0.weight"])


def test_a_stop_keeps_the_thresholds_and_a_delay_makes_no_latent_weights() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = regularizer_of(net, schedule=Schedule(delay=2, warmup=0, stop=4))
    seen = []
    for _ in range(6):
        step(net, optimizer, regularizer)
        thresholds = regularizer.state_dict().get("thresholds", {})
        seen.append(float(thresholds["0.weight"].max()) if thresholds else None)
    assert seen[:2] == [None, None]
    assert seen[2:] == pytest.approx([0.01, 0.02, 0.02, 0.02])
    assert regularizer.sparsity() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_thresholds_of_16_bit_weights_grow_in_32(dtype: torch.dtype) -> None:
    """1e-6 a step would be lost in 16 bits once a threshold is at 0.01."""
    net = small_net(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = regularizer_of(net, strength=0.1)
    step(net, optimizer, regularizer)
    regularizer.strength = 1e-5
    for _ in range(5):
        step(net, optimizer, regularizer)
    [threshold] = regularizer.state_dict()["thresholds"]["0.weight"].unique().tolist()
    assert threshold == pytest.approx(0.010005, rel=1e-5)
    assert net[0].weight.dtype == dtype
