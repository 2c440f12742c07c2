"""Modes of the Trainer, hooks of the module, and what one may do with a callback before and after a fit."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_gcsr import (
    CoherentRegularizer,
    CompressedCheckpoint,
    CompressionMonitor,
    Gate,
    GradientCoherentRegularization,
    GroupLasso,
    KeepZeros,
    Schedule,
)

from .loops import train_by_hand
from .models import (
    MemoryLogger,
    Regression,
    ValidatedRegression,
    fit,
    loader,
    make_trainer,
    mlp,
    momentum,
    same,
    samples,
    sgd,
    steps_of,
    weights_of,
)

UPDATES = pytest.mark.parametrize("update", ["gradient", "proximal"])
VANISHING = dict.fromkeys(range(100), 0.0)
ARGUMENTS = {"strength": 0.05, "gate": Gate("direction", scope="parameter", threshold=0.9)}


def regularization(update="gradient", **kwargs):
    return GradientCoherentRegularization(**({"strength": 0.05} | kwargs), update=update)


def by_hand(batches, update, accumulate=1, **kwargs):
    """The weights of a plain loop over these batches."""
    net = mlp()
    train_by_hand(net, batches, momentum, accumulate=accumulate, update=update, **(ARGUMENTS | kwargs))
    return weights_of(net)


# -- modes of the Trainer ------------------------------------------------------------------------------------------


BATCHES = list(loader(count=24))

MODES = {
    "overfit_batches": ({"overfit_batches": 2, "max_epochs": 3}, BATCHES[:2] * 3),
    "overfit_batches, a share": ({"overfit_batches": 0.5, "max_epochs": 2}, BATCHES[:3] * 2),
    "limit_train_batches, a share": ({"limit_train_batches": 0.5, "max_epochs": 2}, BATCHES[:3] * 2),
    "max_steps within an epoch": ({"max_steps": 8, "max_epochs": -1}, BATCHES + BATCHES[:2]),
    "val_check_interval, a share": ({"val_check_interval": 0.5, "max_epochs": 2}, BATCHES * 2),
    "val_check_interval across epochs": (
        {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": 2},
        BATCHES * 2,
    ),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 2}, BATCHES * 2),
    "no validation": ({"limit_val_batches": 0, "max_epochs": 2}, BATCHES * 2),
    "detect_anomaly": ({"detect_anomaly": True}, BATCHES),
    "profiler": ({"profiler": "simple"}, BATCHES),
    "inference_mode off": ({"inference_mode": False}, BATCHES),
    "deterministic": ({"deterministic": True}, BATCHES),
    "fast_dev_run": ({"fast_dev_run": 3}, BATCHES[:3]),
}


@UPDATES
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:You have turned on `Trainer\\(detect_anomaly=True\\)`")  # Lightning's advice
def test_every_mode_gives_the_weights_of_a_plain_loop_over_its_batches(tmp_path, mode, update):
    arguments, batches = MODES[mode]
    deterministic = torch.are_deterministic_algorithms_enabled()
    model, callback = ValidatedRegression(make_optimizer=momentum), regularization(update, **ARGUMENTS)
    trainer = make_trainer(tmp_path, [callback, CompressionMonitor()], **arguments)
    try:
        trainer.fit(model, loader(count=24), loader(count=8, seed=1))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert steps_of(callback) == trainer.global_step == len(batches)
    assert same(weights_of(model.net), by_hand(batches, update))


@UPDATES
@pytest.mark.parametrize(("max_steps", "batches"), [(2, 4), (4, 8), (5, 10)])
def test_max_steps_counts_windows(tmp_path, max_steps, batches, update):
    """With six batches in windows of two; the batches of a next window are not trained."""
    model, callback = Regression(make_optimizer=momentum), regularization(update, **ARGUMENTS)
    arguments = {"max_steps": max_steps, "max_epochs": -1, "accumulate_grad_batches": 2}
    trainer = fit(tmp_path, model, callback, loader(count=24), **arguments)
    assert model.training_steps == batches
    assert steps_of(callback) == trainer.global_step == max_steps
    assert same(weights_of(model.net), by_hand((BATCHES * 2)[:batches], update, accumulate=2))


class StopAt(Callback):
    def __init__(self, batch) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == self.batch


@UPDATES
def test_fit_that_was_stopped_within_a_window_starts_the_next_one_afresh(tmp_path, update):
    """Nothing of the half window reaches the next fit: its gradients are zeroed, and no shrinkage is pending."""
    model = Regression(make_optimizer=sgd)
    callback = regularization(update, **ARGUMENTS)
    fit(tmp_path, model, [callback, StopAt(2)], loader(count=24), accumulate_grad_batches=2)
    assert model.training_steps == 3
    assert steps_of(callback) == 1
    assert any(parameter.grad is not None for parameter in model.parameters())
    fit(tmp_path, model, callback, loader(count=24), accumulate_grad_batches=2)

    net = mlp()
    train_by_hand(net, BATCHES[:2], accumulate=2, update=update, **ARGUMENTS)
    train_by_hand(net, BATCHES, accumulate=2, update=update, **ARGUMENTS)
    assert same(weights_of(model.net), weights_of(net))


class Reloading(Regression):
    """Other samples in each epoch."""

    def train_dataloader(self):
        first = 8 * self.trainer.current_epoch
        return DataLoader(Subset(samples(24), range(first, first + 8)), batch_size=4)


@UPDATES
def test_reloaded_batches_give_the_weights_of_a_plain_loop(tmp_path, update):
    model, callback = Reloading(make_optimizer=momentum), regularization(update, **ARGUMENTS)
    trainer = make_trainer(tmp_path, [callback], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(model)
    assert steps_of(callback) == 6
    assert same(weights_of(model.net), by_hand(BATCHES, update))


@UPDATES
def test_validation_and_prediction_after_a_fit_change_nothing(tmp_path, update):
    class Predicting(ValidatedRegression):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    model, callback = Predicting(make_optimizer=momentum), regularization(update, **ARGUMENTS)
    trainer = make_trainer(tmp_path, [callback, CompressionMonitor()])
    trainer.fit(model, loader(count=24), loader(count=8))
    end, state = weights_of(model), callback.state_dict()
    trainer.validate(model, loader(count=8), verbose=False)
    trainer.test(model, loader(count=8), verbose=False)
    predictions = torch.cat(trainer.predict(model, loader(count=24)))
    assert torch.equal(predictions, model.net(samples(24).tensors[0]).detach())
    assert same(weights_of(model), end)
    assert callback.state_dict() == state

    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(count=24), loader(count=8))
    assert steps_of(callback) == 12


# -- hooks of the module -------------------------------------------------------------------------------------------


class ClipsItself(Regression):
    """Clips by itself, in the hook that Lightning has for it."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.02, gradient_clip_algorithm="value")


