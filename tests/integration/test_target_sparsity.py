"""A target instead of a strength: training arrives at the sparsity that was asked for, however it is done."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override
from unit.test_synchronization import NoHostNumbers

from lightning_gcsr import (
    CompressionMonitor,
    ElasticNet,
    Gate,
    GradientCoherentRegularization,
    GroupLasso,
    KeepZeros,
    Schedule,
    SparsityController,
)
from lightning_gcsr.core.sparsity_controller import dissolving_strength

from .models import (
    Adversaries,
    ManualRegression,
    MemoryLogger,
    Regression,
    ResumableLoader,
    Snapshots,
    Stream,
    fit,
    gate_of,
    make_trainer,
    momentum,
    same,
    samples,
    scaled,
    sgd,
    steps_of,
    weights_of,
)

BATCHES = 28
"""In an epoch; all are of one size, for a last one of five samples would bring zeros back at the very end."""
EPOCHS = 12
MISSES = pytest.mark.filterwarnings(r"ignore:gcsr. \d+\.\d % of the weights are zero at the end:UserWarning")
"""For trainings that are too short to arrive, in which something else is of interest."""


@cache
def digits() -> TensorDataset:
    """Handwritten digits of eight by eight pixels in a random order, which is the same in every call."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: BATCHES * 64]
    return TensorDataset(torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order])


def batches() -> ResumableLoader:
    return ResumableLoader(digits(), batch_size=64)


def fast_sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Digits(Regression):
    """A small classifier."""

    def __init__(self, make_optimizer: Callable[..., Optimizer] = fast_sgd, **kwargs: Any) -> None:
        super().__init__(**{"net": network()} | kwargs, make_optimizer=make_optimizer)

    @override
    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.training_steps += 1
        return self.loss(batch)


