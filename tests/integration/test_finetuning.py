"""Frozen layers are left alone, and join when they are unfrozen."""

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning

from lightning_gcsr import Gate, GradientCoherentRegularization, Schedule

from .models import MemoryLogger, Regression, Snapshots, fit, momentum, same, sgd, steps_of, weights_of

VANISHING = dict.fromkeys(range(100), 0.0)


def regularization(update="gradient", **kwargs):
    return GradientCoherentRegularization(**({"strength": 0.01, "update": update, "gate": None} | kwargs))


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("make_optimizer", [sgd, momentum])
def test_frozen_layer_is_left_alone_while_others_are_regularized(tmp_path, make_optimizer, update):
    model = Regression(make_optimizer=make_optimizer)
    model.net[0].requires_grad_(False)
    start = weights_of(model)
    logger = MemoryLogger()
    fit(tmp_path, model, regularization(update), logger=logger)
    free = Regression(make_optimizer=make_optimizer)
    free.net[0].requires_grad_(False)
    fit(tmp_path, free)
    assert torch.equal(start["net.0.weight"], model.net[0].weight)
    assert model.net[0].weight.grad is None
    assert not torch.equal(free.net[2].weight, model.net[2].weight)
    # Only the eight weights of the last layer took part.
    assert logger.values("gcsr/penalty_grad_norm") == pytest.approx([0.01 * 8**0.5] * 4)
    assert logger.values("gcsr/injected") == [1.0] * 4


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_model_that_is_frozen_but_for_its_biases_has_nothing_to_regularize_and_trains(tmp_path, update):
    model = Regression()
    for layer in (model.net[0], model.net[2]):
        layer.weight.requires_grad_(False)
    start = weights_of(model)
    with pytest.warns(UserWarning, match="All parameters that 'gcsr' regularizes are frozen"):
        fit(tmp_path, model, regularization(update, strength=10.0))
    assert torch.equal(start["net.0.weight"], model.net[0].weight)
    assert not torch.equal(start["net.0.bias"], model.net[0].bias)


class Unfreeze(BaseFinetuning):
    """Trains the last layer for an epoch and the first one with it from then on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1, initial_denom_lr=1.0)


class HeadFirst(Regression):
    """Gives the optimizer only what is not frozen, as Lightning's documentation advises."""

    def configure_optimizers(self):
        return sgd(filter(lambda parameter: parameter.requires_grad, self.parameters()))


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("unfreeze_first", [True, False], ids=["before ours", "after ours"])
def test_layer_that_is_unfrozen_later_is_regularized_from_then_on(tmp_path, update, unfreeze_first):
    """The loss gradient vanishes, so that each step moves a weight by lr·λ."""
    model = HeadFirst(factors=VANISHING)
    start, snapshots, callback = weights_of(model), Snapshots(), regularization(update)
    ours = [Unfreeze(), callback] if unfreeze_first else [callback, Unfreeze()]
    fit(tmp_path, model, [*ours, snapshots], max_epochs=2)

    assert torch.equal(snapshots.weights[3]["net.0.weight"], start["net.0.weight"])
    for name, steps in (("net.0.weight", 4), ("net.2.weight", 8)):
        moved = start[name] - weights_of(model)[name]
        torch.testing.assert_close(moved, steps * 0.1 * 0.01 * start[name].sign(), rtol=1e-4, atol=1e-7)
    assert steps_of(callback) == 8


def test_unfrozen_layer_joins_the_decisions(tmp_path):
    logger = MemoryLogger()
    callback = regularization(gate=Gate("direction", scope="model"), log_per_parameter=True)
    fit(tmp_path, HeadFirst(), [Unfreeze(), callback], logger=logger, max_epochs=2)
    assert logger.steps("gcsr/coherence/net.2.weight") == list(range(8))
    assert logger.steps("gcsr/coherence/net.0.weight") == [4, 5, 6, 7]
    # The report before is that of the last layer alone, and after of both.
    alone = logger.values("gcsr/coherence/net.2.weight")[:4]
    assert logger.values("gcsr/coherence")[:4] == pytest.approx(alone)
    assert logger.values("gcsr/penalty_grad_norm") == pytest.approx([0.01 * 8**0.5] * 4 + [0.01 * 40**0.5] * 4)


@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
def test_unfreezing_with_temporal_coherence(tmp_path, scope):
    """The new layer has no predecessor at first: by parameter and element it is suppressed once."""
    logger = MemoryLogger()
    threshold = None if scope == "element" else -1.0
    callback = regularization(gate=Gate("temporal", scope=scope, threshold=threshold), log_per_parameter=True)
    fit(tmp_path, HeadFirst(), [Unfreeze(), callback], logger=logger, max_epochs=2)
    injected = logger.values("gcsr/injected/net.0.weight")
    assert injected[0] == (1.0 if scope == "model" else 0.0)
    assert injected[1] > 0


def test_delay_is_not_started_anew_by_a_layer_that_joins(tmp_path):
    logger = MemoryLogger()
    fit(tmp_path, HeadFirst(), [Unfreeze(), regularization(schedule=Schedule(delay=2))], logger=logger, max_epochs=2)
    assert logger.values("gcsr/strength") == pytest.approx([0.0] * 2 + [0.01] * 6)


def test_warning_where_the_first_regularized_layer_joins_later_names_the_way_out(tmp_path):
    """At the start the optimizer holds none of them; once unfrozen the layer is regularized after all."""
    model = HeadFirst(factors=VANISHING)
    start = weights_of(model)
    callback = regularization(include=[r"net\.0\.weight"])
    with pytest.warns(UserWarning, match="No optimizer holds a parameter"):
        fit(tmp_path, model, [Unfreeze(), callback], max_epochs=2)
    moved = start["net.0.weight"] - weights_of(model)["net.0.weight"]
    torch.testing.assert_close(moved, 4 * 0.1 * 0.01 * start["net.0.weight"].sign(), rtol=1e-4, atol=1e-7)
    assert not same(start, weights_of(model))
