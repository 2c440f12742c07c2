"""Lightning's own callbacks beside ours: each does its work, and ours decides once for each optimizer step."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_gcsr import CompressionMonitor, Gate, GradientCoherentRegularization, Schedule

from .loops import train_by_hand
from .models import (
    THIS_STEP,
    MemoryLogger,
    Regression,
    ResumableLoader,
    Snapshots,
    ValidatedRegression,
    fit,
    largest_difference,
    loader,
    make_trainer,
    mlp,
    momentum,
    same,
    samples,
    steps_of,
    weights_of,
)

VANISHING = dict.fromkeys(range(100), 0.0)
UPDATES = pytest.mark.parametrize("update", ["gradient", "proximal"])


def regularization(**kwargs):
    return GradientCoherentRegularization(**({"strength": 0.05} | kwargs))


# -- accumulation that changes between epochs ----------------------------------------------------------------------


@UPDATES
def test_scheduled_windows_count_the_penalty_once_a_step(tmp_path, update):
    """Two epochs of six batches a step each, then two of windows of three; with a vanishing loss, lr·λ a step."""
    model = Regression(factors=VANISHING)
    start, logger = weights_of(model)["net.0.weight"], MemoryLogger()
    callback = regularization(strength=0.01, gate=None, update=update)
    scheduler = GradientAccumulationScheduler({0: 1, 2: 3})
    trainer = fit(tmp_path, model, [callback, scheduler], loader(count=24), max_epochs=4, logger=logger)
    assert steps_of(callback) == trainer.global_step == 6 + 6 + 2 + 2
    assert logger.steps("gcsr/injected") == list(range(16))
    torch.testing.assert_close(
        start - model.net[0].weight.detach(), 16 * 0.1 * 0.01 * start.sign(), rtol=1e-4, atol=1e-7
    )


@UPDATES
def test_scheduled_windows_give_the_weights_of_a_plain_loop(tmp_path, update):
    arguments = {"strength": 0.05, "update": update, "gate": Gate("direction", scope="parameter", threshold=0.9)}
    model = Regression(make_optimizer=momentum)
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})
    fit(tmp_path, model, [scheduler, GradientCoherentRegularization(**arguments)], loader(count=24), max_epochs=2)

    net, large = mlp(), []
    batches = list(loader(count=24))
    for window in (batches[:3], batches[3:]):
        large.append([torch.cat(parts) for parts in zip(*window, strict=True)])
    train_by_hand(net, [*batches, *large], momentum, **arguments)
    assert largest_difference(weights_of(model.net), weights_of(net)) < 1e-6


# -- averaged weights ----------------------------------------------------------------------------------------------


class Rates(Callback):
    """Keeps the learning rate with which each batch was trained."""

    def __init__(self) -> None:
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


class CountHooks(Callback):
    """How many step-post hooks the optimizer has at each batch."""

    def __init__(self) -> None:
        self.counts = []

    def on_train_batch_end(self, trainer, *_):
        self.counts.append(len(trainer.optimizers[0]._optimizer_step_post_hooks))


def averaging(**kwargs):
    return StochasticWeightAveraging(**({"swa_lrs": 0.02, "swa_epoch_start": 2, "annealing_epochs": 1} | kwargs))


@UPDATES
@pytest.mark.parametrize("ours_first", [True, False])
def test_stochastic_weight_averaging_averages_the_regularized_weights(tmp_path, update, ours_first):
    """Its learning rate is the one of the proximal step, and the penalty counts once a step."""
    model = Regression(factors=VANISHING)
    start, rates, counter, snapshots = weights_of(model)["net.0.weight"], Rates(), CountHooks(), Snapshots()
    callback = regularization(strength=0.01, gate=None, update=update)
    callbacks = [callback, averaging()] if ours_first else [averaging(), callback]
    trainer = fit(tmp_path, model, [*callbacks, rates, counter, snapshots], max_epochs=4)

    assert steps_of(callback) == trainer.global_step == len(rates.rates) == 16
    assert rates.rates[:4] == [0.1] * 4
    assert rates.rates[-1] == pytest.approx(0.02)
    assert counter.counts == [1 if update == "proximal" else 0] * 16
    moved = start - snapshots.weights[-1]["net.0.weight"]
    torch.testing.assert_close(moved, sum(rates.rates) * 0.01 * start.sign(), rtol=1e-4, atol=1e-7)

    # Averaged are the weights at the starts of the second, third and fourth epoch.
    for name, weight in weights_of(model).items():
        average = torch.stack([snapshots.weights[i][name] for i in (3, 7, 11)]).mean(0)
        torch.testing.assert_close(weight, average, rtol=1e-5, atol=1e-7)


def normalized():
    """A network with a batch norm, for which Lightning passes over the data once more after the last epoch."""
    net = mlp()
    return nn.Sequential(net[0], nn.BatchNorm1d(8), net[1], net[2])


class Gradients(Callback):
    """Keeps the gradient of the first weight as it is after each batch."""

    def __init__(self) -> None:
        self.gradients = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.gradients.append(pl_module.net[0].weight.grad.clone())


@UPDATES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_pass_for_the_batch_norm_is_not_regularized(tmp_path, update, accumulate):
    """Lightning (2.6) makes a step at its end, with the gradients that the last real step left behind.

    These have had their penalty.
    """
    snapshots, gradients, rates, logger = Snapshots(), Gradients(), Rates(), MemoryLogger()
    model, callback = Regression(normalized()), regularization(gate=None, update=update)
    callbacks = [callback, averaging(), snapshots, gradients, rates]
    fit(tmp_path, model, callbacks, max_epochs=3, logger=logger, accumulate_grad_batches=accumulate)
    assert model.training_steps == 16  # three epochs and the pass

    averaged = torch.stack([snapshots.weights[i]["net.0.weight"] for i in (3, 7)]).mean(0)
    torch.testing.assert_close(snapshots.weights[12]["net.0.weight"], averaged, rtol=1e-5, atol=1e-7)
    assert torch.equal(gradients.gradients[15], gradients.gradients[11])
    expected = averaged - sum(rates.rates[12 // accumulate :]) * gradients.gradients[11]
    torch.testing.assert_close(model.net[0].weight.detach(), expected, rtol=1e-5, atol=1e-7)
    assert steps_of(callback) == 12 // accumulate
    assert logger.steps("gcsr/injected") == list(range(12 // accumulate))


@UPDATES
@pytest.mark.parametrize("ours_first", [True, False])
def test_moving_average_follows_the_regularized_weights(tmp_path, update, ours_first):
    model, snapshots = ValidatedRegression(), Snapshots()
    start = weights_of(model)
    callback, ema = regularization(update=update, **THIS_STEP), EMAWeightAveraging(decay=0.8)
    callbacks = [callback, ema] if ours_first else [ema, callback]
    trainer = make_trainer(tmp_path, [*callbacks, snapshots], max_epochs=2)
    trainer.fit(model, loader(), loader(count=8))

    assert steps_of(callback) == 8
    # The current weights are those of a run without averaging, in spite of the exchange for validation.
    net = mlp()
    train_by_hand(net, [*loader(), *loader()], strength=0.05, update=update)
    assert same(weights_of(net), {name.removeprefix("net."): w for name, w in snapshots.weights[-1].items()})

    for name in start:
        # torch starts the average with the first weights it is shown.
        average = snapshots.weights[0][name]
        for weights in snapshots.weights[1:]:
            average = 0.8 * average + 0.2 * weights[name]
        torch.testing.assert_close(weights_of(model)[name], average, rtol=1e-5, atol=1e-7)


def test_weights_that_die_vanish_from_the_average(tmp_path):
    """A weight that has long been zero is all but zero in the average, too, though not exactly."""
    model, snapshots = Regression(), Snapshots()
    callback = regularization(strength=0.2, update="proximal")
    fit(tmp_path, model, [callback, EMAWeightAveraging(decay=0.5), snapshots], max_epochs=12)
    last = [weights["net.0.weight"] for weights in snapshots.weights[-24:]]
    dead = torch.stack([weight == 0 for weight in last]).all(0)
    assert dead.any()
    assert float(model.net[0].weight.detach()[dead].abs().max()) < 1e-6
    assert float(model.net[0].weight.detach().abs().max()) > 0.05


class EveryEpoch(WeightAveraging):
    """Averages once an epoch, from the second epoch on."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None and epoch_idx >= 1


