"""Lightning's Tuner: its trial runs leave no trace in the fit that follows."""

import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization, Schedule

from .models import MemoryLogger, Regression, Snapshots, fit, make_trainer, mlp, same, samples, steps_of, weights_of

UPDATES = pytest.mark.parametrize("update", ["gradient", "proximal"])


@pytest.fixture(autouse=True)
def _without_garbage_collection(monkeypatch):
    """Lightning collects garbage between trials, which takes a second with many modules loaded."""
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


class Tunable(Regression):
    """Has a learning rate and a batch size to be found, and keeps its optimizers."""

    def __init__(self, lr=0.1, batch_size=4) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        self.made = []

    def configure_optimizers(self):
        self.made.append(SGD(self.parameters(), lr=self.lr, momentum=0.9))
        return self.made[-1]

    def train_dataloader(self):
        return DataLoader(samples(16), batch_size=self.batch_size)


def regularization(update="proximal", **kwargs):
    """Its delay and warm-up show where the count of steps starts."""
    arguments = {"strength": 0.04, "gate": None, "schedule": Schedule(delay=3, warmup=4)}
    return GradientCoherentRegularization(**(arguments | kwargs), update=update)


def untuned(tmp_path, update, lr=0.1, batch_size=4, max_epochs=2):
    model, logger = Tunable(lr, batch_size), MemoryLogger()
    trainer = make_trainer(tmp_path, [regularization(update)], max_epochs=max_epochs, logger=logger)
    trainer.fit(model)
    return weights_of(model), logger


def find_lr(trainer, model, **kwargs):
    return Tuner(trainer).lr_find(model, **({"num_training": 6, "early_stop_threshold": None} | kwargs))


def scale_batch_size(trainer, model):
    return Tuner(trainer).scale_batch_size(model, init_val=4, max_trials=2, steps_per_trial=2)


def assert_no_trace(model, callback, start):
    assert same(weights_of(model), start)
    assert model.training_steps > 0
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in model.made)
    assert callback.regularizer is None or not callback.regularizer.state_dict()["steps"]


@UPDATES
def test_fit_after_lr_find_is_the_fit_without_it(tmp_path, update):
    expected, expected_log = untuned(tmp_path, update)
    model, callback, logger = Tunable(), regularization(update), MemoryLogger()
    start = weights_of(model)
    trainer = make_trainer(tmp_path, [callback, CompressionMonitor()], max_epochs=2, logger=logger)
    find_lr(trainer, model, update_attr=False)
    assert_no_trace(model, callback, start)
    assert not logger.logged

    trainer.fit(model)
    assert steps_of(callback) == trainer.global_step == 8
    assert same(weights_of(model), expected)
    assert logger.values("gcsr/strength") == expected_log.values("gcsr/strength")
    assert logger.steps("gcsr/strength") == list(range(8))


@UPDATES
def test_fit_with_the_rate_that_was_found(tmp_path, update):
    model, callback = Tunable(), regularization(update)
    trainer = make_trainer(tmp_path, [callback], max_epochs=5)
    found = find_lr(trainer, model, num_training=20, min_lr=1e-4, max_lr=0.3).suggestion()
    assert model.lr == found != 0.1
    trainer.fit(model)
    expected, _ = untuned(tmp_path, update, lr=found, max_epochs=5)
    assert same(weights_of(model), expected)


@UPDATES
def test_fit_after_scaling_the_batch_size_is_the_fit_with_that_size(tmp_path, update):
    model, callback = Tunable(), regularization(update)
    start = weights_of(model)
    trainer = make_trainer(tmp_path, [callback], max_epochs=2)
    size = scale_batch_size(trainer, model)
    assert size == model.batch_size == 8
    assert_no_trace(model, callback, start)

    trainer.fit(model)
    assert steps_of(callback) == trainer.global_step == 4
    expected, _ = untuned(tmp_path, update, batch_size=8)
    assert same(weights_of(model), expected)


