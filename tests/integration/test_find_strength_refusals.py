"""What `find_strength` refuses, before anything trains where it can, and what it says then."""

import threading

import pytest
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcsr import GradientCoherentRegularization, KeepZeros, _lightning, find_strength

from .models import Regression, Stream, loader, samples, weights_of
from .models import same as same_weights
from .searching import Learner, learner, learning_sgd, search, trainer_for


def refused(error, match, trainer, model=None, **kwargs):
    """Assert that the search is refused with this message before a training step."""
    trained = []

    class Watched(Learner):
        def training_step(self, batch, batch_idx):
            trained.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises(error, match=match):
        search(trainer, Watched(make_optimizer=learning_sgd) if model is None else model, **kwargs)
    assert trained == []


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["min_strength", "max_strength"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (0.0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
)
def test_strengths_are_positive_numbers(tmp_path, name, value, error):
    refused(error, f"`{name}` must be .*got {name}={value!r}", trainer_for(tmp_path), **{name: value})


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0)])
def test_range_goes_upwards(tmp_path, low, high):
    match = rf"`min_strength` must be less than max_strength={high}, got min_strength={low}"
    refused(ValueError, match, trainer_for(tmp_path), min_strength=low, max_strength=high)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("num_strengths", 1, ValueError, "at least 2"),
        ("num_strengths", 2.0, TypeError, "at least 2"),
        ("num_bisections", -1, ValueError, "at least 0"),
        ("num_bisections", "3", TypeError, "at least 0"),
        ("max_steps", 0, ValueError, "at least 1"),
        ("max_steps", 1.5, TypeError, "at least 1"),
        ("max_epochs", -1, ValueError, "at least 1"),
        ("max_epochs", True, TypeError, "at least 1"),
        ("mode", "most", ValueError, "one of 'min', 'max'"),
        ("mode", None, ValueError, "one of 'min', 'max'"),
        ("metric", None, TypeError, "a string"),
    ],
)
def test_bad_argument_is_named(tmp_path, name, value, error, match):
    refused(error, rf"`{name}` must be .*{match}.*got {name}={value!r}", trainer_for(tmp_path), **{name: value})


@pytest.mark.parametrize("value", ["l1", 0.1, KeepZeros()])
def test_regularization_has_its_type(tmp_path, value):
    match = r"`regularization` must be a GradientCoherentRegularization, got regularization="
    refused(TypeError, match, trainer_for(tmp_path), regularization=value)


def test_callbacks_are_a_sequence(tmp_path):
    match = r"`callbacks` must be a sequence of callbacks.*in a list"
    refused(TypeError, match, trainer_for(tmp_path), callbacks=KeepZeros())


def test_one_of_two_regularizations_must_be_named(tmp_path):
    both = [
        GradientCoherentRegularization(strength=0.1, name=name, include=[f"{name}.weight"])
        for name in ("net.0", "net.2")
    ]
    match = r"`regularization` must be given where the Trainer has 2 of them.*Name the one"
    refused(ValueError, match, trainer_for(tmp_path, both))
    result = search(trainer_for(tmp_path, both), learner(), regularization=both[0])
    assert {trial.weights for trial in result.trials} == {32}


def test_gradient_update_under_adam_needs_a_range(tmp_path):
    trainings = []

    def adam(parameters):
        trainings.append("one more")
        return torch.optim.Adam(parameters, lr=0.05)

    gradient = GradientCoherentRegularization(strength=1.0, gate=None, update="gradient")
    for missing in ("min_strength", "max_strength"):
        match = rf"`{missing}` must be given with update='gradient' under an optimizer that rescales.*or give the range"
        with pytest.raises(ValueError, match=match):
            search(trainer_for(tmp_path), learner(make_optimizer=adam), regularization=gradient, **{missing: None})
    assert len(trainings) == 2, "no more than the first step was made each time"
    assert search(trainer_for(tmp_path), learner(make_optimizer=adam), regularization=gradient).trials[1].learned


def test_other_end_of_the_range_may_leave_none(tmp_path):
    match = r"`min_strength` must leave a range: without the other end it would go from .*Give both"
    with pytest.raises(ValueError, match=match):
        search(trainer_for(tmp_path), learner(), min_strength=1e9, max_strength=None)


# -- the metric ------------------------------------------------------------------------------------------------------


def test_no_validation_data_for_a_validation_metric(tmp_path):
    class Blind(Regression):
        pass

    match = r"`metric` must be one of the metrics.*no validation data: pass `val_dataloaders`, or name a metric of the"
    with pytest.raises(ValueError, match=match):
        search(trainer_for(tmp_path), Blind(make_optimizer=learning_sgd), loader())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_no_validation_data_for_a_model_that_validates(tmp_path):
    with pytest.raises(ValueError, match=r"no validation data: pass `val_dataloaders`"):
        search(trainer_for(tmp_path), learner(), loader())


