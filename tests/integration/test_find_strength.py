"""What `find_strength` finds: equal trials, failures cut short, the range, and Trainers of every kind."""

import math
import statistics
import threading
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from lightning_gcsr import GradientCoherentRegularization, KeepZeros, Schedule, find_strength
from lightning_gcsr.tuning.isolated_runs import Trials
from lightning_gcsr.tuning.strength_finder import ABOVE, BELOW

from .models import ManualRegression, Regression, loader, mlp, same, samples, scaled, weights_of
from .searching import (
    DEADLY,
    GENTLE,
    DroppingLearner,
    Learner,
    learner,
    learning_sgd,
    search,
    shuffled,
    trainer_for,
)


def strengths(result):
    return [trial.strength for trial in result.trials[1:]]


def learns_and_dies(result):
    """The gentle strength learns and the deadly one does not."""
    gentle, deadly = result.trials[1:]
    return gentle.learned and not deadly.learned


def ungated(**kwargs):
    """Always injects, without a warm-up."""
    return GradientCoherentRegularization(**({"strength": 1.0, "gate": None} | kwargs))


# -- the trials ------------------------------------------------------------------------------------------------------


def test_trials_are_told_apart(tmp_path):
    result = search(trainer_for(tmp_path), learner())
    reference, gentle, deadly = result.trials
    assert (reference.strength, reference.target_sparsity, reference.learned) == (0.0, None, True)
    assert (reference.sparsity, reference.injected, reference.steps) == (0.0, 0.0, 20)
    assert (gentle.strength, gentle.target_sparsity, gentle.learned) == (GENTLE, None, True)
    assert 0 < gentle.injected < 1
    assert gentle.weights == reference.weights == 40
    assert gentle.weight_norm < reference.weight_norm
    assert (deadly.strength, deadly.learned) == (pytest.approx(DEADLY), False)
    assert deadly.sparsity > 0.9
    assert result.metric == "val_loss"
    assert reference.metric < result.baseline


def test_frozen_weights_do_not_count(tmp_path):
    model = learner()
    model.net[0].requires_grad_(False)
    result = search(trainer_for(tmp_path), model, strengths=[GENTLE])
    assert [trial.weights for trial in result.trials] == [8, 8]


def test_reference_is_the_training_without_penalty(tmp_path):
    result = search(trainer_for(tmp_path), learner())
    trainer, model = trainer_for(tmp_path), learner()
    trainer.fit(model, loader(), loader())
    assert result.trials[0].metric == float(trainer.callback_metrics["val_loss"])


def test_trial_is_the_training_with_that_strength(tmp_path):
    result = search(trainer_for(tmp_path), learner(), strengths=[0.01])
    callback, model = GradientCoherentRegularization(strength=0.01), learner()
    trainer = trainer_for(tmp_path, [callback])
    trainer.fit(model, loader(), loader())
    trial = result.trials[1]
    assert trial.metric == float(trainer.callback_metrics["val_loss"])
    assert trial.weight_norm == pytest.approx(math.hypot(*callback.regularizer.weight_norms().values()))


def test_every_trial_starts_equal(tmp_path):
    """With dropout and shuffled data, too small a strength to matter gives the training without a penalty."""
    generator = torch.Generator().manual_seed(3)
    for train in (shuffled(), shuffled(generator=generator)):
        model, trainer = DroppingLearner(make_optimizer=learning_sgd), trainer_for(tmp_path)
        result = search(trainer, model, train, loader(), strengths=[1e-30, 2e-30])
        assert len({trial.metric for trial in result.trials}) == 1
        assert result == search(trainer, model, train, loader(), strengths=[1e-30, 2e-30])


class OwnData(DroppingLearner):
    """Holds its loader and brings it along."""

    def __init__(self):
        super().__init__(make_optimizer=learning_sgd)
        self.own = shuffled(generator=torch.Generator().manual_seed(3))

    def train_dataloader(self):
        return self.own

    def val_dataloader(self):
        return loader()