@UPDATES
def test_both_tuners_one_after_the_other(tmp_path, update):
    model, callback = Tunable(), regularization(update)
    trainer = make_trainer(tmp_path, [callback], max_epochs=2)
    scale_batch_size(trainer, model)
    find_lr(trainer, model, update_attr=False)
    model.batch_size = 4
    trainer.fit(model)
    assert steps_of(callback) == 8
    assert same(weights_of(model), untuned(tmp_path, update)[0])


@UPDATES
@pytest.mark.parametrize("tune", [lambda *of: find_lr(*of, update_attr=False), scale_batch_size], ids=["lr", "batch"])
def test_callback_that_has_trained_before_starts_from_zero_after_tuning(tmp_path, update, tune):
    """The object was in the fit of another model; Lightning saves and restores its state around the trial runs."""
    callback = regularization(update)
    fit(tmp_path, Regression(mlp(seed=1)), callback, max_epochs=3)
    assert steps_of(callback) == 12

    model, logger = Tunable(), MemoryLogger()
    trainer = make_trainer(tmp_path, [callback], max_epochs=2, logger=logger)
    tune(trainer, model)
    model.batch_size = 4
    trainer.fit(model)
    assert steps_of(callback) == trainer.global_step == 8
    expected, expected_log = untuned(tmp_path, update)
    assert logger.values("gcsr/strength") == expected_log.values("gcsr/strength")
    assert same(weights_of(model), expected)
    norms = callback.regularizer.state_dict()["initial_norms"]
    assert norms["net.0.weight"] == pytest.approx(float(mlp()[0].weight.detach().norm()))


@UPDATES
@pytest.mark.parametrize("tuned_first", [True, False])
@pytest.mark.parametrize("used_before", [False, True])
def test_learning_rate_finder_as_a_callback(tmp_path, update, tuned_first, used_before):
    """It makes its trial run at the start of the very fit."""
    callback = regularization(update)
    if used_before:
        fit(tmp_path, Regression(mlp(seed=1)), callback, max_epochs=3)
    model, snapshots, logger = Tunable(), Snapshots(), MemoryLogger()
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None, update_attr=False)
    callbacks = [finder, callback] if tuned_first else [callback, finder]
    trainer = make_trainer(tmp_path, [*callbacks, snapshots], max_epochs=2, logger=logger)
    trainer.fit(model)
    assert model.training_steps == 6 + 8
    assert steps_of(callback) == 8
    expected, expected_log = untuned(tmp_path, update)
    assert logger.values("gcsr/strength") == expected_log.values("gcsr/strength")
    assert same(weights_of(model), expected)


@pytest.mark.parametrize("tuned_first", [True, False])
def test_batch_size_finder_as_a_callback(tmp_path, tuned_first):
    model, callback = Tunable(), regularization()
    finder = BatchSizeFinder(init_val=4, max_trials=2, steps_per_trial=2)
    callbacks = [finder, callback] if tuned_first else [callback, finder]
    make_trainer(tmp_path, callbacks, max_epochs=2).fit(model)
    assert model.batch_size == 8
    assert steps_of(callback) == 4
    assert same(weights_of(model), untuned(tmp_path, "proximal", batch_size=8)[0])


def test_tuning_between_two_fits_goes_on_counting(tmp_path):
    """The Trainer has trained for an epoch; after the trial runs it goes on with the second."""
    model, callback, logger = Tunable(), regularization(), MemoryLogger()
    trainer = make_trainer(tmp_path, [callback], max_epochs=1, logger=logger)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    find_lr(trainer, model, update_attr=False)
    assert steps_of(callback) == trainer.global_step == 4
    trainer.fit(model)
    assert steps_of(callback) == trainer.global_step == 8
    strengths = logger.values("gcsr/strength")
    assert strengths == pytest.approx([0.0, 0.0, 0.0, 0.01, 0.02, 0.03, 0.04, 0.04])