def test_unknown_metric_lists_those_that_are_logged(tmp_path):
    match = (
        r"must be one of the metrics that the model logs, .*'loss', 'val_loss', got metric='valid_loss'. .*'val_loss'\?"
    )
    with pytest.raises(ValueError, match=match):
        search(trainer_for(tmp_path), learner(), metric="valid_loss")


def test_metrics_of_the_penalty_are_not_offered(tmp_path):
    with pytest.raises(ValueError, match="must be one of") as raised:
        search(trainer_for(tmp_path), learner(), metric="valid_loss")
    assert "gcsr/" not in str(raised.value)


def test_model_that_logs_nothing(tmp_path):
    class Silent(Learner):
        def log(self, *args, **kwargs):
            pass

    with pytest.raises(ValueError, match=r"'val_loss'.*Log one with `self.log`"):
        search(trainer_for(tmp_path), Silent(make_optimizer=learning_sgd))


# -- nothing learned -------------------------------------------------------------------------------------------------


def test_every_trial_failed_says_at_which_end_to_look(tmp_path):
    match = (
        r"Every trial failed: already at min_strength=100: .*\. Look at the lower end: give a smaller `min_strength`"
    )
    with pytest.raises(ValueError, match=match):
        search(trainer_for(tmp_path), learner(), min_strength=100.0, max_strength=1000.0)


class Unteachable(Learner):
    """Its loss tells nothing."""

    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


def test_model_that_does_not_learn_without_penalty(tmp_path):
    match = r"does not learn without a penalty: val_loss .*mode='min'. Check `mode`, train for longer \(`max_steps`"
    with pytest.raises(ValueError, match=match):
        search(trainer_for(tmp_path), Unteachable(make_optimizer=learning_sgd))


def test_wrong_mode_is_not_learning(tmp_path):
    with pytest.raises(ValueError, match=r"does not learn without a penalty.*mode='max'. Check `mode`"):
        search(trainer_for(tmp_path), learner(), mode="max")


# -- Trainers --------------------------------------------------------------------------------------------------------


def test_trainer_that_has_trained_is_refused(tmp_path):
    trainer, model = trainer_for(tmp_path), learner()
    trainer.fit(model, loader(), loader())
    before = weights_of(model)
    refused(MisconfigurationException, r"has not trained yet, got one after 20 steps.*Make a new Trainer", trainer)
    assert same_weights(before, weights_of(model))


def test_fast_dev_run_is_refused(tmp_path):
    refused(
        MisconfigurationException, r"got one with fast_dev_run. Leave it out", trainer_for(tmp_path, fast_dev_run=2)
    )


def test_trainer_without_an_end_is_refused(tmp_path):
    match = r"trials that end, and this Trainer trains without end. Give `max_steps` or `max_epochs`"
    refused(MisconfigurationException, match, trainer_for(tmp_path, max_epochs=-1))


def test_strategies_that_start_processes_anew_are_refused(tmp_path):
    trainer = trainer_for(tmp_path, strategy=DDPStrategy(start_method="spawn"), devices=2)
    refused(MisconfigurationException, r"start their processes anew.*Use strategy='ddp' in a script", trainer)


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
def test_sharding_strategies_are_refused(tmp_path, kind):
    trainer = trainer_for(tmp_path)
    strategy = kind.__new__(kind)
    strategy._precision_plugin = Precision()
    trainer._accelerator_connector.strategy = strategy
    match = rf"`find_strength` does not support the strategy {kind.__name__}"
    assert ModelParallelStrategy.__name__ in _lightning._STRATEGIES  # the callback itself has it
    refused(MisconfigurationException, match, trainer)


def test_lbfgs_is_refused(tmp_path):
    model = learner(make_optimizer=torch.optim.LBFGS)
    refused(MisconfigurationException, r"LBFGS is not supported", trainer_for(tmp_path), model)
    assert model.training_steps == 0


def test_shares_of_a_training_of_unknown_length_are_refused(tmp_path):
    """The default's warm-up is one."""
    stream = torch.utils.data.DataLoader(Stream(samples()), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"warmup=0\.3, the default .*, is a fraction of the training"):
        search(trainer_for(tmp_path), learner(), stream, loader())


def test_model_that_cannot_be_copied_is_refused(tmp_path):
    model = learner()
    model.lock = threading.Lock()
    match = r"works on copies of model and Trainer, and Python cannot copy them: cannot pickle.*lock.*Keep what"
    refused(MisconfigurationException, match, trainer_for(tmp_path), model)


def test_positional_arguments_end_with_the_data(tmp_path):
    with pytest.raises(TypeError, match="positional"):
        find_strength(trainer_for(tmp_path), learner(), loader(), loader(), None, 0.1)