class OwnDataModule(LightningDataModule):
    """Holds a loader from the start and makes another; notes what is asked of it."""

    def __init__(self):
        super().__init__()
        self.own = shuffled(generator=torch.Generator().manual_seed(3))
        self.validation = None
        self.stages = []

    def setup(self, stage):
        self.validation = loader()
        self.stages.append(stage)

    def train_dataloader(self):
        return self.own

    def val_dataloader(self):
        return self.validation


@pytest.mark.parametrize("where", ["model", "datamodule"])
def test_every_trial_starts_equal_with_a_loader_held_elsewhere(tmp_path, where):
    model = OwnData() if where == "model" else DroppingLearner(make_optimizer=learning_sgd)
    datamodule = OwnDataModule() if where == "datamodule" else None
    generator = (datamodule or model).own.generator
    before = generator.get_state()
    result = find_strength(
        trainer_for(tmp_path),
        model,
        strengths=[1e-30, 2e-30],
        progress=False,
        datamodule=datamodule,
    )
    assert len({trial.metric for trial in result.trials}) == 1
    assert torch.equal(generator.get_state(), before)


def test_first_failure_ends_the_ascent(tmp_path):
    result = search(trainer_for(tmp_path), learner(), strengths=[GENTLE, DEADLY, 2 * DEADLY])
    assert len(strengths(result)) == 2
    assert [trial.learned for trial in result.trials[1:-1]] == [True] * (len(result.trials) - 2)
    assert not result.trials[-1].learned


def test_strengths_are_tried_in_growing_order(tmp_path):
    result = search(trainer_for(tmp_path), learner(), strengths=(1e-4, 1e-6, 1e-4, 1e-5))
    assert strengths(result) == [1e-6, 1e-5, 1e-4]
    assert result.tolerance_level == (1e-4, None)


def test_targets_are_tried_by_default_and_met(tmp_path):
    result = find_strength(trainer_for(tmp_path, max_epochs=50), learner(), loader(), loader(), progress=False)
    assert [trial.target_sparsity for trial in result.trials] == [None, 0.5, 0.75, 0.9, 0.95, 0.98][
        : len(result.trials)
    ]
    assert len(result.trials) > 3
    for trial in result.trials[1:]:
        assert trial.strength is None
        assert trial.sparsity == pytest.approx(trial.target_sparsity, abs=0.03)
    callback, model = GradientCoherentRegularization(target_sparsity=0.75), learner()
    trainer = trainer_for(tmp_path, [callback], max_epochs=50)
    trainer.fit(model, loader(), loader())
    assert result.trials[2].metric == float(trainer.callback_metrics["val_loss"])


# -- judged at the end -----------------------------------------------------------------------------------------------


class LateLearner(Learner):
    """Its validation is hopeless, and not even finite, until the last epoch."""

    def validation_step(self, batch, batch_idx):
        late = self.trainer.current_epoch == self.trainer.max_epochs - 1
        self.log("val_loss", self.loss(batch) if late or not self.trainer.training else torch.tensor(math.nan))


def test_trial_that_is_good_at_its_end_only_is_not_stopped(tmp_path):
    result = search(trainer_for(tmp_path), LateLearner(make_optimizer=learning_sgd), strengths=[GENTLE])
    assert [(trial.steps, trial.learned) for trial in result.trials] == [(20, True), (20, True)]


# -- stopped ----------------------------------------------------------------------------------------------------------


def deadly(result):
    assert not result.trials[-1].learned
    return result.trials[-1]


def test_trial_is_stopped_when_every_layer_is_dead(tmp_path):
    trial = deadly(
        search(trainer_for(tmp_path, max_epochs=12), learner(), regularization=ungated(), strengths=[GENTLE, 1e3])
    )
    assert trial.nonzeros == 0
    assert (trial.steps, trial.reason) == (10, "every layer has collapsed at step 10")