class ManualDigits(ManualRegression):
    """The same classifier, stepped by hand."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(net=network(), make_optimizer=fast_sgd, **kwargs)

    @override
    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)


class ScheduledDigits(Digits):
    """The learning rate rises from 0 over the first tenth, and then falls to a tenth along a line."""

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total = self.trainer.estimated_stepping_batches
        optimizer = self.make_optimizer(self.parameters())
        schedule = LambdaLR(optimizer, lambda step: min(10 * step / total, 1 - 0.9 * step / total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def regularization(**arguments: Any) -> GradientCoherentRegularization:
    return GradientCoherentRegularization(**({"target_sparsity": 0.9} | arguments))


def share_of_zeros(*weights: Tensor) -> float:
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def sparsity_of(module: nn.Module) -> float:
    """The share of zeros in all weights that are regularized by default."""
    return share_of_zeros(*(parameter for parameter in module.parameters() if parameter.dim() > 1))


def accuracy_of(module: Any) -> float:
    images, labels = digits().tensors
    return float((module.net(images).argmax(1) == labels).double().mean())


# -- it arrives ----------------------------------------------------------------------------------------------------

ARRIVES: dict[str, dict[str, Any]] = {
    "SGD, 50 %": {"target_sparsity": 0.5},
    "SGD, 90 %": {},
    "SGD, 98 %": {"target_sparsity": 0.98},
    "AdamW, 50 %": {"target_sparsity": 0.5, "model": lambda: Digits(adamw)},
    "AdamW, 90 %": {"model": lambda: Digits(adamw)},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2, "max_epochs": 2 * EPOCHS}},
    "by hand": {"model": ManualDigits},
    "by hand, every other batch": {
        "model": lambda: ManualDigits(every=2),
        "trainer": {"max_epochs": -1, "max_steps": BATCHES * EPOCHS},
    },
    "after a delay": {"schedule": Schedule(delay=0.2)},
    "until a stop, zeros kept": {"keep_zeros": True, "schedule": Schedule(stop=0.8)},
    "no measure": {"model": ScheduledDigits, "gate": None},
    "fan-in": {"strength_scale": "fan_in"},
    "elastic net": {"penalty": ElasticNet(0.5)},
    "scheduled": {"model": ScheduledDigits},
    "mixed precision": {"trainer": {"plugins": [scaled()]}},
}


@pytest.mark.parametrize("case", ARRIVES)
def test_training_arrives_at_the_target(tmp_path: Path, case: str) -> None:
    """Within one point; a warning that it did not would be an error."""
    arguments = dict(ARRIVES[case])
    model = arguments.pop("model", Digits)()
    callbacks = [KeepZeros()] if arguments.pop("keep_zeros", False) else []
    trainer = {"max_epochs": EPOCHS} | arguments.pop("trainer", {})
    callback = regularization(**arguments)
    fit(tmp_path, model, [callback, *callbacks], batches(), **trainer)
    assert steps_of(callback) == BATCHES * EPOCHS
    assert abs(sparsity_of(model) - callback.target_sparsity) <= 0.01
    assert accuracy_of(model) > 0.75


def test_long_training_arrives_at_the_target(tmp_path: Path) -> None:
    """With two hundred adaptations in these 3,000 steps it missed by 1.7 points."""
    model = ScheduledDigits()
    epochs = 3000 // BATCHES
    fit(tmp_path, model, regularization(target_sparsity=0.5), batches(), max_epochs=epochs)
    assert sparsity_of(model) == pytest.approx(0.5, abs=0.01)


@MISSES
def test_group_lasso_arrives_within_two_groups(tmp_path: Path) -> None:
    """The largest group holds the 32 weights of a pixel, more than a point of all."""
    model = ScheduledDigits()
    fit(tmp_path, model, regularization(penalty=GroupLasso(dim=1), target_sparsity=0.8), batches(), max_epochs=EPOCHS)
    assert sparsity_of(model) == pytest.approx(0.8, abs=2 * 32 / 2368)
    for layer in (model.net[0], model.net[2]):
        alive = (layer.weight != 0).any(0)
        assert share_of_zeros(layer.weight[:, alive]) == 0
        assert 0 < int(alive.sum()) < len(alive)
    assert accuracy_of(model) > 0.75


@pytest.mark.filterwarnings(r"ignore:second. \d+\.\d % of the weights are zero at the end:UserWarning")
def test_two_callbacks_arrive_at_targets_of_their_own(tmp_path: Path) -> None:
    model = Digits()
    targets = {"first": ("net.0.weight", 0.95), "second": ("net.2.weight", 0.5)}
    callbacks = [regularization(name=key, include=[name], target_sparsity=t) for key, (name, t) in targets.items()]
    fit(tmp_path, model, callbacks, batches(), max_epochs=EPOCHS)
    for name, target in targets.values():
        assert share_of_zeros(model.get_parameter(name)) == pytest.approx(target, abs=0.03)  # of 320 weights, 10
    assert callbacks[0].controller.strength != callbacks[1].controller.strength


def test_one_callback_with_a_target_beside_one_with_a_strength(tmp_path: Path) -> None:
    model, logger = Digits(), MemoryLogger()
    callbacks = [
        regularization(include=[r"net\.0"], exclude=["bias"]),
        regularization(
            name="plain", target_sparsity=None, strength=1e-3, include=[r"net\.2\.weight"], schedule=Schedule(warmup=0)
        ),
    ]
    fit(tmp_path, model, callbacks, batches(), max_epochs=EPOCHS, logger=logger)
    assert share_of_zeros(model.net[0].weight) == pytest.approx(0.9, abs=0.0101)
    assert set(logger.values("plain/strength")) == {1e-3}
    assert callbacks[1].controller is None


FROZEN: dict[str, Callable[[Digits], Optimizer]] = {
    "in the optimizer": lambda model: fast_sgd(model.parameters()),
    "not in the optimizer": lambda model: fast_sgd(model.net[2].parameters()),
}


@pytest.mark.parametrize("where", FROZEN)
def test_frozen_weights_are_not_asked_for_zeros(tmp_path: Path, where: str) -> None:
    """Six of seven weights are frozen: were they counted, all others would be made zero in vain."""
    model, callback = Digits(), regularization(target_sparsity=0.7)
    if where == "in the optimizer":
        model.net[0].requires_grad_(False)
    model.make_optimizer = lambda _: FROZEN[where](model)
    before = model.net[0].weight.detach().clone()
    fit(tmp_path, model, callback, batches(), max_epochs=EPOCHS)
    assert torch.equal(model.net[0].weight, before)
    assert share_of_zeros(model.net[2].weight) == pytest.approx(0.7, abs=0.0101)


# -- the strength --------------------------------------------------------------------------------------------------


class BeforeSteps(Callback):
    """Keeps the sparsity before each optimizer step."""

    def __init__(self) -> None:
        self.sparsities: list[float] = []

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.sparsities.append(sparsity_of(pl_module))


def slow_start(net: nn.Module, path: float) -> float:
    """The median over the layers of ⟨w,w⟩/⟨w,sign w⟩ over the path."""
    weights = [parameter.detach().double() for parameter in net.parameters() if parameter.dim() > 1]
    return statistics.median(float(w.square().sum() / w.abs().sum()) / path for w in weights)


WINDOWS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "all of it": ({}, {"max_epochs": 2}, (0, 56)),
    "accumulated": ({}, {"max_epochs": 3, "accumulate_grad_batches": 2}, (0, 42)),
    "a delay": ({"schedule": Schedule(delay=20)}, {"max_epochs": 2}, (20, 56)),
    "a stop": ({"schedule": Schedule(stop=0.5)}, {"max_epochs": 2}, (0, 28)),
    "both, every other step": ({"schedule": Schedule(delay=0.05, stop=0.95)}, {"max_epochs": 16}, (22, 426)),
    "max_steps": ({}, {"max_epochs": 9, "max_steps": 33}, (0, 33)),
    "a stop after the end": ({"schedule": Schedule(stop=1000)}, {"max_epochs": 2}, (0, 56)),
}


@MISSES
@pytest.mark.parametrize("case", WINDOWS)
def test_the_logged_strength_is_that_of_a_controller_that_sees_the_sparsity(tmp_path: Path, case: str) -> None:
    arguments, trainer, (first, last) = WINDOWS[case]
    model, callback, seen, logger = Digits(), regularization(**arguments), BeforeSteps(), MemoryLogger()
    start = slow_start(model, path=0.1 / (1 - 0.9) * (last - first))
    steps = fit(tmp_path, model, [callback, seen], batches(), logger=logger, **trainer).global_step

    control = SparsityController(0.9, start, first, last)
    expected = []
    for step in range(steps):
        if control.due(step):
            control.adapt(step, seen.sparsities[step])
        expected.append(control.strength if first <= step < last else 0.0)
    found = logger.values("gcsr/strength")
    assert len(found) == steps
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(found)) > min(30, (last - first) // 2)  # it moves
    assert callback.controller.strength == pytest.approx(control.strength, rel=1e-6)


@MISSES
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (sgd, {0: 0.1, 2: 0.1}),
        (fast_sgd, {0: 1.0, 2: 1.0}),
        (adamw, {0: 3e-3, 2: 3e-3}),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9, foreach=False), {0: 1.0, 2: 1.0}),
    ],
    ids=["sgd", "momentum", "adamw", "lr is a tensor"],
)
def test_the_first_strength_would_dissolve_the_median_tensor_in_the_training(
    tmp_path: Path, make: Any, path: dict[int, float]
) -> None:
    model, callback = Digits(make), regularization()
    spans = {i: float(w.square().sum() / w.abs().sum()) for i, w in ((i, model.net[i].weight.detach()) for i in (0, 2))}
    expected = statistics.median(spans[i] / (BATCHES * path[i]) for i in (0, 2))
    fit(tmp_path, model, callback, batches())
    assert math.exp(callback.controller.state_dict()["start"]) == pytest.approx(expected, rel=1e-5)


@MISSES
def test_learning_rates_of_their_own_make_ways_of_their_own_and_a_rate_of_zero_none(tmp_path: Path) -> None:
    model = Digits()
    net = model.net
    model.make_optimizer = lambda _: torch.optim.SGD(
        [{"params": net[0].parameters(), "lr": 0.5}, {"params": net[2].parameters(), "lr": 0.0}], lr=0.1
    )
    weight = net[0].weight.detach().clone()
    callback = regularization(target_sparsity=0.3)
    fit(tmp_path, model, callback, batches())
    expected = float(weight.square().sum() / weight.abs().sum()) / (0.5 * BATCHES)
    assert math.exp(callback.controller.state_dict()["start"]) == pytest.approx(expected, rel=1e-5)


@MISSES
def test_a_schedule_that_warms_up_from_zero_starts_from_the_rate_it_warms_up_to(tmp_path: Path) -> None:
    scheduled, plain = regularization(), regularization()
    fit(tmp_path, ScheduledDigits(), scheduled, batches())
    fit(tmp_path, Digits(), plain, batches())
    starts = [callback.controller.state_dict()["start"] for callback in (scheduled, plain)]
    assert starts[0] == starts[1]


@MISSES
def test_weights_that_are_all_zero_start_at_strength_one(tmp_path: Path) -> None:
    """Their gradient is that of the biases alone, and nothing is known of them."""
    model, callback = Digits(), regularization()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    fit(tmp_path, model, callback, batches())
    assert callback.controller.state_dict()["start"] == 0.0 == math.log(dissolving_strength({}, {}))


@MISSES
def test_the_console_hears_of_the_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(tmp_path, Digits(), regularization(), batches())
    expected = (
        "gcsr: L1() of a strength that makes 90 % of the weights zero, on 2,368 of 2,410 parameters, in 2 tensors."
    )
    assert expected in [record.getMessage() for record in caplog.records]


@MISSES
def test_the_number_of_zeros_is_asked_for_in_every_other_step_of_400_and_nothing_else_is(tmp_path: Path) -> None:
    asked: list[int] = []

    class Watched(GradientCoherentRegularization):
        @override
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with nullcontext() if trainer.global_step % 2 == 0 else NoHostNumbers():
                super().on_after_backward(trainer, pl_module)

        @override
        def _sparsity(self, trainer: Trainer) -> float:
            asked.append(trainer.global_step)
            return super()._sparsity(trainer)

    fit(tmp_path, Regression(), Watched(target_sparsity=0.5), max_epochs=100)
    assert asked == [*range(0, 400, 2), 400]  # once more at the end, to tell whether it arrived


@MISSES
def test_what_the_user_wrote_stays(tmp_path: Path) -> None:
    callback = regularization(schedule=Schedule(stop=0.5))
    fit(tmp_path, Digits(), callback, batches())
    assert (callback.target_sparsity, callback.schedule.stop, callback.schedule.warmup) == (0.9, 0.5, 0)


# -- resuming ------------------------------------------------------------------------------------------------------


class Save(Callback):
    """Saves a checkpoint when so many steps are made."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():  # not again in the window that follows
            trainer.save_checkpoint(self.path)


