"""Nothing is silent: set-ups in which the penalty would not act go on, are refused by name, or are warned of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_gcsr import (
    CompressionMonitor,
    Gate,
    GradientCoherentRegularization,
    KeepZeros,
    Schedule,
    SparsityController,
)

from .models import (
    ManualRegression,
    MemoryLogger,
    Regression,
    fit,
    largest_difference,
    mlp,
    same,
    scaled,
    sgd,
    weights_of,
)

UPDATES = pytest.mark.parametrize("update", ["proximal", "dual_averaging", "gradient"])


def penalty(**arguments: Any) -> GradientCoherentRegularization:
    return GradientCoherentRegularization(**({"strength": 0.05, "gate": None} | arguments))


# -- followed ------------------------------------------------------------------------------------------------------


class Renew(Callback):
    """A fresh optimizer in the second epoch, as between folds."""

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)


class Replace(Callback):
    """A new Parameter in the place of the first, in the module and, if told to, in the optimizer."""

    def __init__(self, in_optimizer: bool = True) -> None:
        self.in_optimizer = in_optimizer

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            old, new = pl_module.net[0].weight, nn.Parameter(pl_module.net[0].weight.detach().clone())
            pl_module.net[0].weight = new
            listed = trainer.optimizers[0].param_groups[0]["params"]
            index = [parameter is old for parameter in listed].index(True)
            if self.in_optimizer:
                listed[index] = new
            else:
                del listed[index]


@UPDATES
@pytest.mark.parametrize("change", [Renew, Replace])
def test_what_is_made_anew_in_mid_fit_is_followed(tmp_path: Path, update: Any, change: Any) -> None:
    """Plain SGD has no state, so that the weights are those of a fit in which nothing was exchanged."""
    weights = []
    for others in ([], [change()]):
        model = Regression()
        fit(tmp_path, model, [*others, penalty(update=update), KeepZeros(6)], max_epochs=3)
        weights.append(weights_of(model))
    assert largest_difference(*weights) < 1e-6


def test_a_parameter_that_no_optimizer_holds_any_more_is_warned_of_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"gcsr: since step 4 no optimizer holds 'net\.0\.weight'") as caught:
        fit(tmp_path, Regression(), [Replace(in_optimizer=False), penalty()], max_epochs=3)
    assert len([warning for warning in caught if "no optimizer holds" in str(warning.message)]) == 1


def test_the_monitor_counts_the_parameter_in_use(tmp_path: Path) -> None:
    model, monitor = Regression(), CompressionMonitor(verbose=False)
    trainer = fit(tmp_path, model, [Replace(), penalty(strength=0.2), monitor], max_epochs=3)
    real = sum(int((p == 0).sum()) for p in (model.net[0].weight, model.net[2].weight)) / 40
    assert float(trainer.callback_metrics["sparsity/model"]) == pytest.approx(real)


# -- optimizers without hooks, with a step of their own, or with other weights -------------------------------------


class Wrapper(Optimizer):
    """A wrapper that keeps its hooks in a plain dict and calls none of them, as some Lookahead do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.state, self.defaults = optimizer, optimizer.state, optimizer.defaults
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()


@UPDATES
@pytest.mark.parametrize("make", [Regression, ManualRegression])
def test_an_optimizer_that_calls_no_hooks_is_regularized_all_the_same(tmp_path: Path, make: Any, update: Any) -> None:
    weights = []
    for make_optimizer in (sgd, lambda parameters: Wrapper(sgd(parameters))):
        model = make(make_optimizer=make_optimizer)
        fit(tmp_path, model, [penalty(update=update, schedule=Schedule(stop=6)), KeepZeros()], max_epochs=2)
        weights.append(weights_of(model))
    assert same(*weights)


def test_an_optimizer_without_hooks_is_refused_under_a_loss_scale(tmp_path: Path) -> None:
    model = Regression(make_optimizer=lambda parameters: Wrapper(sgd(parameters)))
    with pytest.raises(MisconfigurationException, match=r"does not support Wrapper with precision='16-mixed'.*bf16"):
        fit(tmp_path, model, penalty(), plugins=[scaled()])
    assert model.training_steps == 0