def test_trial_is_stopped_when_a_weight_is_not_finite(tmp_path):
    """The penalty's gradient overshoots further each step."""
    wild = ungated(penalty="l2", update="gradient")
    result = search(
        trainer_for(tmp_path, max_epochs=30, check_val_every_n_epoch=30),
        learner(),
        regularization=wild,
        strengths=[GENTLE, 1e6],
    )
    trial = deadly(result)
    assert trial.steps < result.trials[0].steps / 2
    assert "not finite" in trial.reason


# -- the range -------------------------------------------------------------------------------------------------------


def spans(net):
    """⟨w,w⟩/⟨w,sign w⟩ for each weight."""
    return [float((layer.weight.square().sum() / layer.weight.abs().sum()).detach()) for layer in (net[0], net[2])]


def default_range(tmp_path, model, regularization=None, **kwargs):
    found = search(trainer_for(tmp_path), model, strengths=4, regularization=regularization or ungated(), **kwargs)
    first = strengths(found)[0]
    return first, first * (ABOVE / BELOW)


def assert_range(found, centre):
    assert found == pytest.approx((BELOW * centre, ABOVE * centre), rel=1e-5)


def with_schedule(make_optimizer, make_schedule):
    class Scheduled(Learner):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": make_schedule(optimizer), "interval": "step"}]

    return Scheduled(make_optimizer=make_optimizer)


def test_default_range_is_centred_on_the_strength_that_zeros_the_median_tensor(tmp_path):
    centre = statistics.median(spans(mlp())) / (20 * 0.1 / (1 - 0.5))
    assert_range(default_range(tmp_path, learner()), centre)


def test_default_range_knows_the_schedule_of_the_learning_rate(tmp_path):
    model = with_schedule(
        lambda parameters: SGD(parameters, lr=0.4), lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step)
    )
    path = sum(0.4 * 0.9**step for step in range(20))
    assert_range(default_range(tmp_path, model), statistics.median(spans(mlp())) / path)


