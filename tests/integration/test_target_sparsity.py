"""``target_sparsity``: training arrives at the fraction of zeros that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import TensorDataset
from typing_extensions import override

from lightning_gcsr import ElasticNet, GradientCoherentRegularization, GroupLasso, KeepZeros, Schedule

from .models import (
    Adversaries,
    ManualRegression,
    MemoryLogger,
    Regression,
    ResumableLoader,
    Snapshots,
    Stream,
    fit,
    make_trainer,
    same,
    scaled,
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
    """The sparsity of all weights that are regularized by default."""
    return share_of_zeros(*(parameter for parameter in module.parameters() if parameter.dim() > 1))


def accuracy_of(module: Any) -> float:
    images, labels = digits().tensors
    return float((module.net(images).argmax(1) == labels).double().mean())


# -- it arrives ----------------------------------------------------------------------------------------------------


class OneCycleDigits(Digits):
    """OneCycle, whose learning rate begins near zero and ends at nothing."""

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer(self.parameters())
        schedule = OneCycleLR(optimizer, 3e-3, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Lion(Optimizer):
    """Steps by the sign of an average of the gradients (Chen et al., arXiv:2302.06675)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 5e-4) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                parameter.add_(average.lerp(parameter.grad, 0.1).sign_(), alpha=-group["lr"])
                average.lerp_(parameter.grad, 0.01)
        return loss


ARRIVES: dict[str, dict[str, Any]] = {
    "SGD, constant, 50 %": {"target_sparsity": 0.5},
    "SGD, warm-up and decay, 95 %": {"model": ScheduledDigits, "target_sparsity": 0.95},
    "AdamW, OneCycle, 90 %": {"model": lambda: OneCycleDigits(adamw)},
    "AdamW, constant, 80 %": {"model": lambda: Digits(adamw), "target_sparsity": 0.8},
    "Lion, constant, 50 %": {"model": lambda: Digits(Lion), "target_sparsity": 0.5},
    "SGD, 98 %": {"target_sparsity": 0.98},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2, "max_epochs": 2 * EPOCHS}},
    "by hand, every fourth batch": {"model": lambda: ManualDigits(every=4), "trainer": {"max_epochs": 2 * EPOCHS}},
    "after a delay": {"schedule": Schedule(delay=0.2)},
    "until a stop, zeros kept": {"keep_zeros": True, "schedule": Schedule(stop=0.8)},
    "no gate": {"model": ScheduledDigits, "gate": None, "target_sparsity": 0.5},
    "fan-in": {"strength_scale": "fan_in"},
    "elastic net": {"penalty": ElasticNet(0.5)},
    "mixed precision": {"trainer": {"plugins": [scaled()]}},
}


@pytest.mark.parametrize("case", ARRIVES)
def test_training_arrives_at_the_target(tmp_path: Path, case: str) -> None:
    """Within half a point; a warning that it did not would be an error."""
    arguments = dict(ARRIVES[case])
    model = arguments.pop("model", Digits)()
    callbacks = [KeepZeros()] if arguments.pop("keep_zeros", False) else []
    trainer = {"max_epochs": EPOCHS} | arguments.pop("trainer", {})
    callback = regularization(**arguments)
    fit(tmp_path, model, [callback, *callbacks], batches(), **trainer)
    assert abs(sparsity_of(model) - callback.target_sparsity) <= 0.005
    assert accuracy_of(model) > 0.7  # at 98 % 47 weights are left


def test_a_training_of_two_epochs_arrives(tmp_path: Path) -> None:
    model = Digits(adamw)
    fit(tmp_path, model, regularization(), batches(), max_epochs=2)
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.01)


@MISSES
def test_group_lasso_arrives_within_two_groups(tmp_path: Path) -> None:
    model = Digits()
    penalty = GroupLasso(dim=1)  # the largest group has 32 of 2,368 weights
    fit(tmp_path, model, regularization(penalty=penalty, target_sparsity=0.5), batches(), max_epochs=EPOCHS)
    assert abs(sparsity_of(model) - 0.5) <= 2 * 32 / 2368
    assert all(bool((column == 0).all()) or bool((column != 0).all()) for column in model.net[0].weight.t())


def test_two_callbacks_arrive_at_targets_of_their_own(tmp_path: Path) -> None:
    model = Digits()
    callbacks = [
        regularization(include=[r"^net\.0\.weight"], target_sparsity=0.9),
        regularization(include=[r"^net\.2\.weight"], target_sparsity=0.5, name="second"),
    ]
    fit(tmp_path, model, callbacks, batches(), max_epochs=EPOCHS)
    assert share_of_zeros(model.net[0].weight) == pytest.approx(0.9, abs=0.005)
    assert share_of_zeros(model.net[2].weight) == pytest.approx(0.5, abs=0.01)


def test_frozen_weights_are_not_asked_for_zeros(tmp_path: Path) -> None:
    model = Digits()
    model.net[2].requires_grad_(False)
    frozen = model.net[2].weight.detach().clone()
    fit(tmp_path, model, regularization(target_sparsity=0.5), batches(), max_epochs=EPOCHS)
    assert torch.equal(model.net[2].weight, frozen)
    assert share_of_zeros(model.net[0].weight) == pytest.approx(0.5, abs=0.005)


