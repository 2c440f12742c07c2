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


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("strengths", [0], ValueError, "greater than 0, got strengths=0"),
        ("strengths", [-1.0], ValueError, "got strengths=-1.0"),
        ("strengths", [float("nan")], ValueError, "got strengths=nan"),
        ("strengths", ["1"], TypeError, "got strengths='1'"),
        ("strengths", [], ValueError, "at least one number"),
        ("strengths", 1, ValueError, "at least 2"),
        ("strengths", 2.0, TypeError, "at least 2"),
        ("strengths", True, TypeError, "at least 2"),
        ("target_sparsities", [0.5, 1.0], ValueError, "between 0 and 1, got target_sparsities=1.0"),
        ("target_sparsities", [50], ValueError, "got target_sparsities=50"),
        ("target_sparsities", 0.5, TypeError, "a list of numbers"),
        ("target_sparsities", [], ValueError, "at least one number"),
    ],
)
def test_what_to_try_is_checked(tmp_path, name, value, error, match):
    refused(error, rf"`{name}` must .*{match}", trainer_for(tmp_path), **{name: value})


def test_either_targets_or_strengths_are_tried(tmp_path):
    match = "`target_sparsities` must be None where strengths are given"
    refused(ValueError, match, trainer_for(tmp_path), target_sparsities=[0.5], strengths=[0.1])


@pytest.mark.parametrize("changes", [{"update": "proximal"}, {"penalty": "l2"}, {"strength": {"net.0": 0.1}}], ids=str)
def test_targets_need_a_penalty_that_can_have_one(tmp_path, changes):
    regularization = GradientCoherentRegularization(**({"strength": 1.0} | changes))
    match = r"`target_sparsit.*` must be None.*strengths=9"
    refused(ValueError, match, trainer_for(tmp_path), regularization=regularization, target_sparsities=[0.5])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"max_strength": 1.0}, r"strengths=\[\.\.\., 1\.0\]"),
        ({"num_strengths": 9}, "strengths=9"),
        ({"max_epochs": 3}, "a Trainer with max_epochs=3"),
        ({"compare_plain": True}, "gate=None"),
    ],
)
def test_arguments_that_moved_say_where(tmp_path, old, new):
    refused(TypeError, f"is no longer an argument of find_strength. Write .*{new}", trainer_for(tmp_path), **old)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
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
    with pytest.raises(ValueError, match=r"`strengths` must be numbers with update='gradient' under an optimizer that"):
        search(trainer_for(tmp_path), learner(make_optimizer=adam), regularization=gradient, strengths=9)
    assert len(trainings) == 1, "no more than the first step was made"
    assert search(trainer_for(tmp_path), learner(make_optimizer=adam), regularization=gradient).trials[1].learned


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


def test_first_trial_that_failed_says_what_to_try(tmp_path):
    match = r"first trial with a penalty failed already: strength=100: .*\. Try less of it, strengths=\[1\] say"
    with pytest.raises(ValueError, match=match):
        search(trainer_for(tmp_path), learner(), strengths=[100.0, 1000.0])


class Unteachable(Learner):
    """Its loss tells nothing."""

    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


def test_model_that_does_not_learn_without_penalty(tmp_path):
    match = r"does not learn without a penalty: val_loss .*mode='min'. Check `mode`, train for longer"
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
    match = r"trials that end, and this Trainer trains without end. Give it `max_epochs`"
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
