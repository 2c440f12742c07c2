"""Optimizers through the Trainer: each gives the weights of a loop in which the penalty is written out."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_gcsr import Gate, GradientCoherentRegularization

from .models import (
    THIS_STEP,
    ManualRegression,
    MemoryLogger,
    Regression,
    fit,
    gate_of,
    largest_difference,
    loader,
    mlp,
    momentum,
    same,
    sgd,
    steps_of,
    weights_of,
)

UPDATES = pytest.mark.parametrize("update", ["gradient", "proximal"])
VANISHING = dict.fromkeys(range(100), 0.0)
STRENGTH = 0.05

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum and dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, dampening=0.5),
    "SGD with Nesterov's momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True),
    "SGD of a tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.5, foreach=False),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "SGD with weight decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-3),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-3, amsgrad=True),
    "Adam of a tensor lr": lambda p: torch.optim.Adam(
        p, lr=torch.tensor(0.02), eps=1e-3, capturable=False, foreach=False
    ),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, eps=1e-3, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.02, eps=1e-3, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02, eps=1e-3),
    "RMSprop with momentum": lambda p: torch.optim.RMSprop(p, lr=0.02, eps=1e-3, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, eps=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, eps=1e-2),
}
MOMENTUM_FACTORS = {
    "SGD with momentum and dampening": 0.5 / 0.2,
    "SGD with Nesterov's momentum": 1 / 0.2,
    "SGD of a tensor lr": 1 / 0.5,
    "SGD, foreach": 1 / 0.1,
    "SGD, fused": 1 / 0.1,
    "RMSprop with momentum": 1 / 0.5,
}
"""How much farther than lr times itself a steady gradient moves a weight, where momentum is not an average."""


def regularization(update, **kwargs):
    return GradientCoherentRegularization(**({"strength": STRENGTH, "gate": None} | kwargs), update=update)


def soft_threshold(weight, size):
    return weight.sign() * (weight.abs() - size).clamp_min(0)


def written_out(make_optimizer, update, factor=1.0, epochs=2, gated=False, schedule=None):
    """The loop and the L1 penalty, number by number; ``gated``: only where it has the sign of the gradient."""
    net = mlp()
    optimizer = make_optimizer(net.parameters())
    scheduler = schedule(optimizer) if schedule else None
    group = optimizer.param_groups[0]
    decay = group["betas"][1] if "betas" in group else group.get("alpha", 0.999)
    steps, mean_squares = 0, [0.0, 0.0]
    for _ in range(epochs):
        for inputs, targets in loader():
            optimizer.zero_grad()
            nn.functional.mse_loss(net(inputs), targets).backward()
            weights = [net[0].weight, net[2].weight]
            gates = [((w.grad * w >= 0) | torch.tensor(not gated)).detach() for w in weights]
            steps += 1
            for i, weight in enumerate(weights):
                ema_weight = 1.0 if "lr_decay" in group else (1 - decay) / (1 - decay**steps)
                kept = mean_squares[i] * (1.0 if "lr_decay" in group else 1 - ema_weight)
                mean_squares[i] = kept + ema_weight * float(weight.grad.square().mean())
            if update == "gradient":
                for weight, gate in zip(weights, gates, strict=True):
                    weight.grad += STRENGTH * weight.detach().sign() * gate
            optimizer.step()
            if update == "proximal":
                with torch.no_grad():
                    for weight, gate, square in zip(weights, gates, mean_squares, strict=True):
                        rescaling = 1.0 if "dampening" in group else square**-0.5
                        size = float(group["lr"]) * STRENGTH * factor * rescaling
                        weight.copy_(torch.where(gate, soft_threshold(weight, size), weight))
            if scheduler:
                scheduler.step()
    return weights_of(net)


@UPDATES
@pytest.mark.parametrize("gated", [False, True], ids=["always", "where coherent"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_gives_the_weights_of_the_loop_written_out(tmp_path, optimizer, gated, update):
    if optimizer == "Adadelta" and update == "proximal":
        with pytest.raises(MisconfigurationException, match=r"Adadelta with update='proximal' is not supported"):
            fit(tmp_path, Regression(make_optimizer=OPTIMIZERS[optimizer]), regularization(update))
        return
    model = Regression(make_optimizer=OPTIMIZERS[optimizer])
    callback = regularization(update, **THIS_STEP | ({} if gated else {"gate": None}))
    fit(tmp_path, model, callback, max_epochs=2)
    assert steps_of(callback) == 8
    factor = MOMENTUM_FACTORS.get(optimizer, 1.0)
    expected = written_out(OPTIMIZERS[optimizer], update, factor, gated=gated)
    assert largest_difference(weights_of(model.net), expected) < 1e-5
    free = Regression(make_optimizer=OPTIMIZERS[optimizer])
    fit(tmp_path, free, max_epochs=2)
    assert largest_difference(weights_of(model.net), weights_of(free.net)) > 1e-3


# -- parameter groups ----------------------------------------------------------------------------------------------


class Groups(Regression):
    """Layers that learn at rates of their own, and a momentum of its own for the last."""

    def configure_optimizers(self):
        first, last = self.net[0], self.net[2]
        groups = [
            {"params": first.parameters(), "lr": 0.1},
            {"params": last.parameters(), "lr": 0.02, "momentum": 0.5},
        ]
        return torch.optim.SGD(groups, lr=1.0)


def test_each_group_is_shrunk_at_its_own_rate(tmp_path):
    model = Groups(factors=VANISHING)
    start = weights_of(model.net)
    fit(tmp_path, model, regularization("proximal"))
    for name, step in (("0.weight", 0.1), ("2.weight", 0.02 / (1 - 0.5))):
        expected = soft_threshold(start[name], 4 * step * STRENGTH)
        torch.testing.assert_close(weights_of(model.net)[name], expected, rtol=1e-5, atol=1e-7)


class Joining(Regression):
    """The first layer joins the optimizer in a group of its own before the third of four batches."""

    def configure_optimizers(self):
        return self.make_optimizer(self.net[2].parameters())

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters()), "lr": 0.3})


@UPDATES
def test_parameter_that_is_added_in_mid_run_is_regularized_at_the_rate_of_its_group(tmp_path, update):
    model, logger = Joining(factors=VANISHING), MemoryLogger()
    start = weights_of(model.net)
    callback = regularization(update, log_per_parameter=True)
    fit(tmp_path, model, callback, logger=logger)
    expected = {"0.weight": 2 * 0.3, "2.weight": 4 * 0.1}
    for name, rate in expected.items():
        moved = start[name] - weights_of(model.net)[name]
        torch.testing.assert_close(moved, rate * STRENGTH * start[name].sign(), rtol=1e-4, atol=1e-6)
    assert steps_of(callback) == 4
    assert logger.steps("gcsr/injected/net.0.weight") == [2, 3]


# -- schedules -----------------------------------------------------------------------------------------------------


class Scheduled(Regression):
    """A learning rate that changes with each step."""

    def __init__(self, schedule, **kwargs) -> None:
        super().__init__(**kwargs)
        self.schedule = schedule

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def falling(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5**step)


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=9, cycle_momentum=False)


def one_cycle_of_momentum(optimizer):
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=9)


@UPDATES
def test_each_step_shrinks_by_the_rate_of_that_step(tmp_path, update):
    """Rates of 0.1, 0.05, 0.025 and 0.0125."""
    model = Scheduled(falling, factors=VANISHING)
    start = weights_of(model.net)["0.weight"]
    fit(tmp_path, model, regularization(update))
    moved = start - model.net[0].weight.detach()
    torch.testing.assert_close(moved, 0.1875 * STRENGTH * start.sign(), rtol=1e-4, atol=1e-6)


@UPDATES
@pytest.mark.parametrize("schedule", [falling, one_cycle])
def test_schedule_gives_the_weights_of_the_loop_written_out(tmp_path, schedule, update):
    model = Scheduled(schedule)
    fit(tmp_path, model, regularization(update), max_epochs=2)
    expected = written_out(sgd, update, schedule=schedule)
    assert largest_difference(weights_of(model.net), expected) < 1e-5


def test_proximal_step_follows_a_cycled_momentum(tmp_path):
    """One cycle of SGD moves the momentum too; the factor of each step is that of its momentum."""
    model = Scheduled(one_cycle_of_momentum, make_optimizer=momentum, factors=VANISHING)
    start, seen = weights_of(model.net)["0.weight"], []
    model.on_before_optimizer_step = lambda optimizer: seen.append(dict(optimizer.param_groups[0]))
    fit(tmp_path, model, regularization("proximal", strength=0.01), max_epochs=2)
    assert len({group["momentum"] for group in seen}) > 3
    total = sum(group["lr"] / (1 - group["momentum"]) for group in seen) * 0.01
    expected = soft_threshold(start, total)
    torch.testing.assert_close(model.net[0].weight.detach(), expected, rtol=1e-4, atol=1e-6)


# -- steps and closures --------------------------------------------------------------------------------------------


class Twice(torch.optim.SGD):
    """Sharpness-aware: climbs along the gradient, evaluates the closure again there, and steps from where it was."""

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        climbs = [0.01 * p.grad.sign() for p in parameters]
        with torch.no_grad():
            for parameter, climb in zip(parameters, climbs, strict=True):
                parameter += climb
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for parameter, climb in zip(parameters, climbs, strict=True):
                parameter -= climb
        super().step()
        return loss


def twice(parameters):
    return Twice(parameters, lr=0.1)


class Penalized(Regression):
    """The penalty as a term of the loss."""

    def loss(self, batch):
        return super().loss(batch) + STRENGTH * (self.net[0].weight.abs().sum() + self.net[2].weight.abs().sum())


def test_optimizer_that_evaluates_its_closure_twice_has_the_penalty_in_both(tmp_path):
    penalized, model = Penalized(make_optimizer=twice), Regression(make_optimizer=twice)
    fit(tmp_path, penalized, max_epochs=2)
    callback = regularization("gradient")
    trainer = fit(tmp_path, model, callback, max_epochs=2)
    assert trainer.global_step == 8
    assert model.training_steps == 16
    assert largest_difference(weights_of(model), weights_of(penalized)) < 1e-6


def test_proximal_update_of_such_an_optimizer_shrinks_once_a_step(tmp_path):
    model = Regression(make_optimizer=twice, factors=VANISHING)
    start = weights_of(model.net)["0.weight"]
    fit(tmp_path, model, regularization("proximal"))
    expected = soft_threshold(start, 4 * 0.1 * STRENGTH)
    torch.testing.assert_close(model.net[0].weight.detach(), expected, rtol=1e-4, atol=1e-6)


class StepsWithClosure(ManualRegression):
    """Optimizes by hand, with a closure for each step."""

    def training_step(self, batch, batch_idx):
        self.training_steps += 1
        optimizer = self.optimizers()

        def closure():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@UPDATES
def test_step_with_a_closure_by_hand_equals_automatic_optimization(tmp_path, update):
    by_hand, automatic = StepsWithClosure(make_optimizer=momentum), Regression(make_optimizer=momentum)
    callback = regularization(update, gate=Gate("agreement"))
    fit(tmp_path, by_hand, callback, max_epochs=2)
    assert steps_of(callback) == 8
    fit(tmp_path, automatic, regularization(update, gate=Gate("agreement")), max_epochs=2)
    assert same(weights_of(by_hand), weights_of(automatic))


class ZeroesInPlace(Regression):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


@UPDATES
@pytest.mark.parametrize("coherence", ["agreement", "temporal"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_are_zeroed_in_place_give_the_same_weights(tmp_path, coherence, accumulate, update):
    """No penalty and no memory of the last step is left in a tensor that is used again."""
    results = []
    for model_class in (Regression, ZeroesInPlace):
        model, logger = model_class(make_optimizer=momentum), MemoryLogger()
        callback = regularization(update, gate=gate_of(coherence=coherence))
        fit(tmp_path, model, callback, logger=logger, max_epochs=2, accumulate_grad_batches=accumulate)
        results.append((weights_of(model), logger.values("gcsr/coherence"), logger.values("gcsr/injected")))
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert any(0 < share < 1 for share in results[0][2])