def saved(path: Path, callbacks: list[Callback], step: int, **trainer: Any) -> tuple[Path, Digits, MemoryLogger]:
    """Train to the end, leaving a checkpoint of a step in the middle."""
    model, logger, checkpoint = Digits(), MemoryLogger(), path / "middle.ckpt"
    callbacks = [*callbacks, Save(checkpoint, step)]
    fit(path, model, callbacks, batches(), logger=logger, **({"max_epochs": 3} | trainer))
    return checkpoint, model, logger


@MISSES
@pytest.mark.parametrize(
    ("arguments", "trainer"),
    [
        ({}, {}),
        ({"gate": None, "schedule": Schedule(delay=0.4, stop=0.9)}, {}),
        ({"penalty": "group_lasso"}, {}),
        ({}, {"accumulate_grad_batches": 2, "max_epochs": 6}),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [BATCHES - 5, BATCHES, 2 * BATCHES + 11])
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(
    tmp_path: Path, step: int, arguments: dict[str, Any], trainer: dict[str, Any]
) -> None:
    """Within an epoch, at its end, and where the target is reached already."""
    whole = regularization(**arguments)
    checkpoint, expected, whole_log = saved(tmp_path, [whole], step, **trainer)
    model, callback, logger = Digits(), regularization(**arguments), MemoryLogger()
    resumed = make_trainer(tmp_path, [callback], logger=logger, **({"max_epochs": 3} | trainer))
    resumed.fit(model, batches(), ckpt_path=checkpoint)
    assert same(weights_of(model), weights_of(expected))
    assert steps_of(callback) == steps_of(whole)
    assert callback.controller.state_dict() == whole.controller.state_dict()
    assert logger.values("gcsr/strength") == whole_log.values("gcsr/strength")[step:]
    assert sparsity_of(model) > 0 or arguments.get("stop_steps")


def test_a_run_resumes_between_two_adaptations(tmp_path: Path) -> None:
    """Of 420 steps every other one adapts the strength; 71 are made."""
    whole, trainer = regularization(), {"max_epochs": 15}
    checkpoint, expected, _ = saved(tmp_path, [whole], 71, **trainer)
    model, callback = Digits(), regularization()
    make_trainer(tmp_path, [callback], **trainer).fit(model, batches(), ckpt_path=checkpoint)
    assert same(weights_of(model), weights_of(expected))
    assert callback.controller.state_dict() == whole.controller.state_dict()


@MISSES
def test_the_strength_matters_to_the_resumed_run(tmp_path: Path) -> None:
    """The test above would notice if the controller began anew."""
    whole = regularization()
    path, expected, _ = saved(tmp_path, [whole], BATCHES)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"][whole.state_key]["controller"]
    torch.save(checkpoint, path)
    model = Digits()
    make_trainer(tmp_path, [regularization()], max_epochs=3).fit(model, batches(), ckpt_path=path)
    assert not same(weights_of(model), weights_of(expected))


@MISSES
def test_the_recipe_with_kept_zeros_resumes(tmp_path: Path) -> None:
    def recipe() -> list[Callback]:
        return [regularization(schedule=Schedule(stop=0.7)), KeepZeros()]

    for step in (40, 70):  # before and after the zeros are kept
        folder = tmp_path / str(step)
        folder.mkdir()
        path, expected, _ = saved(folder, recipe(), step)
        model = Digits()
        make_trainer(folder, recipe(), max_epochs=3).fit(model, batches(), ckpt_path=path)
        assert same(weights_of(model), weights_of(expected))


@MISSES
def test_the_state_is_plain_and_loads_weights_only(tmp_path: Path) -> None:
    callback, states = regularization(), []

    class Remember(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            states.append(callback.controller.state_dict())

    path, _, _ = saved(tmp_path, [callback, Remember()], 40)
    state = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
    assert state["controller"] == states[39]
    assert {type(value) for value in state["controller"].values()} == {float}
    assert "controller" not in GradientCoherentRegularization(strength=0.1).state_dict()


@MISSES
@pytest.mark.parametrize("target", [0.5, 0.97])
def test_a_changed_target_takes_effect_after_a_resume(tmp_path: Path, target: float) -> None:
    path, before, _ = saved(tmp_path, [regularization(target_sparsity=0.8)], BATCHES)
    model, callback = Digits(), regularization(target_sparsity=target)
    make_trainer(tmp_path, [callback], max_epochs=EPOCHS).fit(model, batches(), ckpt_path=path)
    assert sparsity_of(model) == pytest.approx(target, abs=0.02)
    assert abs(sparsity_of(before) - target) > 0.1


def test_a_run_with_a_strength_goes_on_with_a_target(tmp_path: Path) -> None:
    plain = GradientCoherentRegularization(strength=1e-3)
    path, _, _ = saved(tmp_path, [plain], BATCHES)
    model, callback = Digits(), regularization()
    make_trainer(tmp_path, [callback], max_epochs=EPOCHS).fit(model, batches(), ckpt_path=path)
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.0101)
    assert steps_of(callback) == EPOCHS * BATCHES


@MISSES
def test_a_run_with_a_target_goes_on_with_a_strength(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, [regularization()], BATCHES)
    callback, logger = GradientCoherentRegularization(strength=1e-3, gate=None), MemoryLogger()
    make_trainer(tmp_path, [callback], max_epochs=2, logger=logger).fit(Digits(), batches(), ckpt_path=path)
    assert set(logger.values("gcsr/strength")) == {1e-3}
    assert callback.controller is None


# -- going on, and beginning anew ----------------------------------------------------------------------------------


@MISSES
def test_a_second_fit_of_the_trainer_goes_on(tmp_path: Path) -> None:
    model, callback, logger = Digits(), regularization(), MemoryLogger()
    trainer = make_trainer(tmp_path, [callback], max_epochs=2, logger=logger)
    trainer.fit(model, batches())
    first, state, sparsity = callback.controller, callback.controller.state_dict(), sparsity_of(model)
    trainer.fit_loop.max_epochs = EPOCHS
    trainer.fit(model, batches())
    strengths = logger.values("gcsr/strength")
    assert abs(math.log(strengths[2 * BATCHES] / strengths[2 * BATCHES - 1])) <= 0.5 + 1e-9
    assert callback.controller is not first
    assert callback.controller.state_dict()["start"] == state["start"]
    assert steps_of(callback) == trainer.global_step == EPOCHS * BATCHES
    assert sparsity > 0.5
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.0101)


