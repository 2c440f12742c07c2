"""One decision for each optimizer step, whatever the micro-batches do."""

from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Subset

from lightning_gcsr import Gate, GradientCoherentRegularization, Schedule

from .models import (
    MemoryLogger,
    Regression,
    Snapshots,
    Stream,
    fit,
    largest_difference,
    loader,
    mlp,
    momentum,
    same,
    samples,
    scaled,
    steps_of,
    weights_of,
)

RETURNED_NONE = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
DECISIONS = [
    {},
    {"gate": Gate("direction", scope="model", threshold=0.9)},
    {"gate": Gate("temporal", scope="parameter")},
    {"gate": None},
]
BY_VALUES = {"ids": lambda value: "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else None}


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("decision", DECISIONS, **BY_VALUES)
def test_four_accumulated_batches_of_two_equal_one_of_eight(tmp_path, decision, update):
    results = {}
    for batch_size in (2, 8):
        logger = MemoryLogger()
        model = Regression(mlp().double(), make_optimizer=momentum)
        callback = GradientCoherentRegularization(strength=0.05, update=update, log_per_parameter=True, **decision)
        data = loader(count=32, batch_size=batch_size, dtype=torch.float64)
        precision = {"precision": "64-true", "accumulate_grad_batches": 8 // batch_size}
        fit(tmp_path, model, callback, data, logger=logger, max_epochs=3, **precision)
        assert steps_of(callback) == 12
        results[batch_size] = weights_of(model), logger
    (small, small_log), (large, large_log) = results[2], results[8]
    assert largest_difference(small, large) < 1e-12
    assert small_log.logged == large_log.logged
    for key in small_log.logged:
        if key.startswith("gcsr/"):
            assert small_log.steps(key) == large_log.steps(key) == list(range(12))
            assert small_log.values(key) == pytest.approx(large_log.values(key), rel=0, abs=1e-8)
    if decision != {"gate": None}:
        injected = small_log.values("gcsr/injected")
        assert 0 < sum(injected) < 12  # the gate both opened and shut


def test_penalty_counts_once_for_four_micro_batches(tmp_path):
    """With a vanishing loss gradient every weight moves by lr·λ, not by a multiple of it."""
    model = Regression(factors=dict.fromkeys(range(16), 0.0))
    start = weights_of(model)["net.0.weight"]
    callback = GradientCoherentRegularization(strength=0.01, gate=None, update="gradient")
    fit(tmp_path, model, callback, accumulate_grad_batches=4)
    assert steps_of(callback) == 1
    torch.testing.assert_close(start - weights_of(model)["net.0.weight"], 0.1 * 0.01 * start.sign())


class FiveBatches:
    """Five batches of four samples, in the forms in which a Trainer may get them."""

    sized = staticmethod(lambda: loader(count=20))
    stream = staticmethod(lambda: DataLoader(Stream(samples(20)), batch_size=4))
    limited = staticmethod(lambda: loader(count=40))
    limited_stream = staticmethod(lambda: DataLoader(Stream(samples(40)), batch_size=4))


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("form", ["sized", "stream", "limited", "limited_stream"])
def test_five_batches_in_windows_of_two_make_three_decisions(tmp_path, form, update):
    limit = {"limit_train_batches": 5} if form.startswith("limited") else {}
    logger, snapshots = MemoryLogger(), Snapshots()
    callback = GradientCoherentRegularization(strength=0.05, gate=None, update=update)
    model = Regression()
    data = getattr(FiveBatches, form)()
    fit(tmp_path, model, [callback, snapshots], data, accumulate_grad_batches=2, logger=logger, **limit)

    assert model.training_steps == 5
    assert steps_of(callback) == 3
    assert logger.steps("gcsr/injected") == [0, 1, 2]
    changed = [not same(before, after) for before, after in pairwise(snapshots.weights)]
    assert changed == [True, False, True, True]  # after the second, the fourth and the last batch


def test_all_forms_of_five_batches_give_the_same_weights(tmp_path):
    results = []
    for form in ("sized", "stream", "limited", "limited_stream"):
        limit = {"limit_train_batches": 5} if form.startswith("limited") else {}
        model = Regression()
        # Not a share: of a stream nobody knows the length.
        callback = GradientCoherentRegularization(strength=0.05, schedule=Schedule(warmup=2))
        fit(tmp_path, model, callback, getattr(FiveBatches, form)(), accumulate_grad_batches=2, **limit)
        results.append(weights_of(model))
    assert all(same(results[0], result) for result in results[1:])


def test_decisions_follow_a_scheduled_window(tmp_path):
    scheduler = GradientAccumulationScheduler({0: 4, 1: 2, 2: 1})
    callback = GradientCoherentRegularization(strength=0.05)
    fit(tmp_path, Regression(), [callback, scheduler], max_epochs=3)
    assert steps_of(callback) == 1 + 2 + 4


def test_two_epochs_of_five_batches_make_six_decisions(tmp_path):
    callback = GradientCoherentRegularization(strength=0.05)
    trainer = fit(tmp_path, Regression(), callback, loader(count=20), accumulate_grad_batches=2, max_epochs=2)
    assert steps_of(callback) == trainer.global_step == 6


@RETURNED_NONE
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("none_at", [(1,), (0,), (3,), (1, 3)])
def test_penalty_is_imposed_once_where_a_micro_batch_returns_none(tmp_path, none_at, update):
    """Both windows hold one backward at least; with a vanishing loss gradient each step moves a weight by lr·λ."""
    model = Regression(none_at=none_at, factors=dict.fromkeys(range(4), 0.0))
    start = weights_of(model)["net.0.weight"]
    callback = GradientCoherentRegularization(strength=0.01, gate=None, update=update)
    fit(tmp_path, model, callback, accumulate_grad_batches=2)
    assert steps_of(callback) == 2
    torch.testing.assert_close(start - weights_of(model)["net.0.weight"], 2 * 0.1 * 0.01 * start.sign())


@RETURNED_NONE
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_closing_none_regularizes_what_the_window_gathered(tmp_path, update):
    """A window that ends in None is a window of its first batch, at half the size that Lightning divides by."""
    closed = Regression(none_at=[1, 3])
    callback = GradientCoherentRegularization(strength=0.05, gate=Gate(scope="model", threshold=-1.0), update=update)
    fit(tmp_path, closed, callback, accumulate_grad_batches=2)

    reference = Regression(factors=dict.fromkeys(range(2), 0.5))
    first_of_each_window = Subset(samples(), [0, 1, 2, 3, 8, 9, 10, 11])
    callback = GradientCoherentRegularization(strength=0.05, gate=Gate(scope="model", threshold=-1.0), update=update)
    fit(tmp_path, reference, callback, DataLoader(first_of_each_window, batch_size=4))
    assert largest_difference(weights_of(closed), weights_of(reference)) < 1e-7


@RETURNED_NONE
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_where_every_batch_returns_none_nothing_moves_and_no_gradient_appears(tmp_path, accumulate, update):
    model = Regression(none_at=range(4), make_optimizer=momentum)
    start = weights_of(model)
    callback = GradientCoherentRegularization(strength=1.0, gate=None, update=update)
    fit(tmp_path, model, callback, accumulate_grad_batches=accumulate)
    assert model.training_steps == 4
    assert same(start, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


@RETURNED_NONE
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("temporal", [False, True])
def test_no_decision_where_lightning_skips_the_scaled_step_of_a_closing_none(tmp_path, update, temporal):
    """Under a loss scale Lightning neither unscales nor steps then, and the gradients still carry the scale."""
    logger, snapshots = MemoryLogger(), Snapshots()
    model = Regression(none_at=[1])
    start = weights_of(model)
    decision = {"gate": Gate("temporal", scope="model")} if temporal else {"gate": None}
    callback = GradientCoherentRegularization(strength=0.05, update=update, **decision)
    fit(
        tmp_path,
        model,
        [callback, snapshots],
        accumulate_grad_batches=2,
        plugins=[scaled()],
        logger=logger,
    )
    assert same(start, snapshots.weights[1])  # the skipped step
    assert not same(start, snapshots.weights[3])
    assert steps_of(callback) == 1
    assert len(logger.steps("gcsr/injected")) == 1
    assert logger.values("gcsr/nonfinite_steps") == [0]


@RETURNED_NONE
def test_where_every_batch_returns_none_under_a_loss_scale_nothing_moves(tmp_path):
    model = Regression(none_at=range(4))
    start = weights_of(model)
    callback = GradientCoherentRegularization(strength=1.0, gate=None, update="proximal")
    fit(tmp_path, model, callback, plugins=[scaled()])
    assert same(start, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())
