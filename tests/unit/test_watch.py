"""What counts as learned, and what ends a trial before its end."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_gcsr import CoherentRegularizer, GradientCoherentRegularization
from lightning_gcsr.tuning.trial_monitor import CHECK_EVERY, Watch, Yardstick


def losses(reference=0.4):
    """From 2.4 to 0.4: a loss of 1.4 is half of what is gained."""
    yardstick = Yardstick("val_loss", "min", baseline=2.4, in_validation=True)
    if reference is not None:
        yardstick.set_reference(reference, steps=100)
    return yardstick


def accuracies():
    yardstick = Yardstick("accuracy", "max", baseline=0.1)
    yardstick.set_reference(0.9, steps=100)
    return yardstick


# -- the yardstick ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "share"), [(2.4, 0.0), (1.4, 0.5), (0.4, 1.0), (0.2, 1.1), (3.4, -0.5), (math.nan, None)]
)
def test_learned_is_the_share_of_what_is_learned_without_penalty(metric, share):
    expected = math.nan if share is None else share
    assert losses().learned(metric) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("metric", "learned"), [(0.5, True), (0.49, False), (0.1, False), (0.95, True)])
def test_half_of_the_gain_counts_as_learned(metric, learned):
    assert accuracies().has_learned(metric) is learned


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_not_learned(metric):
    assert not losses().has_learned(metric)
    assert not accuracies().has_learned(metric)
    assert losses().account(metric) == "val_loss is not finite"


def test_account_is_in_words():
    assert losses().account(1.9) == "learned 25 % of what is learned without penalty"
    assert losses().account(2.6) == "learned -10 % of what is learned without penalty"


def test_better_depends_on_the_mode():
    assert losses().better(1.0, 2.0)
    assert not losses().better(2.0, 2.0)
    assert accuracies().better(2.0, 1.0)
    assert not accuracies().better(1.0, 2.0)


def test_nothing_is_learned_before_the_reference_is_known():
    yardstick = losses(reference=None)
    assert math.isnan(yardstick.learned(0.1))
    assert not yardstick.has_learned(0.1)


def test_the_reference_brings_the_length_of_a_trial():
    assert losses().steps == 100


@pytest.mark.parametrize("metric", [2.4, 2.5, math.nan, -math.inf])
def test_model_that_does_not_learn_without_a_penalty_is_no_reference(metric):
    with pytest.raises(
        ValueError, match=r"does not learn without a penalty: val_loss.*knows nothing is 2\.4.*mode='min'"
    ):
        losses(reference=metric)


# -- the watch -------------------------------------------------------------------------------------------------------


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))


def watch_of(net, yardstick, steps):
    callback = GradientCoherentRegularization(strength=0.1)
    callback.regularizer = CoherentRegularizer(net, strength=0.1)
    watch = Watch(callback, yardstick)
    watch.steps = steps
    return watch


def trainer(metric=None, fn=TrainerFn.FITTING):
    metrics = {} if metric is None else {"val_loss": torch.tensor(metric)}
    progress = SimpleNamespace(current=SimpleNamespace(ready=1))
    return SimpleNamespace(
        should_stop=False,
        state=SimpleNamespace(fn=fn),
        callback_metrics=metrics,
        world_size=1,
        log_every_n_steps=10,
        num_training_batches=4,
        max_epochs=1,
        max_steps=-1,
        current_epoch=0,
        global_step=0,
        optimizers=[],
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def kill(layer):
    with torch.no_grad():
        layer.weight.mul_(1e-7)


def after_batch(watch):
    running = trainer()
    watch.on_train_batch_end(running, None, None, None, 0)
    return running.should_stop


def after_validation(watch, metric, **kwargs):
    running = trainer(metric, **kwargs)
    watch.on_validation_end(running, None)
    return running.should_stop


def test_trial_with_a_living_layer_goes_on(net):
    watch = watch_of(net, losses(), CHECK_EVERY)
    kill(net[0])
    assert not after_batch(watch)
    assert watch.failure is None


def test_trial_ends_when_every_layer_has_collapsed(net):
    watch = watch_of(net, losses(), CHECK_EVERY)
    kill(net[0])
    kill(net[1])
    assert after_batch(watch)
    assert watch.verdict(0.4) == (False, "every layer has collapsed at step 10")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trial_ends_when_a_weight_is_not_finite(net, value):
    watch = watch_of(net, losses(), CHECK_EVERY)
    with torch.no_grad():
        net[1].weight[0, 0] = value
    assert after_batch(watch)
    assert watch.verdict(0.4) == (False, "the weights of '1.weight' are not finite at step 10")


def test_weights_are_looked_at_only_every_few_steps(net):
    watch = watch_of(net, losses(), CHECK_EVERY + 1)
    kill(net[0])
    kill(net[1])
    assert not after_batch(watch)


def test_reference_is_never_cut_short(net):
    watch = watch_of(net, losses(reference=None), CHECK_EVERY)
    kill(net[0])
    kill(net[1])
    assert not after_batch(watch)
    assert watch.verdict(math.nan) == (True, "the reference")


@pytest.mark.parametrize("metric", [2.4, 9.0, math.nan])
def test_bad_metric_before_the_end_stops_no_trial(net, metric):
    """It may be good at the end, when the learning rate has fallen."""
    watch = watch_of(net, losses(), 60)
    kill(net[1])
    assert not after_validation(watch, metric)
    assert watch.validated_at == 60
    assert watch.verdict(0.5) == (True, "learned 95 % of what is learned without penalty; collapsed: '1.weight'")


def test_dead_layers_stop_no_trial_with_a_target(net):
    """The controller lowers the thresholds again."""
    watch = watch_of(net, losses(), CHECK_EVERY)
    watch.regularization.regularizer = CoherentRegularizer(net, target_sparsity=0.5)
    kill(net[0])
    kill(net[1])
    assert not after_batch(watch)


def test_validation_after_the_trial_is_not_one_of_the_trial(net):
    watch = watch_of(net, losses(), 99)
    assert not after_validation(watch, 2.3, fn=TrainerFn.VALIDATING)
    assert watch.validated_at == -1


@pytest.mark.parametrize(("metric", "learned"), [(0.5, True), (2.0, False), (math.nan, False)])
def test_verdict_at_the_end_is_that_of_the_yardstick(net, metric, learned):
    yardstick = losses()
    assert watch_of(net, yardstick, 100).verdict(metric) == (learned, yardstick.account(metric))