def test_default_range_under_adamw(tmp_path):
    """A step goes lr over the root mean square of the tensor's gradients, of which Adam keeps a running mean."""
    model = learner(make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    net, squares, paths = mlp(), [0.0, 0.0], [0.0, 0.0]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    for step, (inputs, targets) in enumerate(list(loader()) * 5, 1):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        for i, layer in enumerate((net[0], net[2])):
            squares[i] = 0.999 * squares[i] + 0.001 * float(layer.weight.grad.square().mean())
            paths[i] += 0.02 / math.sqrt(squares[i] / (1 - 0.999**step))
        optimizer.step()
    centre = statistics.median([span / path for span, path in zip(spans(mlp()), paths, strict=True)])
    assert_range(default_range(tmp_path, model), centre)


def test_default_range_knows_delay_and_warmup(tmp_path):
    slow = ungated(schedule=Schedule(delay=4, warmup=8))
    path = 0.2 * (sum(step / 8 for step in range(1, 9)) + 8)
    assert_range(default_range(tmp_path, learner(), slow), statistics.median(spans(mlp())) / path)


@pytest.mark.parametrize(
    ("kwargs", "relative"),
    [({"strength": {"net.0": 0.5, "net.2": 0.05}}, (1.0, 0.1)), ({"strength_scale": "fan_in"}, (5 / 6, 5 / 3))],
)
def test_default_range_knows_that_strengths_differ_between_tensors(tmp_path, kwargs, relative):
    """Of fan-ins 4 and 8 on 32 and 8 weights the mean is 4.8."""
    scaled_spans = [span / share for span, share in zip(spans(mlp()), relative, strict=True)]
    assert_range(default_range(tmp_path, learner(), ungated(**kwargs)), statistics.median(scaled_spans) / 4.0)


def test_default_range_holds_under_a_learning_rate_for_each_tensor(tmp_path):
    def make(parameters):
        weights = [parameter for parameter in parameters if parameter.dim() > 1]
        return SGD([{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.2}])

    first, second = spans(mlp())
    centre = statistics.median([first / (20 * 0.1), second / (20 * 0.2)])
    assert_range(default_range(tmp_path, learner(make_optimizer=make)), centre)


# -- the regularization ----------------------------------------------------------------------------------------------


def test_default_is_the_trainers_own_callback(tmp_path):
    own = GradientCoherentRegularization("l2", strength=123.0, gate=None, name="mine")
    given = search(trainer_for(tmp_path), learner(), regularization=own)
    assert search(trainer_for(tmp_path, [own]), learner()) == given
    assert own.regularizer is None
    assert own.strength == 123.0


def test_default_without_one_is_l1(tmp_path):
    given = search(trainer_for(tmp_path), learner(), regularization=GradientCoherentRegularization(strength=9.0))
    assert search(trainer_for(tmp_path), learner()) == given


def test_one_that_is_given_takes_the_place_of_the_trainers_own(tmp_path):
    own = GradientCoherentRegularization("l2", strength=1e6)
    assert search(trainer_for(tmp_path, [own]), learner(), regularization=ungated()) == search(
        trainer_for(tmp_path), learner(), regularization=ungated()
    )


def test_another_penalty_of_the_trainer_takes_part(tmp_path):
    other = GradientCoherentRegularization("l2", strength=0.5, gate=None, name="other", update="proximal")
    own = ungated(update="proximal")
    with_other = search(trainer_for(tmp_path, [other]), learner(), regularization=own)
    without = search(trainer_for(tmp_path), learner(), regularization=own)
    assert with_other.trials[0].weight_norm < without.trials[0].weight_norm
    assert other.regularizer is None


def test_several_strengths_keep_their_proportions(tmp_path):
    several = ungated(strength={"net.0": 0.2, "net.2": 0.02})
    result = search(trainer_for(tmp_path), learner(), regularization=several, strengths=[0.01])
    callback, model = ungated(strength={"net.0": 0.01, "net.2": 0.001}), learner()
    trainer_for(tmp_path, [callback]).fit(model, loader(), loader())
    assert result.trials[1].weight_norm == pytest.approx(math.hypot(*callback.regularizer.weight_norms().values()))
    assert several.strength == {"net.0": 0.2, "net.2": 0.02}


def test_weights_that_no_strength_is_for_are_not_counted(tmp_path):
    first_only = ungated(strength={"net.0": 0.2})
    assert {trial.weights for trial in search(trainer_for(tmp_path), learner(), regularization=first_only).trials} == {
        32
    }


def test_callback_with_a_target_sparsity_is_accepted(tmp_path):
    target = GradientCoherentRegularization(target_sparsity=0.9)
    assert learns_and_dies(search(trainer_for(tmp_path), learner(), regularization=target))
    assert target.target_sparsity == 0.9


def test_gradient_update_with_a_given_range(tmp_path):
    result = search(trainer_for(tmp_path), learner(), regularization=ungated(update="gradient"))
    assert learns_and_dies(result)


# -- the metric ------------------------------------------------------------------------------------------------------


class TrainingLoss(Regression):
    """Logs the mean loss of each epoch of training, and has no validation."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


class BothLosses(TrainingLoss, Learner):
    """The same beside a validation."""


@pytest.mark.parametrize("kind", [TrainingLoss, BothLosses])
def test_metric_of_the_training(tmp_path, kind):
    data = (loader(),) if kind is TrainingLoss else (loader(), loader())
    result = search(trainer_for(tmp_path), kind(make_optimizer=learning_sgd), *data, metric="train_loss")
    trainer = trainer_for(tmp_path)
    trainer.fit(kind(make_optimizer=learning_sgd), *data)
    assert result.trials[0].metric == float(trainer.callback_metrics["train_loss"])
    assert learns_and_dies(result)


def test_metric_that_is_better_when_larger(tmp_path):
    class Scored(Learner):
        def validation_step(self, batch, batch_idx):
            self.log("score", -self.loss(batch))

    result = search(trainer_for(tmp_path), Scored(make_optimizer=learning_sgd), metric="score", mode="max")
    assert learns_and_dies(result)
    assert result.mode == "max"
    assert result.trials[0].metric > result.baseline
    assert result.suggestion(tolerance=1).strength == GENTLE


@pytest.mark.parametrize(
    "kwargs",
    [
        {"check_val_every_n_epoch": 100},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": None, "val_check_interval": 7},
        {"limit_val_batches": 2},
        {"check_val_every_n_epoch": 2},
    ],
)
def test_metric_is_that_of_the_end_however_often_is_validated(tmp_path, kwargs):
    result = search(trainer_for(tmp_path, **kwargs), learner())
    model = learner()
    trainer_for(tmp_path).fit(model, loader(), loader())
    [metrics] = trainer_for(tmp_path, **kwargs).validate(model, loader(), verbose=False)
    assert result.trials[0].metric == metrics["val_loss"]
    assert learns_and_dies(result)


# -- Trainers of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        pytest.param({"plugins": [scaled()]}, id="loss scaler"),
        {"precision": "64-true"},
        {"max_steps": 18, "max_epochs": None},
        {"max_steps": 18},
        {"limit_train_batches": 3},
        {"min_epochs": 5, "min_steps": 20},
        {"reload_dataloaders_every_n_epochs": 1},
        {"deterministic": "warn"},
        {"enable_progress_bar": True, "enable_model_summary": True},
    ],
    ids=str,
)
def test_reference_trains_as_the_trainer_does(tmp_path, kwargs, capsys):
    data = loader(dtype=torch.float64 if kwargs.get("precision") == "64-true" else torch.float32)
    result = search(trainer_for(tmp_path, **kwargs), learner(), data, data)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    if "plugins" in kwargs:
        kwargs = {"plugins": [scaled()]}
    trainer, model = trainer_for(tmp_path, **(kwargs | quiet)), learner()
    trainer.fit(model, data, data)
    norm = math.hypot(*(float(model.net[i].weight.detach().norm()) for i in (0, 2)))
    assert result.trials[0].steps == trainer.global_step
    assert result.trials[0].weight_norm == pytest.approx(norm, rel=1e-6)
    assert learns_and_dies(result)
    assert not result.trials[-1].steps > result.trials[0].steps


@pytest.mark.parametrize("every", [1, 2])
def test_manual_optimization(tmp_path, every):
    class Manual(ManualRegression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

    result = search(trainer_for(tmp_path), Manual(every=every, make_optimizer=learning_sgd))
    assert learns_and_dies(result)
    assert result.trials[0].steps == 20 // every


def test_two_optimizers_stepped_by_hand_have_a_default_range(tmp_path):
    """The warm-up is counted by the steps of both, which take turns; of each the first step is left out."""

    class Two(Learner):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self):
            return [SGD(self.net[0].parameters(), lr=0.1), SGD(self.net[2].parameters(), lr=0.2)]

    slow = ungated(schedule=Schedule(warmup=20))
    factors = [min(1.0, step / 20) for step in range(1, 41)]
    paths = [0.1 * sum(factors[2::2]), 0.2 * sum(factors[3::2])]
    centre = statistics.median([span / path for span, path in zip(spans(mlp()), paths, strict=True)])
    assert_range(default_range(tmp_path, Two(), slow), centre)


@pytest.mark.parametrize(
    ("kwargs", "steps"), [({"max_steps": 14}, 14), ({"max_steps": 3}, 3), ({"max_epochs": 2}, 8)], ids=str
)
def test_length_of_a_trial(tmp_path, kwargs, steps):
    result = search(trainer_for(tmp_path, **kwargs), learner())
    assert result.trials[0].steps == result.trials[1].steps == steps
    assert result.trials[1].injected > 0


@pytest.mark.parametrize("what", ["datamodule", "list", "dict"])
def test_data_of_every_kind(tmp_path, what):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader()

    if what == "datamodule":
        result = search(trainer_for(tmp_path), learner(), datamodule=Data())
    else:
        validation = [loader()] if what == "list" else {"a": loader()}
        result = search(trainer_for(tmp_path), learner(), loader(), validation)
    assert result == search(trainer_for(tmp_path), learner())


class Planned(Learner):
    """Its schedule is laid out for the whole training."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        assert steps == 20
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.2, total_steps=steps), "interval": "step"}]