@UPDATES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_by_the_module_clips_the_penalty_too(tmp_path, accumulate, update):
    model = ClipsItself(make_optimizer=momentum)
    fit(tmp_path, model, regularization(update, **ARGUMENTS), loader(count=24), accumulate_grad_batches=accumulate)
    expected = by_hand(BATCHES, update, accumulate, clip_value=0.02)
    assert same(weights_of(model.net), expected)
    assert not same(weights_of(model.net), by_hand(BATCHES, update, accumulate))


class Edits(Regression):
    """Changes its gradients in one of its hooks, and keeps what it found there."""

    def __init__(self, hook, factor, **kwargs) -> None:
        super().__init__(**kwargs)
        self.found = []

        def edit(*_):
            gradient = self.net[0].weight.grad
            self.found.append(gradient.clone())
            gradient.mul_(factor)

        setattr(self, hook, edit)


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_hooks_of_the_module_see_the_penalty_and_may_change_it(tmp_path, hook):
    """Lightning calls callbacks before the module: a module that doubles its gradients doubles the penalty."""
    model = Edits(hook, 2.0, factors=VANISHING)
    start = weights_of(model.net)["0.weight"]
    fit(tmp_path, model, regularization(gate=None))
    torch.testing.assert_close(model.found[0], 0.05 * start.sign())
    moved = start - model.net[0].weight.detach()
    torch.testing.assert_close(moved, 4 * 2 * 0.1 * 0.05 * start.sign(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_proximal_step_is_beyond_the_reach_of_such_hooks(tmp_path, hook):
    """The module finds the gradient of the loss alone, and the shrinkage does not change with it."""
    model = Edits(hook, 0.0)
    start = weights_of(model.net)["0.weight"]
    fit(tmp_path, model, regularization("proximal", gate=None))
    net = mlp()
    nn.functional.mse_loss(net(BATCHES[0][0]), BATCHES[0][1]).backward()
    assert torch.equal(model.found[0], net[0].weight.grad)
    expected = start.sign() * (start.abs() - 4 * 0.1 * 0.05).clamp_min(0)
    torch.testing.assert_close(model.net[0].weight.detach(), expected, rtol=1e-4, atol=1e-6)


@UPDATES
@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_decision_is_taken_before_the_module_edits(tmp_path, hook, update):
    """Gradients that the module turns around afterwards are not what coherence is measured of."""
    logs = []
    for factor in (1.0, -1.0):
        logger, model = MemoryLogger(), Edits(hook, factor)
        callback = regularization(update, gate=Gate(scope="model", threshold=0.0), log_per_parameter=True)
        fit(tmp_path, model, callback, logger=logger, max_steps=1)
        logs.append((logger.values("gcsr/coherence/net.0.weight"), logger.values("gcsr/injected")))
    assert logs[0] == logs[1]
    assert abs(logs[0][0][0]) > 1e-3


def test_tensor_hook_of_a_parameter_comes_before_the_decision(tmp_path):
    """What autograd does is done when the backward ends: such a hook changes the loss gradient that is measured."""
    coherences = []
    for factor in (1.0, -1.0):
        logger, net = MemoryLogger(), mlp()
        net[0].weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        callback = regularization(log_per_parameter=True)
        fit(tmp_path, Regression(net), callback, logger=logger, max_steps=1)
        coherences += logger.values("gcsr/coherence/net.0.weight")
    assert coherences[1] == pytest.approx(-coherences[0])
    assert abs(coherences[0]) > 1e-3


class EditsBefore(Callback):
    """A callback that changes gradients."""

    def on_after_backward(self, trainer, pl_module):
        pl_module.net[0].weight.grad.zero_()


@pytest.mark.parametrize("first", [True, False])
def test_of_two_callbacks_the_first_in_the_list_acts_first(tmp_path, first):
    logger, model = MemoryLogger(), Regression()
    start = weights_of(model.net)["0.weight"]
    callback = regularization(gate=None, log_per_parameter=True)
    callbacks = [EditsBefore(), callback] if first else [callback, EditsBefore()]
    fit(tmp_path, model, callbacks, logger=logger)
    moved = start - model.net[0].weight.detach()
    expected = 4 * 0.1 * 0.05 * start.sign() if first else torch.zeros_like(start)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


class ReturnsDict(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "extra": batch[0].detach()}


@UPDATES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_step_that_returns_a_dict(tmp_path, accumulate, update):
    model = ReturnsDict(make_optimizer=momentum)
    fit(tmp_path, model, regularization(update, **ARGUMENTS), loader(count=24), accumulate_grad_batches=accumulate)
    assert same(weights_of(model.net), by_hand(BATCHES, update, accumulate))


# -- the callback as an object -------------------------------------------------------------------------------------


def copies():
    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda callback: pickle.loads(pickle.dumps(callback)),
    }


@UPDATES
@pytest.mark.parametrize("how", copies())
@pytest.mark.parametrize("when", ["before", "after"])
def test_copy_of_a_callback_trains_as_the_original(tmp_path, how, when, update):
    arguments = {"penalty": GroupLasso(), "strength": {"net.0": 0.05, ".": 0.02}, "schedule": Schedule(delay=2)}
    original = regularization(update, **arguments)
    if when == "after":
        fit(tmp_path, Regression(make_optimizer=momentum), original)
    before = original.state_dict()
    copied = copies()[how](original)
    model, second = Regression(make_optimizer=momentum), Regression(make_optimizer=momentum)
    fit(tmp_path, model, copied, max_epochs=2)
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)
    fit(tmp_path, second, regularization(update, **arguments), max_epochs=2)
    assert same(weights_of(model), weights_of(second))
    assert steps_of(copied) == 8