@MISSES
def test_a_new_trainer_with_the_same_callback_begins_anew(tmp_path: Path) -> None:
    callback, results = regularization(), []
    for _ in range(2):
        model, logger = Digits(), MemoryLogger()
        fit(tmp_path, model, callback, batches(), logger=logger, max_epochs=2)
        assert steps_of(callback) == 2 * BATCHES
        results.append((weights_of(model), logger.values("gcsr/strength"), callback.controller.state_dict()))
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


@MISSES
def test_a_longer_training_with_the_same_callback_takes_its_time(tmp_path: Path) -> None:
    """In the middle of the longer one less is wanted than at the end of the shorter one."""
    callback = regularization()
    for epochs in (2, 6):
        seen = BeforeSteps()
        fit(tmp_path, Digits(), [callback, seen], batches(), max_epochs=epochs)
        assert seen.sparsities[epochs * BATCHES // 10] < 0.7
        assert callback.controller.wanted(epochs * BATCHES // 2) < 0.9
        assert callback.controller.wanted(math.ceil(0.7 * epochs * BATCHES)) == pytest.approx(0.9)


@MISSES
def test_validating_a_checkpoint_leaves_the_controller_alone(tmp_path: Path) -> None:
    callback = regularization(target_sparsity=0.5)
    path, _, _ = saved(tmp_path, [regularization(target_sparsity=0.8)], 40)
    trainer = make_trainer(tmp_path, [callback], max_epochs=2)
    model = ValidatedDigits()
    trainer.fit(model, batches(), loader_of_two())
    state = callback.state_dict()["controller"]
    trainer.validate(model, loader_of_two(), ckpt_path=path, verbose=False)
    assert callback.state_dict()["controller"] == state
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, batches(), loader_of_two())
    assert callback.controller.state_dict()["start"] == state["start"]


def loader_of_two() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*(tensor[:128] for tensor in digits().tensors)), batch_size=64)


