"""What the callback and the regularizer choose where they are not told."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcsr import CoherentRegularizer, Gate, GradientCoherentRegularization, Schedule

from .models import MemoryLogger, Regression, adam, fit, mlp, sgd

CHOSEN = [
    ({}, (0.98, 0.1, 0.3)),
    ({"update": "gradient", "penalty": "l2"}, (0.98, 0.1, 0.3)),
    ({"gate": Gate(averaging=0)}, (0, 0, 0)),
    ({"gate": Gate(averaging=0, tolerance=0.2), "schedule": Schedule(delay=5)}, (0, 0.2, 0.3)),
    ({"gate": Gate(tolerance=0)}, (0.98, 0, 0)),
    ({"schedule": Schedule(warmup=0)}, (0.98, 0.1, 0)),
    ({"gate": Gate("agreement", scope="parameter")}, (0, 0, 0)),
    ({"gate": Gate("direction", averaging=0.9), "schedule": Schedule(warmup=0.2)}, (0.9, 0, 0.2)),
    ({"gate": Gate("temporal")}, (0, 0, 0)),
    ({"gate": None}, (None, None, 0)),
]


@pytest.mark.parametrize(("given", "expected"), CHOSEN, ids=str)
@pytest.mark.parametrize("make", [GradientCoherentRegularization, partial(CoherentRegularizer, mlp())])
def test_what_is_not_given_is_chosen_by_measure_and_scope(make, given, expected):
    made = make(strength=0.1, **given)
    chosen = (None, None) if made.gate is None else (made.gate.averaging, made.gate.tolerance)
    assert (*chosen, made.schedule.warmup) == expected
    assert made.update == given.get("update", "dual_averaging")


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=0.001)


@pytest.mark.parametrize("make_optimizer", [sgd, adam, partial(torch.optim.AdamW, lr=0.01), rmsprop])
def test_defaults_are_the_same_under_every_optimizer(tmp_path, make_optimizer):
    """The strength rises over the first three tenths of 20 steps."""
    logger, callback = MemoryLogger(), GradientCoherentRegularization(strength=0.01)
    fit(tmp_path, Regression(make_optimizer=make_optimizer), callback, logger=logger, max_epochs=5)
    made = callback.regularizer
    assert (made.gate, made.schedule, made.update) == (Gate(), Schedule(warmup=0.3), "dual_averaging")
    rising = [0.01 * step / 6 for step in range(6)]
    assert logger.values("gcsr/strength") == pytest.approx(rising + [0.01] * 14)


class StopAfterFourSteps(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 4


def test_training_without_an_end_needs_a_warm_up_in_steps(tmp_path):
    model = Regression()
    with pytest.raises(
        MisconfigurationException,
        match=r"gcsr: warmup=0\.3, the default where .*, is a fraction .* whose length is not known.* as an integer",
    ):
        fit(tmp_path, model, GradientCoherentRegularization(strength=0.1), max_epochs=-1)
    assert model.training_steps == 0
    logger, callback = MemoryLogger(), GradientCoherentRegularization(strength=0.1, schedule=Schedule(warmup=2))
    fit(tmp_path, model, [callback, StopAfterFourSteps()], logger=logger, max_epochs=-1)
    assert logger.values("gcsr/strength") == pytest.approx([0.05, 0.1, 0.1, 0.1])