def test_average_of_epochs_is_that_of_the_regularized_weights(tmp_path):
    model, snapshots = Regression(), Snapshots()
    fit(tmp_path, model, [regularization(update="proximal"), EveryEpoch(), snapshots], max_epochs=4)
    for name, weight in weights_of(model).items():
        average = torch.stack([snapshots.weights[i][name] for i in (7, 11, 15)]).mean(0)
        torch.testing.assert_close(weight, average, rtol=1e-5, atol=1e-7)


def resumable():
    return ResumableLoader(samples(16), batch_size=4)


@UPDATES
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("step", [6, 8], ids=["within an epoch", "at the end of an epoch"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # that of the first run
def test_resume_with_a_moving_average(tmp_path, update, ours_first, step):
    """Ours goes on from the current weights and its own counts, and the average from the average."""

    def callbacks():
        ours = regularization(gate=None, schedule=Schedule(delay=3, warmup=7), update=update)
        ema = EMAWeightAveraging(decay=0.8)
        return ours, [ours, ema] if ours_first else [ema, ours]

    whole_model, (whole, both) = Regression(make_optimizer=momentum), callbacks()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step // 2, save_top_k=-1)
    whole_snapshots = Snapshots()
    fit(
        tmp_path,
        whole_model,
        [*both, checkpoint, whole_snapshots],
        resumable(),
        max_epochs=3,
        enable_checkpointing=True,
    )

    model, (callback, both), snapshots = Regression(make_optimizer=momentum), callbacks(), Snapshots()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step // 2, save_top_k=-1)
    trainer = make_trainer(tmp_path, [*both, checkpoint, snapshots], max_epochs=3, enable_checkpointing=True)
    trainer.fit(model, resumable(), ckpt_path=tmp_path / f"step={step}.ckpt")

    assert steps_of(callback) == steps_of(whole) == 12
    assert len(snapshots.weights) == 12 - step
    assert all(same(a, b) for a, b in zip(snapshots.weights, whole_snapshots.weights[step:], strict=True))
    assert same(weights_of(model), weights_of(whole_model))
    assert not same(weights_of(model), snapshots.weights[-1])


def test_monitor_counts_the_current_weights_and_not_the_average(tmp_path):
    """At the start of validation the average is not yet in place; the logged number is that of the trained weights."""
    seen = []

    class Sparsity(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["sparsity/model"]))

        def on_validation_start(self, trainer, pl_module):
            weights = [layer.weight for layer in (pl_module.net[0], pl_module.net[2])]
            expected.append(sum(int((w == 0).sum()) for w in weights) / 40)

    expected = []
    callbacks = [
        regularization(strength=0.2, update="proximal"),
        EMAWeightAveraging(decay=0.9),
        CompressionMonitor(),
        Sparsity(),
    ]
    make_trainer(tmp_path, callbacks, max_epochs=8, num_sanity_val_steps=0).fit(
        ValidatedRegression(), loader(), loader(count=8)
    )
    assert len(seen) == 8
    assert seen == pytest.approx(expected)
    assert seen[-1] > 0


# -- stopping and watching -----------------------------------------------------------------------------------------


class Scheduled(Regression):
    """A learning rate that falls with each step."""

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_learning_rate_monitor_logs_at_the_steps_of_ours(tmp_path):
    logger, rates = MemoryLogger(), Rates()
    callbacks = [regularization(update="proximal"), LearningRateMonitor("step"), rates]
    fit(tmp_path, Scheduled(), callbacks, logger=logger, max_epochs=2)
    assert logger.steps("gcsr/injected") == logger.steps("lr-SGD") == list(range(8))
    assert rates.rates == pytest.approx([0.1 / (1 + i) for i in range(8)])
    assert logger.values("lr-SGD") == pytest.approx(rates.rates)


@pytest.mark.parametrize(
    ("monitor", "mode", "threshold"),
    [("gcsr/penalty", "min", 4.0), ("gcsr/penalty_grad_norm", "min", 1.5), ("sparsity/model", "max", 0.6)],
)
def test_early_stopping_at_a_threshold_ends_training_there(tmp_path, monitor, mode, threshold):
    logger = MemoryLogger()
    stopping = EarlyStopping(
        monitor, mode=mode, stopping_threshold=threshold, patience=100, check_on_train_epoch_end=True
    )
    callback = regularization(strength=0.3, update="proximal", gate=None)
    callbacks = [callback, CompressionMonitor(), stopping]
    trainer = fit(tmp_path, Regression(), callbacks, logger=logger, max_epochs=30)
    ends = logger.values(monitor)[3::4]
    reached = [value < threshold if mode == "min" else value > threshold for value in ends]
    assert reached == [False] * (len(ends) - 1) + [True]
    assert 1 < trainer.current_epoch == len(ends) < 30
    assert steps_of(callback) == trainer.global_step == 4 * len(ends)


class Expire(Callback):
    """Lets a Timer run out after a number of batches, whatever the clock says."""

    def __init__(self, timer, batches) -> None:
        self.timer, self.batches = timer, batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batches - 1:
            self.timer._duration = 0.0


@UPDATES
@pytest.mark.parametrize("batches", [2, 3])
def test_timer_ends_training_between_two_steps(tmp_path, update, batches):
    """The weights are those of the steps made, and a window that is cut off leaves no penalty behind."""
    timer = Timer(duration=timedelta(hours=1), interval="step")
    model, callback = Regression(), regularization(update=update, **THIS_STEP)
    callbacks = [callback, Expire(timer, batches), timer]
    trainer = fit(tmp_path, model, callbacks, loader(count=20), max_epochs=3, accumulate_grad_batches=2)
    assert model.training_steps == batches
    assert steps_of(callback) == trainer.global_step == batches // 2
    net = mlp()
    train_by_hand(net, list(loader())[:batches], accumulate=2, strength=0.05, update=update)
    assert same(weights_of(model.net), weights_of(net))


def test_training_that_is_cut_off_in_its_first_window_is_not_told_of_manual_optimization(tmp_path, recwarn):
    timer = Timer(duration=timedelta(hours=1), interval="step")
    model, callback = Regression(), regularization()
    start = weights_of(model)
    fit(tmp_path, model, [callback, Expire(timer, 1), timer], accumulate_grad_batches=2)
    assert same(weights_of(model), start)
    assert steps_of(callback) == 0
    assert not [warning for warning in recwarn if "manual optimization" in str(warning.message)]