class ValidatedDigits(Digits):
    """The classifier with a validation loop."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("validation_loss", self.loss(batch))


@MISSES
def test_a_copy_of_the_callback_trains_apart(tmp_path: Path) -> None:
    callback = regularization()
    fit(tmp_path, Digits(), callback, batches())
    other = copy.deepcopy(callback)
    state = callback.controller.state_dict()
    fit(tmp_path, Digits(), other, batches(), max_epochs=2)
    assert callback.controller.state_dict() == state != other.controller.state_dict()


def test_trial_runs_of_the_tuner_neither_warn_nor_leave_a_trace(tmp_path: Path) -> None:
    class Tunable(Digits):
        lr = 0.1

        @override
        def train_dataloader(self) -> DataLoader[Any]:
            return batches()

    weights = []
    for tunes in (False, True):
        model, callback = Tunable(), regularization()
        trainer = make_trainer(tmp_path, [callback], max_epochs=2)
        if tunes:
            Tuner(trainer).lr_find(model, num_training=6, early_stop_threshold=None, update_attr=False)
            assert callback.controller is None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"gcsr. \d+\.\d % of the weights are zero at the end")
            trainer.fit(model)
        weights.append(weights_of(model))
    assert same(*weights)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, r"`strength` must be given, got strength=None\. `find_strength` finds one; or give `target_sp"),
        ({"strength": None, "target_sparsity": None}, TypeError, r"`strength` must be given"),
        (
            {"strength": 0.1, "target_sparsity": 0.9},
            ValueError,
            r"`strength` must be None where target_sparsity is given, got strength=0\.1\. Give one of the two",
        ),
        (
            {"strength": {"weight": 0.1}, "target_sparsity": 0.9},
            ValueError,
            r"`strength` must be None where target_sparsity is given, got strength=\{'weight': 0\.1\}",
        ),
        ({"strength": 0, "target_sparsity": 0.9}, ValueError, r"`strength` must be None where target_sparsity is gi"),
        (
            {"target_sparsity": 0.9, "schedule": Schedule(warmup=100)},
            ValueError,
            r"`warmup_steps` must be 0 where target_sparsity is given, got warmup_steps=100\. Leave it out: the wanted",
        ),
        (
            {"target_sparsity": 0.9, "schedule": Schedule(warmup=0.3)},
            ValueError,
            r"`warmup_steps` must be 0 where target_sparsity is given, got warmup_steps=0\.3",
        ),
        (
            {"target_sparsity": 0.9, "update": "gradient"},
            ValueError,
            r"`target_sparsity` must be None where update='gradient', .* Use update='proximal', or give a `strength`",
        ),
        (
            {"target_sparsity": 0.9, "penalty": "l2"},
            ValueError,
            r"`target_sparsity` must be None with L2\(\), which makes no weight exactly zero.*Use 'l1' or 'group_l",
        ),
        ({"target_sparsity": 0.9, "penalty": ElasticNet(0)}, ValueError, r"must be None with ElasticNet\(l1_ratio=0\)"),
        (
            {"target_sparsity": 90},
            ValueError,
            r"`target_sparsity` must be a number in \[0, 1\], got target_sparsity=90",
        ),
        ({"target_sparsity": 0}, ValueError, r"`target_sparsity` must lie between 0 and 1, got target_sparsity=0\."),
        ({"target_sparsity": 1.0}, ValueError, r"`target_sparsity` must lie between 0 and 1, got target_sparsity=1\.0"),
        ({"target_sparsity": float("nan")}, ValueError, r"`target_sparsity` must be a number in \[0, 1\], got .*nan"),
        ({"target_sparsity": "0.9"}, TypeError, r"`target_sparsity` must be a number in \[0, 1\], got .*'0\.9'"),
        ({"target_sparsity": True}, TypeError, r"`target_sparsity` must be a number in \[0, 1\], got .*True"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_wrong_argument_is_told_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientCoherentRegularization(**arguments)


@pytest.mark.parametrize("warmup", [None, 0, 0.0])
def test_no_warm_up_is_no_contradiction(warmup: Any) -> None:
    assert regularization(schedule=Schedule(warmup=warmup)).schedule.warmup == 0


def test_two_optimizers_that_step_the_weights_are_refused(tmp_path: Path) -> None:
    model = Adversaries(toggle=True)
    message = (
        r"gcsr: target_sparsity=0\.9 needs one optimizer that steps all of the weights, and 2 do\. Give each a callback"
        r" of its own, with `include` and a `name`\."
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, model, regularization())
    assert not model.gradients


@pytest.mark.filterwarnings(r"ignore:(generator|critic). \d+\.\d % of the weights are zero at the end:UserWarning")
@pytest.mark.parametrize("toggle", [True, False])
def test_two_optimizers_with_a_callback_each_are_fine(tmp_path: Path, toggle: bool) -> None:
    callbacks = [
        regularization(name=name, include=[rf"{name}\.weight"], target_sparsity=0.5) for name in ("generator", "critic")
    ]
    model, logger = Adversaries(toggle), MemoryLogger()
    fit(tmp_path, model, callbacks, logger=logger, max_epochs=5)
    for callback in callbacks:
        assert steps_of(callback) == 20
        strengths = logger.values(f"{callback.name}/strength")
        assert len(set(strengths)) > 10
        assert strengths[-1] == pytest.approx(callback.controller.strength)


@pytest.mark.filterwarnings(r"ignore:gcsr. \d+\.\d % of the weights are zero at the end:UserWarning")
def test_an_optimizer_of_other_weights_is_no_matter(tmp_path: Path) -> None:
    callback = regularization(include=[r"critic\.weight"])
    fit(tmp_path, Adversaries(toggle=True), callback, max_epochs=5)
    assert steps_of(callback) == 20


def test_a_penalty_that_stops_needs_no_length_of_the_training(tmp_path: Path) -> None:
    """A stream of unknown length, in which the number of steps to the stop is given."""
    model, callback = Digits(), regularization(target_sparsity=0.9, schedule=Schedule(stop=150))
    fit(tmp_path, model, [callback, KeepZeros()], DataLoader(Stream(batches().dataset), batch_size=32), max_epochs=12)
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": 2}], ids=str)
def test_a_training_of_unknown_length_is_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Endless epochs, or epochs of a length that nobody knows."""
    model = Regression()
    stream = DataLoader(Stream(samples()), batch_size=4)
    message = (
        r"gcsr: the way to target_sparsity=0\.9 is a share of the training, whose length is not known\. Give the"
        r" Trainer max_steps"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, model, regularization(), stream, **arguments)
    assert model.training_steps == 0


