"""What the callback and the regularizer choose where they are not told."""

from functools import partial

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcsr import CoherentRegularizer, Gate, GradientCoherentRegularization, Schedule

from .models import THIS_STEP, MemoryLogger, Regression, fit, gate_of, mlp

CHOSEN = [
    ({}, (0.98, 0.1, 0.3)),
    ({"gate": Gate("agreement", scope="element")}, (0.98, 0.1, 0.3)),
    ({"update": "gradient", "penalty": "l2"}, (0.98, 0.1, 0.3)),
    ({"gate": Gate(averaging=0)}, (0, 0, 0)),
    ({"gate": Gate(averaging=0.5)}, (0.5, 0.1, 0.3)),
    ({"gate": Gate(averaging=0.0, tolerance=0.2)}, (0, 0.2, 0.3)),
    ({"gate": Gate(averaging=0.0), "schedule": Schedule(warmup=5)}, (0, 0, 5)),
    ({"gate": Gate(tolerance=0)}, (0.98, 0, 0)),
    ({"gate": Gate(tolerance=0.5)}, (0.98, 0.5, 0.3)),
    ({"schedule": Schedule(warmup=0)}, (0.98, 0.1, 0)),
    ({"schedule": Schedule(warmup=20)}, (0.98, 0.1, 20)),
    ({"schedule": Schedule(warmup=0.5)}, (0.98, 0.1, 0.5)),
    (THIS_STEP, (0, 0, 0)),
    *[({"gate": Gate("agreement", scope=scope)}, (0, 0, 0)) for scope in ("model", "parameter")],
    *[
        ({"gate": gate_of(coherence=coherence, scope=scope)}, (0, 0, 0))
        for coherence in ("direction", "temporal", None)
        for scope in ("model", "parameter", "element")
    ],
    ({"gate": Gate("direction", averaging=0.9)}, (0.9, 0, 0)),
    ({"gate": Gate("direction"), "schedule": Schedule(warmup=0.2)}, (0, 0, 0.2)),
]


@pytest.mark.parametrize(("given", "expected"), CHOSEN, ids=str)
@pytest.mark.parametrize("make", [GradientCoherentRegularization, partial(CoherentRegularizer, mlp())])
def test_what_is_not_given_is_chosen_by_measure_and_scope(make, given, expected):
    made = make(strength=0.1, **given)
    gate = made.gate or Gate(averaging=0.0)
    assert (gate.averaging, gate.tolerance, made.schedule.warmup) == expected
    assert type(made.schedule.warmup) is type(expected[2])
    assert made.update == given.get("update", "proximal")


def test_strength_rises_over_the_first_three_tenths_of_the_training(tmp_path):
    logger = MemoryLogger()
    fit(tmp_path, Regression(), GradientCoherentRegularization(strength=0.1), logger=logger, max_epochs=5)
    rising = [0.1 * step / 6 for step in range(6)]  # of 20 steps
    assert logger.values("gcsr/strength") == pytest.approx(rising + [0.1] * 14)


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