class Plateau(Learner):
    """Its schedule waits for a metric of the validation."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer, patience=0), "monitor": "val_loss"},
        }


class Stepped(Learner):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 2)]


@pytest.mark.parametrize("kind", [Planned, Plateau, Stepped])
def test_schedules_run_as_in_the_training(tmp_path, kind):
    result = search(trainer_for(tmp_path), kind(make_optimizer=learning_sgd))
    trainer = trainer_for(tmp_path)
    trainer.fit(kind(make_optimizer=learning_sgd), loader(), loader())
    assert result.trials[0].metric == float(trainer.callback_metrics["val_loss"])


def test_plateau_does_not_stop_a_trial_that_ends_before_its_first_validation(tmp_path):
    result = search(trainer_for(tmp_path, max_steps=3), Plateau(make_optimizer=learning_sgd))
    assert result.trials[0].steps == 3


# -- callbacks -------------------------------------------------------------------------------------------------------


class Recorder(Callback):
    """Notes on which Trainer it was called; its notes are shared by its copies."""

    def __init__(self, notes):
        self.notes = notes
        self.own = 0

    def __deepcopy__(self, memo):
        copied = type(self)(self.notes)
        memo[id(self)] = copied
        return copied

    def on_train_start(self, trainer, pl_module):
        self.own += 1
        self.notes.append(trainer)


def test_accumulation_schedule_takes_part(tmp_path):
    scheduler = GradientAccumulationScheduler({0: 2})
    result = search(trainer_for(tmp_path, [scheduler]), learner())
    assert result.trials[0].steps == 10


def test_kept_zeros_take_part(tmp_path):
    kept = KeepZeros(start=4)
    result = search(
        trainer_for(tmp_path, [kept]), learner(), regularization=ungated(schedule=Schedule(stop=4)), strengths=[0.05]
    )
    without = search(
        trainer_for(tmp_path), learner(), regularization=ungated(schedule=Schedule(stop=4)), strengths=[0.05]
    )
    assert result.trials[1].sparsity > without.trials[1].sparsity


def test_other_callbacks_do_not_run(tmp_path):
    notes = []
    callbacks = [
        Recorder(notes),
        EarlyStopping("no such metric"),
        ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1),
        LearningRateMonitor(),
        RichProgressBar(),
    ]
    trainer = trainer_for(
        tmp_path,
        callbacks,
        logger=CSVLogger(tmp_path, name="log"),
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    assert learns_and_dies(search(trainer, learner()))
    assert notes == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attached", [False, True])
def test_further_callbacks_run_as_copies(tmp_path, attached):
    """Those that are named may be the Trainer's own."""
    notes = []
    mine, other = Recorder(notes), Recorder([])
    trainer = trainer_for(tmp_path, [mine, other] if attached else [other])
    result = search(trainer, learner(), callbacks=[mine])
    assert len(notes) == 1 + len(result.trials)  # and one for a first step
    assert len(set(map(id, notes))) == len(notes)
    assert trainer not in notes
    assert mine.own == 0
    assert other.notes == []