def test_a_stream_with_max_steps_has_an_end(tmp_path: Path) -> None:
    model, stream = Digits(), DataLoader(Stream(digits()), batch_size=64)
    fit(tmp_path, model, regularization(), stream, max_epochs=-1, max_steps=EPOCHS * BATCHES)
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.0101)


def test_asking_for_the_length_does_not_rewind_the_loader_of_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    data = TensorDataset(*(tensor[: 8 * 64] for tensor in digits().tensors))
    early = EarlyEnd(8)
    fit(tmp_path, Digits(), [regularization(), Save(path, 3), early], ResumableLoader(data, batch_size=64))
    seen: list[Tensor] = []

    class Remember(Callback):
        @override
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    trainer = make_trainer(tmp_path, [regularization(), Remember(), early])
    trainer.fit(Digits(), ResumableLoader(data, batch_size=64), ckpt_path=path)
    assert torch.equal(torch.cat(seen), data.tensors[0][3 * 64 :])


# -- where it does not arrive --------------------------------------------------------------------------------------


class EarlyEnd(Callback):
    """Stops the training after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


TOO_SHORT = (
    r"gcsr: \d+\.\d % of the weights are zero at the end, and target_sparsity=0\.99 asked for 99 %\. Train for longer,"
    r" or keep the learning rate up until 70 % of the training\.$"
)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_target_that_is_missed_is_warned_of_with_the_numbers(tmp_path: Path, steps: int) -> None:
    model = Digits()
    with pytest.warns(UserWarning, match=TOO_SHORT) as caught:
        fit(tmp_path, model, regularization(target_sparsity=0.99), batches(), max_steps=steps)
    [message] = [str(warning.message) for warning in caught if "at the end" in str(warning.message)]
    assert f"gcsr: {100 * sparsity_of(model):.1f} % of the weights" in message


def test_a_learning_rate_that_falls_too_early_misses(tmp_path: Path) -> None:
    class FallsEarly(ScheduledDigits):
        @override
        def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
            config = super().configure_optimizers()
            falls = LambdaLR(config["optimizer"], lambda step: max(0.0, 1 - step / BATCHES / 3))
            return config | {"lr_scheduler": {"scheduler": falls, "interval": "step"}}

    with pytest.warns(UserWarning, match=r"no weight gives way there\. See whether the learning rate is still up"):
        fit(tmp_path, FallsEarly(), regularization(), batches(), max_epochs=EPOCHS)


def test_a_strength_at_its_end_is_told_where_no_weight_gives_way(tmp_path: Path) -> None:
    """No gradient is ever parallel to the penalty: the gate never opens."""
    callback = regularization(gate=Gate("direction", scope="model", threshold=1.0))
    message = r"gcsr: 0\.0 % of the weights.*may not go further than \S+: no weight gives way there\. .* gcsr/injected"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, Digits(adamw), callback, batches(), max_epochs=3)
    assert callback.controller.at_its_end


def test_a_strength_at_its_other_end_is_told_where_there_are_too_many_zeros_anyway(tmp_path: Path) -> None:
    """Units that are dead from the start have no gradient."""
    model, callback = Digits(), regularization(target_sparsity=0.2)
    with torch.no_grad():
        model.net[0].weight[:20] = 0.0
        model.net[0].bias[:20] = -1.0
    message = r"asked for 20 %\. The strength may not fall below (\S+): zeros stay zero there\.$"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, model, callback, batches(), max_epochs=4)
    assert callback.controller.at_its_end
    assert sparsity_of(model) > 0.5


def test_zeros_that_nobody_keeps_after_the_stop_are_told_with_the_way_out(tmp_path: Path) -> None:
    message = r"Train for longer, .* After stop_steps, zeros stay zero only where `KeepZeros` keeps them\.$"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, Digits(), regularization(schedule=Schedule(stop=0.7)), batches(), max_epochs=3)


@pytest.mark.parametrize(("coherence", "advice"), [("agreement", r"\.$"), (None, r", or coherence='agreement'\.$")])
def test_a_layer_that_dies_is_told_to_want_less(tmp_path: Path, coherence: Any, advice: str) -> None:
    class Dies(Digits):
        @override
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                self.net[0].weight.zero_()

    model = Dies()
    model.make_optimizer = lambda _: fast_sgd(model.net[2].parameters())
    with pytest.warns(
        UserWarning, match=r"weights of 'net\.0\.weight' are as good.*Use a smaller target_spars.*" + advice
    ):
        fit(tmp_path, model, [regularization(gate=gate_of(coherence=coherence)), EarlyEnd(5)], batches())


@pytest.mark.parametrize("step", [1, 10, BATCHES])
def test_who_stops_early_is_not_warned(tmp_path: Path, step: int) -> None:
    model = Digits()
    trainer = fit(tmp_path, model, [regularization(), EarlyEnd(step)], batches(), max_epochs=EPOCHS)
    assert trainer.global_step == step
    assert abs(sparsity_of(model) - 0.9) > 0.01


def test_early_stopping_of_lightning_is_not_warned_of(tmp_path: Path) -> None:
    stop = EarlyStopping("gcsr/nonfinite_steps", patience=1, check_on_train_epoch_end=True)  # it never improves
    model, callback = Digits(), regularization()
    trainer = fit(tmp_path, model, [callback, stop], batches(), max_epochs=EPOCHS, logger=MemoryLogger())
    assert trainer.global_step == 2 * BATCHES


def test_a_training_that_fails_is_not_warned_of_but_raises(tmp_path: Path) -> None:
    class Fails(Callback):
        @override
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, Digits(), [regularization(), Fails()], batches())


def test_a_fast_development_run_is_not_warned_of(tmp_path: Path) -> None:
    model, callback = Digits(), regularization()
    fit(tmp_path, model, callback, batches(), fast_dev_run=2)
    assert steps_of(callback) == 2
    assert abs(sparsity_of(model) - 0.9) > 0.01


# -- modes of the Trainer ------------------------------------------------------------------------------------------


def test_a_barebones_trainer_arrives(tmp_path: Path) -> None:
    model = Digits()
    trainer = Trainer(
        barebones=True, accelerator="cpu", max_epochs=EPOCHS, callbacks=[regularization()], default_root_dir=tmp_path
    )
    trainer.fit(model, batches())
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.0101)


@MISSES
def test_a_logger_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for arguments in ({"logger": False}, {"logger": MemoryLogger()}, {"log_every_n_steps": 7}):
        model = Digits()
        fit(tmp_path, model, [regularization(), CompressionMonitor()], batches(), max_epochs=2, **arguments)
        weights.append(weights_of(model))
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


@MISSES
def test_the_logged_sparsity_is_the_one_that_is_controlled(tmp_path: Path) -> None:
    logger, seen = MemoryLogger(), BeforeSteps()
    callbacks = [regularization(), CompressionMonitor(), seen]
    fit(tmp_path, Digits(), callbacks, batches(), max_epochs=2, logger=logger)
    assert logger.values("sparsity/model")[:-1] == pytest.approx(seen.sparsities[1:])


@MISSES
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_batches_without_a_loss_are_no_steps(tmp_path: Path) -> None:
    callback = regularization(target_sparsity=0.5)
    fit(tmp_path, Regression(make_optimizer=momentum, none_at=[1]), callback, max_epochs=6)
    assert steps_of(callback) == 18


@MISSES
def test_no_hook_is_left_behind(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Digits(), regularization(), batches())
    [optimizer] = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks


@MISSES
def test_nothing_happens_outside_of_the_window(tmp_path: Path) -> None:
    plain, delayed = Snapshots(), Snapshots()
    fit(tmp_path, Digits(), plain, batches())
    fit(tmp_path, Digits(), [regularization(schedule=Schedule(delay=20)), delayed], batches())
    equal = [same(a, b) for a, b in zip(plain.weights, delayed.weights, strict=True)]
    assert equal == [True] * 20 + [False] * (BATCHES - 20)


# -- with_changes --------------------------------------------------------------------------------------------------

ALL_BUT_TARGET: dict[str, Any] = {
    "penalty": GroupLasso(dim=1),
    "strength": {"weight": 0.1},
    "target_sparsity": None,
    "strength_scale": "fan_in",
    "update": "gradient",
    "include": ["weight"],
    "exclude": [r"net\.2"],
    "name": "other",
    "log_per_parameter": True,
    "gate": Gate("direction", scope="parameter", threshold=0.3, tolerance=0.0, averaging=0.5),
    "schedule": Schedule(delay=3, warmup=0.25, stop=90),
}


def arguments_of(callback: GradientCoherentRegularization) -> dict[str, Any]:
    """What can be seen of the arguments from outside."""
    settings = dict(vars(callback.settings))
    own = {name: getattr(callback, name) for name in ("target_sparsity", "name", "log_per_parameter")}
    return settings | own | {"penalty": repr(settings["penalty"])}


def test_with_changes_keeps_every_argument_but_the_changed_ones() -> None:
    assert set(ALL_BUT_TARGET) == set(inspect.signature(GradientCoherentRegularization).parameters)
    defaults = arguments_of(GradientCoherentRegularization(strength=1.0))
    callback = GradientCoherentRegularization(**ALL_BUT_TARGET)
    expected = arguments_of(callback)
    differing = {name for name in expected if expected[name] != defaults[name]}
    assert differing == set(ALL_BUT_TARGET) - {"target_sparsity"}
    assert arguments_of(callback.with_changes()) == expected
    assert arguments_of(callback.with_changes(name="third", gate=Gate(threshold=0.4))) == expected | {
        "name": "third",
        "gate": Gate(threshold=0.4),
    }


def test_with_changes_lets_open_what_was_left_open() -> None:
    """The defaults depend on other arguments, which may be the ones that change."""
    callback = GradientCoherentRegularization(strength=0.1)
    plain = callback.with_changes(gate=None)
    target = callback.with_changes(strength=None, target_sparsity=0.9)
    for each, expected in ((callback, (0.98, 0.1, 0.3)), (plain, (0.0, 0.0, 0)), (target, (0.98, 0.1, 0))):
        assert (each.gate.averaging, each.gate.tolerance, each.schedule.warmup) == expected
    assert arguments_of(target.with_changes(strength=0.1, target_sparsity=None)) == arguments_of(callback)


@MISSES
def test_with_changes_knows_nothing_of_a_training_and_disturbs_none(tmp_path: Path) -> None:
    callback = regularization()
    fit(tmp_path, Digits(), callback, batches())
    state = callback.state_dict()
    other = callback.with_changes(target_sparsity=0.5)
    assert (other.regularizer, other.controller, other.state_dict()) == (None, None, {})
    fit(tmp_path, Digits(), other, batches())
    assert callback.state_dict()["controller"] == state["controller"]
    assert other.target_sparsity == 0.5 != callback.target_sparsity


@pytest.mark.parametrize("changes", [{}, {"name": "other"}], ids=str)
def test_with_changes_shares_nothing_that_can_change(changes: dict[str, Any]) -> None:
    callback = GradientCoherentRegularization(**ALL_BUT_TARGET)
    other = callback.with_changes(**changes)
    assert other.penalty is not callback.penalty
    other.penalty.dim = 0
    other.strength["bias"] = 1.0
    other.include.append("bias")
    again = callback.with_changes()
    assert repr(again.penalty) == repr(callback.penalty) == "GroupLasso(dim=1)"
    assert again.strength == callback.strength == {"weight": 0.1}
    assert again.include == callback.include == ["weight"]


def test_with_changes_does_not_share_the_changes_either() -> None:
    include = ["weight"]
    callback = regularization().with_changes(include=include)
    include.append("bias")
    assert callback.include == callback.with_changes().include == ["weight"]


def test_with_changes_of_a_subclass_is_one_of_the_subclass() -> None:
    class Mine(GradientCoherentRegularization):
        pass

    assert type(Mine(strength=0.1).with_changes(strength=0.2)) is Mine


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stregth": 0.1}, TypeError, "stregth"),
        ({"strength": 0.1}, ValueError, r"`strength` must be None where target_sparsity is given"),
        ({"target_sparsity": None}, TypeError, r"`strength` must be given"),
        ({"update": "gradient"}, ValueError, r"`target_sparsity` must be None where update='gradient'"),
    ],
    ids=str,
)
def test_with_changes_checks_as_the_constructor_does(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        regularization().with_changes(**changes)