class ScheduleFree(SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class Rewinding(SGD):
    """Has the two halves of a step that sharpness-aware minimization has."""

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


def with_group(**group: Any) -> Any:
    def make(parameters: Any) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        optimizer.param_groups[0].update(group)
        return optimizer

    return make


@pytest.mark.parametrize(
    ("make_optimizer", "update", "message"),
    [
        (lambda p: ScheduleFree(p, lr=0.1), "proximal", r"ScheduleFree is not supported: it evaluates an average"),
        (lambda p: Rewinding(p, lr=0.1), "dual_averaging", r"Rewinding with update='dual_averaging' is not supported"),
        (with_group(relative_step=True), "proximal", r"AdamW with relative_step=True.*relative_step=False"),
        (with_group(lr=None), "proximal", r"AdamW with lr=None is not supported"),
        (lambda p: torch.optim.Rprop(p), "proximal", r"Rprop with update='proximal' is not supported.*AdamW or SGD"),
    ],
)
def test_optimizers_whose_zeros_or_steps_would_be_others_are_refused(
    tmp_path: Path, make_optimizer: Any, update: Any, message: str
) -> None:
    model = Regression(make_optimizer=make_optimizer)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, model, penalty(update=update))
    assert model.training_steps == 0


class ByHalves(ManualRegression):
    """Steps by the two halves of its optimizer, which Lightning knows nothing of."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.optimizers().first_step()


def test_steps_by_halves_are_warned_of_with_the_way_that_works(tmp_path: Path) -> None:
    model = ByHalves(make_optimizer=lambda p: Rewinding(p, lr=0.1))
    with pytest.warns(UserWarning, match=r"an epoch passed without .*Step Rewinding by `optimizer\.step\(closure\)`"):
        fit(tmp_path, model, penalty(update="proximal"))


class HalfRaw(ManualRegression):
    """Every second step goes behind Lightning's back."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=batch_idx % 2 == 0)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_some_steps_that_lightning_does_not_know_of_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"SGD made 2 step\(s\) that Lightning does not know of"):
        fit(tmp_path, HalfRaw(), penalty())


# -- what is said at the start and at the end ------------------------------------------------------------------------


def test_one_line_at_the_start_says_what_is_at_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(tmp_path, Regression(make_optimizer=torch.optim.AdamW), penalty(gate=Gate()))
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("gcsr: L1()")]
    assert "strength 0.05 on 40 of 49 parameters, in 2 tensors; update='dual_averaging' under AdamW, which" in line
    assert line.endswith(f"{Gate()!r}; {Schedule(warmup=0.3)!r}.")


def test_the_line_at_the_start_names_what_is_frozen_dense_or_regularized_unlike_by_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Regression()
    model.pos = nn.Parameter(torch.ones(3, 2))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(tmp_path, model, penalty())
        fit(tmp_path, model, penalty(include=["weight"]))
        fit(tmp_path, model, penalty(include=[""]))
        model.net[0].requires_grad_(False)
        fit(tmp_path, model, penalty())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("gcsr: L1()")]
    assert lines[0].endswith(" Dense by default: 'pos'; `include` regularizes them.")
    assert lines[1].endswith(").")
    assert " Regularized by `include` only: 'pos', 'net.0.bias', 'net.2.bias'; `exclude` leaves" in lines[2]
    assert "in 1 tensor;" in lines[3]
    assert "Frozen: 'net.0.weight'. Dense by default: 'pos'" in lines[3]


@pytest.mark.parametrize(("strength", "hint"), [(1e-6, True), (1.0, False)])
def test_a_penalty_that_ran_in_full_and_made_no_zeros_gets_a_hint(tmp_path: Path, strength: float, hint: bool) -> None:
    message = r"ran in full for 60 steps, on 100% of the weights.*0\.0% of them are zero.*`find_strength`"
    if hint:
        with pytest.warns(UserWarning, match=message):
            fit(tmp_path, Regression(), penalty(strength=strength), max_epochs=15)
    else:
        with pytest.warns(UserWarning, match="have collapsed"):
            fit(tmp_path, Regression(), penalty(strength=strength), max_epochs=15)


def test_a_warm_up_in_steps_ends_also_after_a_delay_in_progress(tmp_path: Path) -> None:
    weak = penalty(strength=1e-6, schedule=Schedule(delay=0.25, warmup=4))
    with pytest.warns(UserWarning, match="ran in full for 57 steps"):  # of 80, the first 20 without, and 3 on the rise
        fit(tmp_path, Regression(), weak, max_epochs=20)