def test_callbacks_of_the_module_do_not_run(tmp_path):
    notes = []

    class Configured(Learner):
        def configure_callbacks(self):
            return [Recorder(notes), EarlyStopping("no such metric")]

    assert learns_and_dies(search(trainer_for(tmp_path), Configured(make_optimizer=learning_sgd)))
    assert notes == []


# -- models ----------------------------------------------------------------------------------------------------------


def test_model_that_makes_its_layers_late(tmp_path):
    class Late(Learner):
        def __init__(self):
            super().__init__(make_optimizer=learning_sgd)
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    model = Late()
    result = search(trainer_for(tmp_path), model)
    assert learns_and_dies(result)
    assert model.net is None
    assert result == search(trainer_for(tmp_path), model)


def test_compiled_network(tmp_path):
    compiled = learner()
    compiled.net = torch.compile(mlp(), backend="eager")
    assert [trial.learned for trial in search(trainer_for(tmp_path), compiled).trials] == [True, True, False]


class Uncopied(torch.utils.data.TensorDataset):
    """Data that are too many to be copied."""

    def __deepcopy__(self, memo):
        raise AssertionError("the data were copied")


def test_data_of_the_model_are_shared(tmp_path):
    seen = []

    class Holding(Learner):
        def __init__(self):
            super().__init__(make_optimizer=learning_sgd)
            self.data = Uncopied(*samples().tensors)

        def train_dataloader(self):
            seen.append(self.data)
            return DataLoader(self.data, batch_size=4)

    model = Holding()
    result = find_strength(
        trainer_for(tmp_path),
        model,
        val_dataloaders=loader(),
        strengths=[GENTLE, DEADLY],
        progress=False,
    )
    assert learns_and_dies(result)
    assert all(data is model.data for data in seen)
    assert len(seen) == 4


