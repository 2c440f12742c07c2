"""The controller of the sparsity: the curve it follows, when it acts, how far it goes, and that it arrives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from reference.training import batches, loss_of, small_net
from torch import nn

from lightning_gcsr import (
    L1,
    L2,
    Clock,
    CoherentRegularizer,
    ElasticNet,
    Gate,
    GroupLasso,
    Schedule,
    SparsityController,
)
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.sparsity_controller import GAIN, WeightCounts, check_target_sparsity


@pytest.mark.parametrize("target", [0.3, 0.9, 0.999])
def test_the_wanted_sparsity_rises_from_zero_to_the_target_at_eight_tenths(target: float) -> None:
    controller = SparsityController(target)
    wanted = [controller.wanted(step / 1000) for step in range(1001)]
    assert wanted[0] == 0.0
    assert wanted == sorted(wanted)
    assert wanted[799] < target
    assert wanted[800:] == pytest.approx([target] * 201)
    for phase in (0.1, 0.5):  # the logarithm of the remaining weights falls along a curve
        height = (1 - (1 - phase / 0.8) ** 2) * min(1, phase / 0.3)
        assert math.log(1 - controller.wanted(phase)) == pytest.approx(height * math.log(1 - target))


def due_steps(total: int) -> list[int]:
    controller, due = SparsityController(0.9), []
    for step in range(total):
        if controller.due(step / total):
            due.append(step)
            controller.steps, controller.phase = 0, step / total
    return due


def test_it_acts_every_fourth_step_or_two_hundred_times() -> None:
    assert due_steps(4000) == list(range(3, 4000, 4))
    assert set(np.diff(due_steps(400))) <= {2, 3}  # 1/200 of the training, but for rounding
    assert set(np.diff(due_steps(100))) == {1}


def counted(zeros: int, near: int, weights: int = 1000) -> Any:
    """As many within a reach of 0.01; the weights lie evenly."""
    return lambda reach: WeightCounts(weights, zeros, weights - zeros, near=round(near * abs(reach) / 0.01))


def test_it_grows_by_half_the_part_of_the_reach_that_gives_the_zeros_wanted() -> None:
    controller = SparsityController(0.5, reach=0.01, phase=0.99, steps=4)
    controller.adapt(1.0, counted(zeros=400, near=200))  # 100 of 200 are missing
    assert controller.growth == pytest.approx(0.5 * 0.01 * 0.5 / 4)
    controller.steps = 4
    controller.adapt(1.0, counted(zeros=600, near=200))  # 100 too many
    assert controller.growth == pytest.approx(-0.5 * 0.01 * 0.5 / 4)
    controller.adapt(1.0, counted(zeros=500, near=200))
    assert controller.growth == 0.0


def test_the_reach_is_made_to_fit_the_zeros_that_are_missing() -> None:
    magnitudes = np.sort(np.abs(np.random.default_rng(0).normal(size=1000)))

    def count(reach: float) -> WeightCounts:
        return WeightCounts(1000, zeros=0, movable=1000, near=int((magnitudes < reach).sum()))

    for start in (1e-6, 1e3):
        controller = SparsityController(0.9, reach=start, phase=0.5)
        for _ in range(3):
            controller.adapt(0.5, count)
        need = controller.wanted(0.5) * 1000
        assert 0.5 * need <= count(controller.reach).near


def test_units_that_lie_close_together_become_zero_one_after_the_other() -> None:
    distances, threshold, most = 1 + 0.001 * np.arange(20), 0.0, 0
    controller = SparsityController(0.5, reach=1.0, phase=0.9)

    def count(reach: float) -> WeightCounts:
        low, high = sorted((threshold, threshold + reach))
        zeros, near = int((distances <= threshold).sum()), int(((distances > low) & (distances <= high)).sum())
        return WeightCounts(20, zeros, 20 - zeros, near)

    for _ in range(100):
        controller.steps = 1
        controller.adapt(0.9, count)
        threshold += controller.growth
        most = max(most, count(0.0).zeros)
    assert (count(0.0).zeros, most) == (10, 10)


def test_the_tolerance_grows_while_most_open_weights_would_have_to_go() -> None:
    controller = SparsityController(0.9, phase=0.9)
    before = controller.tolerance
    controller.adapt(0.9, counted(zeros=0, near=500))
    assert controller.tolerance == pytest.approx(1.2 * before)
    for _ in range(10):
        controller.adapt(0.9, counted(zeros=900, near=10))
    assert controller.tolerance == before


def test_while_all_gates_are_closed_the_tolerance_grows_and_not_the_thresholds() -> None:
    # The growth would act on all gates that open together before the next count.
    controller = SparsityController(0.5, phase=0.5)
    before = controller.tolerance
    for _ in range(10):
        controller.adapt(0.5, lambda reach: WeightCounts(8, zeros=0, movable=0, near=0))
        assert (controller.growth, controller.gain) == (0, GAIN)
    assert controller.tolerance > 10 * before


def test_one_that_takes_over_the_state_goes_on_as_the_first_one() -> None:
    first, second = SparsityController(0.9), SparsityController(0.9, reach=5.0)
    first.adapt(0.3, counted(zeros=100, near=300))
    first.due(0.31)
    state = first.state_dict()
    assert {type(value) for value in state.values()} <= {int, float, bool}
    second.load_state_dict(state)
    for controller in (first, second):
        controller.adapt(0.4, counted(zeros=200, near=250))
    assert first == second
    assert state["steps"] == 1


def trained(target: float, steps: int, optimizer: Any, resume_at: int | None = None) -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    stepping = optimizer(net)
    regularizer = CoherentRegularizer(net, target_sparsity=target)
    inputs = torch.randn(64, 20, generator=generator)
    targets = inputs[:, :5] * inputs[:, 5:10]
    for step in range(steps):
        if step == resume_at:
            state = regularizer.state_dict()
            regularizer = CoherentRegularizer(net, target_sparsity=target)
            regularizer.load_state_dict(state)
        stepping.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        regularizer.before_step(stepping, clock=Clock(step, step / steps), report=False)
        stepping.step()
        regularizer.after_step(stepping)
    return net, regularizer


OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=3e-3),
}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("target", [0.5, 0.95])
def test_training_arrives_at_the_target_and_resumes(target: float, optimizer: str) -> None:
    net, regularizer = trained(target, 240, OPTIMIZERS[optimizer])
    assert regularizer.sparsity() == pytest.approx(target, abs=0.02)
    resumed, _ = trained(target, 240, OPTIMIZERS[optimizer], resume_at=101)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))


def test_a_first_gradient_that_is_not_finite_is_passed_over() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, target_sparsity=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    regularizer.before_step(optimizer, clock=Clock(0, 0.0))
    regularizer.after_step(optimizer, skipped=True)
    assert int(regularizer.nonfinite_steps) == 1
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_a_skipped_step_neither_grows_nor_counts() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, target_sparsity=0.9, gate=Gate())
    for step, batch in enumerate(batches(8)):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        regularizer.before_step(optimizer, clock=Clock(step, step / 8))
        before = regularizer.controller.state_dict()
        if step == 5:
            regularizer.after_step(optimizer, skipped=True)
            assert regularizer.controller.state_dict() == before
        else:
            optimizer.step()
            regularizer.after_step(optimizer)
            assert regularizer.controller.state_dict() != before


@pytest.mark.parametrize("scope", ["element", "parameter"])
def test_weights_get_no_penalty_while_no_threshold_grows(scope: Any) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, target_sparsity=0.5, gate=Gate(scope=scope))
    assert regularizer.controller is not None
    loss_of(net, next(iter(batches(1)))).backward()
    for growth in (1e-3, 0.0, -1e-3):
        regularizer.controller.growth = growth
        report = regularizer.before_step(optimizer, clock=Clock(0, 0.5))
        regularizer.after_step(optimizer, skipped=True)
        assert (float(report.injected) > 0) is (growth > 0)


def test_a_second_optimizer_of_the_weights_is_refused_and_one_made_anew_is_not() -> None:
    net = small_net()
    weights = {name: weight for name, weight in net.named_parameters() if weight.dim() > 1}
    first, *others = weights.values()
    regularizer = CoherentRegularizer(net, target_sparsity=0.9)
    loss_of(net, next(iter(batches(1)))).backward()
    for made_anew in (torch.optim.SGD([first], lr=0.1), torch.optim.SGD([*others, first], lr=0.1)):
        regularizer.before_step(made_anew, clock=Clock(0, 0.0))
        regularizer.after_step(made_anew, skipped=True)
    with pytest.raises(ValueError, match="needs one optimizer that steps all of the weights, and this one does not"):
        regularizer.before_step(torch.optim.SGD(others[:1], lr=0.1), clock=Clock(0, 0.0))


FRACTION = r"It is a fraction of the weights; 0\.9 leaves one in ten\."


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (0, ValueError, rf"`target_sparsity` must lie between 0 and 1, got target_sparsity=0\. {FRACTION}"),
        (1.0, ValueError, r"`target_sparsity` must lie between 0 and 1, got target_sparsity=1\.0"),
        (90, ValueError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=90"),
        (math.nan, ValueError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=nan"),
        ("0.9", TypeError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity='0\.9'"),
        (True, TypeError, r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=True"),
    ],
    ids=str,
)
def test_a_target_that_is_no_fraction_is_refused(target: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_target_sparsity(target, L1(), "dual_averaging")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"update": "proximal"},
            ValueError,
            r"`target_sparsity` must be None where update='proximal'.*'dual_averaging'",
        ),
        ({"penalty": L2()}, ValueError, r"must be None with L2\(\), which makes no weight exactly zero.*Use 'l1'"),
        ({"penalty": ElasticNet(0)}, ValueError, r"must be None with ElasticNet\(l1_ratio=0\)"),
        ({"strength": 0.1}, ValueError, r"`strength` must be None where target_sparsity is given, got strength=0\.1"),
        (
            {"schedule": Schedule(warmup=3)},
            ValueError,
            r"`warmup` must be 0 where target_sparsity is given, got warmup=3",
        ),
        (
            {"gate": Gate(tolerance=0.3)},
            ValueError,
            r"`tolerance` must be 0 or the default 0\.1 where target_sparsity is given.*Leave it out",
        ),
        ({"target_sparsity": None}, TypeError, r"`strength` must be given, got strength=None\. `find_strength` finds"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_target_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CoherentRegularizer(small_net(), **({"target_sparsity": 0.9} | arguments))


@pytest.mark.parametrize("penalty", [L1(), ElasticNet(0.01), GroupLasso(1)], ids=repr)
def test_penalties_that_make_zeros_can_arrive_at_any_fraction(penalty: Penalty) -> None:
    for target in (1e-6, 0.999, np.float32(0.25)):
        check_target_sparsity(target, penalty, "dual_averaging")


@pytest.mark.parametrize("stuck", ["a padding row", "a tensor whose gradients are zero"])
def test_weights_that_no_threshold_can_turn_do_not_drive_the_reach(stuck: str) -> None:
    """Slow progress, so that there are too many zeros from the start."""
    embedding = nn.Embedding(60, 8, padding_idx=0 if stuck == "a padding row" else None)
    net = nn.ModuleDict({"embedding": embedding, "head": nn.Linear(8, 4), "idle": nn.Linear(8, 4)})
    tokens = torch.randint(1, 60, (64, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    regularizer = CoherentRegularizer(net, target_sparsity=0.8, exclude=None if "tensor" in stuck else ["idle"])
    for step in range(150):
        optimizer.zero_grad()
        hidden = net["embedding"](tokens).mean(1)
        loss = nn.functional.cross_entropy(net["head"](hidden), tokens[:, 0] % 4)
        (loss + 0 * net["idle"](hidden).sum()).backward()
        regularizer.before_step(optimizer, clock=Clock(step, step / (20_000 if "row" in stuck else 150)), report=False)
        optimizer.step()
        regularizer.after_step(optimizer)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert regularizer.controller is not None
    assert regularizer.controller.reach < 1


class L1WithGroups(L1):
    """A penalty of a user's own, whose attribute has nothing to do with coupled groups."""

    groups = (1, 2)


def test_a_penalty_of_a_users_own_may_have_groups() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, L1WithGroups(), target_sparsity=0.5)
    for number in range(60):
        optimizer.zero_grad()
        loss_of(net, batches(1)[0]).backward()
        regularizer.before_step(optimizer, clock=Clock(number, number / 60))
        optimizer.step()
        regularizer.after_step(optimizer)
    assert regularizer.sparsity() == pytest.approx(0.5, abs=0.02)


def test_a_target_without_progress_is_refused_and_nothing_changes() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss_of(net, batches(1)[0]).backward()
    regularizer = CoherentRegularizer(net, target_sparsity=0.5, schedule=Schedule(warmup=0))
    before = regularizer.state_dict()
    with pytest.raises(
        ValueError, match=r"`target_sparsity` needs to know how far .* schedule=Schedule\(stop=10_000\)"
    ):
        regularizer.before_step(optimizer)
    after = regularizer.state_dict()
    assert after == before
    # The way out of the message.
    CoherentRegularizer(net, target_sparsity=0.5, schedule=Schedule(warmup=0, stop=10)).before_step(optimizer)