# -- frozen weights, and arguments that moved ------------------------------------------------------------------------


class Adapter(Regression):
    """A frozen backbone and a trained head."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.net[0].requires_grad_(False)


def test_frozen_weights_count_nowhere(tmp_path: Path) -> None:
    logger, model = MemoryLogger(), Adapter()
    callbacks = [penalty(strength=1.0), CompressionMonitor(verbose=False)]
    with pytest.warns(UserWarning, match="have collapsed"):
        fit(tmp_path, model, callbacks, logger=logger, max_epochs=8)
    assert logger.values("sparsity/model")[-1] == 1.0
    assert logger.values("gcsr/penalty")[-1] == 0.0
    assert "sparsity/net.0.weight" not in logger.logged


def test_a_missed_target_is_measured_by_the_weights_that_are_trained(tmp_path: Path) -> None:
    callback = GradientCoherentRegularization(target_sparsity=0.8)
    fit(tmp_path, Adapter(), callback, max_epochs=40)  # and no warning: 80 % lie between 6 and 7 of 8 weights
    assert callback.regularizer is not None
    assert callback.regularizer.sparsity() == 6 / 8


@pytest.mark.parametrize(
    ("shut", "why"), [(False, "Train for longer"), (True, "gcsr/injected was 0 in all logged steps: the gate keeps")]
)
def test_the_gate_is_the_reason_for_a_missed_target_only_if_it_was_shut(
    tmp_path: Path, shut: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs are too short, and no step is logged in them; or nothing is injected in any logged step."""
    callback = GradientCoherentRegularization(target_sparsity=0.9, schedule=Schedule(warmup=0))
    if shut:
        # No threshold ever grows.
        monkeypatch.setattr(SparsityController, "adapt", lambda self, phase, counts: setattr(self, "phase", phase))
    with pytest.warns(UserWarning, match=f"target_sparsity=0.9 asked for 90 %. {why}"):
        fit(tmp_path, Regression(), callback, max_epochs=2, log_every_n_steps=1 if shut else 50)


class Called(Regression):
    """A parameter with the name that the key of the whole has."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Parameter(torch.zeros(4, 4))


def test_a_parameter_called_model_does_not_take_the_key_of_the_whole(tmp_path: Path) -> None:
    logger = MemoryLogger()
    fit(tmp_path, Called(), CompressionMonitor(verbose=False), logger=logger)
    assert logger.values("sparsity/model")[-1] == pytest.approx(16 / 56)
    assert logger.values("sparsity/parameter/model")[-1] == 1.0
    with pytest.raises(
        ValueError, match=r"`name` must be none of 'compression', .*CompressionMonitor logs under these"
    ):
        penalty(name="sparsity")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: penalty(coherence="direction"), r"`coherence` is no longer an argument .*gate=Gate\(coherence='direc"),
        (
            lambda: penalty(stop_steps=0.5, tolerance=0),
            r"and `tolerance` are no longer.*schedule=Schedule\(stop=0\.5\)",
        ),
        (lambda: KeepZeros(start_steps=3), r"`start_steps` is no longer an argument of KeepZeros\. Write start=3\."),
    ],
)
def test_an_argument_of_former_times_says_where_it_went(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


# -- a target that is missed -------------------------------------------------------------------------------------------


class Unused(Regression):
    """One of its layers takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 8)


class StopsEarly(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 20


@pytest.mark.parametrize(
    ("model", "others", "why"),
    [
        (Unused, [], r"No gradient ever reached 'unused.weight'.* `exclude`"),
        (Regression, [EMAWeightAveraging(decay=0.9)], "EMAWeightAveraging leaves averaged weights behind.*prune_small"),
        (Regression, [StopsEarly()], "stopped early, and the target is reached at 80 % of its length"),
    ],
    ids=["unused layer", "averaged weights", "stopped early"],
)
def test_a_missed_target_is_explained(tmp_path: Path, model: Any, others: list[Any], why: str) -> None:
    callback = GradientCoherentRegularization(target_sparsity=0.6)
    with pytest.warns(UserWarning, match=f"target_sparsity=0.6 asked for 60 %. .*{why}"):
        fit(tmp_path, model(), [callback, *others], max_epochs=40)