def test_the_sparsity_follows_the_curve_and_the_log_says_the_strength_in_force(tmp_path: Path) -> None:
    class Sparsities(Snapshots):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(sparsity_of(pl_module))

    seen: list[float] = []
    logger, callback = MemoryLogger(), regularization()
    fit(tmp_path, Digits(adamw), [callback, Sparsities()], batches(), max_epochs=EPOCHS, logger=logger)
    assert callback.controller is not None
    total = BATCHES * EPOCHS
    behind = [callback.controller.wanted(i / total) - sparsity for i, sparsity in enumerate(seen)]
    assert max(map(abs, behind)) < 0.1
    strengths = logger.values("gcsr/strength")
    assert len(strengths) == total
    assert all(strength >= 0 for strength in strengths)
    assert max(strengths) > 0


# -- a resumed run, and a second one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [BATCHES - 5, 2 * BATCHES])
@pytest.mark.parametrize("optimizer", [fast_sgd, adamw])
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(
    tmp_path: Path, step: int, optimizer: Callable[..., Optimizer]
) -> None:
    whole = Digits(optimizer)
    fit(tmp_path, whole, regularization(), batches(), max_epochs=4)

    class Stop(Snapshots):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    fit(tmp_path, Digits(optimizer), [regularization(), Stop()], batches(), max_epochs=4)
    resumed = Digits(optimizer)
    trainer = make_trainer(tmp_path, [regularization()], max_epochs=4)
    trainer.fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert same(weights_of(resumed), weights_of(whole))
    assert sparsity_of(resumed) == pytest.approx(0.9, abs=0.01)


def test_a_changed_target_takes_effect_after_a_resume(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, [regularization(target_sparsity=0.5)], max_epochs=4)
    first.fit(Digits(), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    model = Digits()
    trainer = make_trainer(tmp_path, [regularization()], max_epochs=EPOCHS)
    trainer.fit(model, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.005)


def test_a_new_trainer_with_the_same_callback_begins_anew(tmp_path: Path) -> None:
    callback, models = regularization(), [Digits(), Digits()]
    for model in models:
        fit(tmp_path, model, callback, batches(), max_epochs=4)
    assert same(*map(weights_of, models))


def test_a_logger_changes_nothing(tmp_path: Path) -> None:
    models = [Digits(), Digits()]
    for model, logger in zip(models, (MemoryLogger(), False), strict=True):
        fit(tmp_path, model, regularization(), batches(), max_epochs=2, logger=logger)
    assert same(*map(weights_of, models))


# -- what is refused, and what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_sparsity": 1.0}, ValueError, r"`target_sparsity` must lie between 0 and 1"),
        ({"target_sparsity": "90 %"}, TypeError, r"`target_sparsity` must be a number in \[0, 1\]"),
        ({"update": "gradient"}, ValueError, r"`target_sparsity` must be None where update='gradient'"),
        ({"update": "proximal"}, ValueError, r"Use update='dual_averaging'"),
        ({"penalty": "l2"}, ValueError, r"makes no weight exactly zero"),
        ({"strength": 0.1}, ValueError, r"`strength` must be None where target_sparsity is given"),
        ({"schedule": Schedule(warmup=10)}, ValueError, r"`warmup` must be 0 where target_sparsity is given"),
        ({"target_sparsity": None}, TypeError, r"`strength` must be given"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regularization(**arguments)


def test_two_optimizers_that_step_the_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="needs one optimizer that steps all of the weights, and 2 do"):
        fit(tmp_path, Adversaries(toggle=True), regularization())


@pytest.mark.filterwarnings(r"ignore:(generator|critic). \d+\.\d % of the weights are zero at the end:UserWarning")
def test_two_optimizers_with_a_callback_each_are_fine(tmp_path: Path) -> None:
    parts = ("generator", "critic")
    callbacks = [regularization(include=[rf"^{part}\.weight"], target_sparsity=0.5, name=part) for part in parts]
    model = Adversaries(toggle=True)
    fit(tmp_path, model, callbacks, max_epochs=40)
    assert all(0 < share_of_zeros(getattr(model, part).weight) < 1 for part in parts)


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": 2}], ids=str)
def test_a_training_of_unknown_length_is_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    data = torch.utils.data.DataLoader(Stream(digits()), batch_size=64)
    with pytest.raises(Exception, match="whose length is not known"):
        fit(tmp_path, Digits(), regularization(), data, **arguments)


def test_a_stream_with_max_steps_has_an_end(tmp_path: Path) -> None:
    model, data = Digits(), torch.utils.data.DataLoader(Stream(digits()), batch_size=64)
    callback = regularization()
    fit(tmp_path, model, callback, data, max_epochs=-1, max_steps=200)
    assert steps_of(callback) == 200
    assert sparsity_of(model) == pytest.approx(0.9, abs=0.005)


def test_a_target_that_is_missed_is_warned_of_with_the_numbers(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"gcsr: \d+\.\d % of the weights are zero at the end, and target_sparsity=0\.9"
    ):
        fit(tmp_path, Digits(), regularization(), batches(), max_steps=1)