@UPDATES
@pytest.mark.parametrize("how", copies())
def test_regularizer_that_is_copied_with_its_module_regularizes_the_copy(how, update):
    """As one copies a whole training state; the copy goes on as the original does."""
    net = mlp()
    optimizer = sgd(net.parameters())
    regularizer = CoherentRegularizer(net, strength=0.05, gate=Gate("temporal", scope="model"), update=update)

    def train(net, optimizer, regularizer):
        for inputs, targets in loader():
            optimizer.zero_grad()
            nn.functional.mse_loss(net(inputs), targets).backward()
            report = regularizer.before_step(optimizer)
            optimizer.step()
            regularizer.after_step(optimizer)
        return report

    train(net, optimizer, regularizer)
    twin, twin_optimizer, twin_regularizer = copies()[how]((net, optimizer, regularizer))
    report = train(net, optimizer, regularizer)
    twin_report = train(twin, twin_optimizer, twin_regularizer)
    assert twin_report.names == report.names == ("0.weight", "2.weight")
    assert twin_regularizer.state_dict() == regularizer.state_dict()
    assert same(weights_of(twin), weights_of(net))


@UPDATES
def test_one_callback_for_several_models(tmp_path, update):
    """Each fit is that of a fresh callback, whatever was trained before with other names and shapes."""
    callback = regularization(update, gate=Gate("temporal", scope="model"), schedule=Schedule(delay=2))
    nets = [
        lambda: mlp(),
        lambda: mlp(seed=1, hidden=5),
        lambda: nn.Sequential(nn.Flatten(), mlp(seed=2, hidden=3)),
        lambda: mlp(),
    ]
    for make in nets:
        results = []
        for used in (
            callback,
            regularization(update, gate=Gate("temporal", scope="model"), schedule=Schedule(delay=2)),
        ):
            model, logger = Regression(make()), MemoryLogger()
            fit(tmp_path, model, used, logger=logger, max_epochs=2)
            assert steps_of(used) == 8
            results.append((weights_of(model), logger.values("gcsr/coherence"), used.state_dict()))
        assert same(results[0][0], results[1][0])
        assert results[0][1:] == results[1][1:]


class StaysHere(Regression):
    """A module that cannot be pickled."""

    def __reduce__(self):
        raise TypeError("the module was pickled")


@pytest.mark.parametrize("update", ["proximal", "dual_averaging"])
def test_callbacks_are_pickled_without_module_and_optimizer(tmp_path, update):
    """As those libraries do that keep their callbacks in saved models; what was learned of the weights goes along."""
    ours = GradientCoherentRegularization(strength=0.05, update=update)
    callbacks = [ours, KeepZeros(start=2), CompressionMonitor(verbose=False), CompressedCheckpoint(tmp_path)]
    model = StaysHere(mlp(hidden=1000), make_optimizer=momentum)
    fit(tmp_path, model, callbacks)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pickled = pickle.dumps(callbacks)
    assert len(pickled) < {"proximal": 2, "dual_averaging": 4}[update] * weights  # no second copy of the weights
    copied = pickle.loads(pickled)
    assert repr(copied[0]) == repr(ours)
    assert copied[0].regularizer is None
    fit(tmp_path, Regression(make_optimizer=momentum), copied[:3])
    assert steps_of(copied[0]) == 4