def test_data_that_are_passed_are_shared(tmp_path):
    data = DataLoader(Uncopied(*samples().tensors), batch_size=4)
    assert learns_and_dies(search(trainer_for(tmp_path), learner(), data, data))


def test_model_that_another_trainer_has_trained(tmp_path):
    """That Trainer, with a lock in it that cannot be copied, is not."""

    class Locked(Callback):
        lock = None

        def setup(self, trainer, pl_module, stage):
            self.lock = threading.Lock()

    model = learner()
    earlier = trainer_for(tmp_path, [Locked()], max_epochs=1)
    earlier.fit(model, loader(), loader())
    before = weights_of(model)
    result = search(trainer_for(tmp_path), model)
    assert learns_and_dies(result)
    assert model.trainer is earlier
    assert same(before, weights_of(model))


def test_trainer_that_has_validated(tmp_path):
    trainer, model = trainer_for(tmp_path), learner()
    trainer.validate(model, loader(), verbose=False)
    assert search(trainer, model) == search(trainer_for(tmp_path), learner())


def test_search_in_another_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(search(trainer_for(tmp_path), learner())))
    thread.start()
    thread.join()
    assert learns_and_dies(found[0])


def test_trials_share_no_weights(tmp_path):
    """Two trainings of the same trial are equal and apart."""
    model = learner()
    trials = Trials(trainer_for(tmp_path), model, loader(), loader())
    first, second = (trials.fit(()).lightning_module for _ in range(2))
    assert same(weights_of(first), weights_of(second))
    assert not same(weights_of(first), weights_of(model))
    assert {parameter.data_ptr() for parameter in first.parameters()}.isdisjoint(
        parameter.data_ptr() for parameter in (*second.parameters(), *model.parameters())
    )


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_shows_each_trial_with_strength_and_verdict(tmp_path, capsys):
    result = search(trainer_for(tmp_path), learner(), progress=True)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3
    assert "no penalty" in lines[0]
    assert all(f"val_loss {trial.metric:.4g}" in line for line, trial in zip(lines, result.trials, strict=True))
    assert "strength=0.0001      learned" in lines[1]
    assert "strength=10          failed" in lines[2]
    assert result.trials[2].reason in lines[2]
    assert "Finding the strength" in printed.err
    assert "strength 0.0001" in printed.err
    assert "3/3" in printed.err


def test_progress_can_be_silenced(tmp_path, capsys):
    search(trainer_for(tmp_path, enable_progress_bar=True, enable_model_summary=True), learner())
    assert capsys.readouterr() == ("", "")


def test_random_state_of_numpy_is_part_of_a_trial(tmp_path):
    np.random.seed(1)
    first = search(trainer_for(tmp_path), DroppingLearner(make_optimizer=learning_sgd))
    np.random.seed(2)
    assert search(trainer_for(tmp_path), DroppingLearner(make_optimizer=learning_sgd)) != first


def test_advice_of_lightning_is_given_once(tmp_path):
    class Advising(Learner):
        def on_train_start(self):
            warnings.warn("advice", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = search(trainer_for(tmp_path), Advising(make_optimizer=learning_sgd))
    assert len(result.trials) == 3
    assert [str(warning.message) for warning in caught].count("advice") == 1
