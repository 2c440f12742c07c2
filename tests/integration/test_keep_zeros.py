"""Zeros that are kept: from one step on they stay exactly zero, and all else trains as if they were not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcsr import GradientCoherentRegularization, KeepZeros, Schedule

from .models import (
    FEATURES,
    Adversaries,
    Elementwise,
    ManualRegression,
    Regression,
    Snapshots,
    ValidatedRegression,
    adam,
    fit,
    loader,
    make_trainer,
    mlp,
    momentum,
    same,
    scaled,
    weights_of,
)

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": momentum,
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": adam,
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
START = 3
STEPS = 8


def planted(shape: torch.Size) -> Tensor:
    """Where zeros are planted: every second weight, the last one not."""
    return (torch.arange(shape.numel()) % 2 == 0).reshape(shape)


@torch.no_grad()
def plant(module: nn.Module) -> None:
    """Make half of the weights zero, of every parameter with two dimensions or more."""
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter[planted(parameter.shape)] = 0.0


def planted_mlp() -> nn.Sequential:
    net = mlp()
    plant(net)
    return net


class Plant(Callback):
    """Plants the zeros when so many steps are made, in weights that have moved and have a momentum."""

    def __init__(self, step: int = START) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            plant(pl_module)


def assert_kept(weights: dict[str, Tensor], names: Iterable[str] = ("net.0.weight", "net.2.weight")) -> None:
    """Exactly zero where zeros were planted, and nowhere else."""
    for name in names:
        assert torch.equal(weights[name] == 0, planted(weights[name].shape)), name


def post_hooks(optimizer: Optimizer) -> int:
    return len(optimizer._optimizer_step_post_hooks)


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_exactly_zero_while_the_others_move(tmp_path: Path, name: str) -> None:
    snapshots, model = Snapshots(), Regression(make_optimizer=OPTIMIZERS[name])
    trainer = fit(tmp_path, model, [Plant(), KeepZeros(START), snapshots], max_epochs=2)
    assert len(snapshots.weights) == STEPS
    for before, after in zip(snapshots.weights[START - 1 :], snapshots.weights[START:], strict=False):
        assert_kept(after)
        # A hidden unit whose way out is zero has no gradient; all other survivors move.
        reached = ~planted(after["net.2.weight"].shape)[0]
        for key, weight in after.items():
            moves = ~planted(weight.shape) if weight.dim() >= 2 else torch.ones_like(weight, dtype=torch.bool)
            moved = weight != before[key]
            assert (moved[reached] if len(moved) > 1 else moved)[moves[reached] if len(moved) > 1 else moves].all()
    for weights in snapshots.weights[: START - 1]:
        assert all((weight != 0).all() for weight in weights.values())
    # What the optimizer remembers of the zeros is zero too, and of the others it is not.
    [optimizer] = trainer.optimizers
    for parameter in (model.net[0].weight, model.net[2].weight):
        tensors = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
        assert tensors or name == "sgd"
        for value in tensors:
            assert not value[planted(value.shape)].any()
            assert value[~planted(value.shape)].any()


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_without_the_callback_the_planted_zeros_move(tmp_path: Path, name: str) -> None:
    """Else the test above would prove nothing."""
    model = Regression(make_optimizer=OPTIMIZERS[name])
    fit(tmp_path, model, [Plant()], max_epochs=2)
    assert (model.net[0].weight != 0).all()


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_survivors_train_as_in_a_loop_by_hand(tmp_path: Path, nesterov: bool) -> None:
    """SGD written out, in float64, in which from the start on only the survivors have a gradient and a momentum."""
    model = Regression(
        net=mlp().double(), make_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=nesterov)
    )
    fit(tmp_path, model, [Plant(), KeepZeros(START)], loader(dtype=torch.float64), max_epochs=2, precision="64-true")

    net = mlp().double()
    parameters = list(net.parameters())
    buffers = [torch.zeros_like(parameter) for parameter in parameters]
    for step, (inputs, targets) in enumerate([*loader(dtype=torch.float64)] * 2):
        survive = [
            ~planted(parameter.shape) if parameter.dim() >= 2 and step >= START else torch.ones_like(parameter).bool()
            for parameter in parameters
        ]
        gradients = torch.autograd.grad(nn.functional.mse_loss(net(inputs), targets), parameters)
        with torch.no_grad():
            for parameter, buffer, gradient, alive in zip(parameters, buffers, gradients, survive, strict=True):
                buffer.copy_((0.9 * buffer + gradient) * alive)
                parameter -= 0.05 * (gradient * alive + 0.9 * buffer if nesterov else buffer)
        if step == START - 1:
            plant(net)
    for parameter, expected in zip(model.net.parameters(), parameters, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_changed_before_the_zeros_are_kept(tmp_path: Path) -> None:
    plain, snapshots = Snapshots(), Snapshots()
    fit(tmp_path, Regression(make_optimizer=momentum), [plain], max_epochs=2)
    fit(tmp_path, Regression(make_optimizer=momentum), [KeepZeros(START), snapshots], max_epochs=2)
    # Nothing is zero, so that nothing is changed afterwards either.
    assert all(same(a, b) for a, b in zip(plain.weights, snapshots.weights, strict=True))


def test_from_the_first_step_on(tmp_path: Path) -> None:
    snapshots, callback = Snapshots(), KeepZeros(0)
    fit(tmp_path, Regression(net=planted_mlp(), make_optimizer=adam), [callback, snapshots])
    for weights in snapshots.weights:
        assert_kept(weights)


def test_a_weight_that_becomes_zero_later_is_not_kept(tmp_path: Path) -> None:
    model = Regression(make_optimizer=momentum)
    fit(tmp_path, model, [KeepZeros(2), Plant(4)], max_epochs=2)
    assert (model.net[0].weight != 0).all()


@pytest.mark.parametrize(("share", "step"), [(0.5, 4), (0.25, 2), (1, 1), (0.0, 0)], ids=lambda value: repr(value))
def test_a_share_is_of_the_steps_of_the_training(tmp_path: Path, share: float, step: int) -> None:
    callback, snapshots = KeepZeros(share), Snapshots()
    model = Regression(net=planted_mlp() if step == 0 else None)
    if step == STEPS:
        with pytest.warns(UserWarning, match="before step 8"):
            fit(tmp_path, model, [callback], max_epochs=2)
        return
    fit(tmp_path, model, [Plant(step), callback, snapshots], max_epochs=2)
    assert_kept(snapshots.weights[-1])
    assert_kept(snapshots.weights[step])


def test_the_console_hears_how_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(tmp_path, Regression(make_optimizer=momentum), [Plant(), KeepZeros(START)], max_epochs=2)
    found = [record.getMessage() for record in caplog.records if "KeepZeros" in record.getMessage()]
    assert found == ["KeepZeros: from step 3 on, 20 of 40 weights are zero and stay so."]


# -- which parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({}, ["net.0.weight", "net.2.weight"]),
        ({"include": [r"net\.0"]}, ["net.0.weight", "net.0.bias"]),
        ({"exclude": [r"net\.0"]}, ["net.2.weight"]),
    ],
    ids=str,
)
def test_include_and_exclude_choose_the_parameters(tmp_path: Path, arguments: dict[str, Any], kept: list[str]) -> None:
    net = mlp()
    zeros = {f"net.{name}": planted(parameter.shape) for name, parameter in net.named_parameters()}
    zeros["net.2.weight"] = ~zeros["net.2.weight"]  # so that the zeros of the first layer have a gradient
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter[zeros[f"net.{name}"]] = 0.0
    model, callback = Regression(net=net, make_optimizer=momentum), KeepZeros(0, **arguments)
    fit(tmp_path, model, callback)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight == 0, zeros[name]) is (name in kept), name
    assert set(callback.state_dict()["zeros"]) == set(kept)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`exclude` must match the name of a parameter, got exclude='head'"):
        fit(tmp_path, Regression(), KeepZeros(0, exclude=["head"]))


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 1))
    net[2].weight = net[0].weight
    plant(net)
    callback = KeepZeros(0)
    fit(tmp_path, Regression(net=net, make_optimizer=momentum), callback)
    assert torch.equal(net[0].weight == 0, planted(net[0].weight.shape))
    assert net[2].weight is net[0].weight
    assert set(callback.state_dict()["zeros"]) == {"net.0.weight", "net.3.weight"}


def test_a_frozen_layer_is_left_alone(tmp_path: Path) -> None:
    net = planted_mlp()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    fit(tmp_path, Regression(net=net, make_optimizer=momentum), KeepZeros(0))
    assert torch.equal(net[0].weight, before)
    assert_kept({"net.2.weight": net[2].weight}, ["net.2.weight"])


# -- where the penalty stops ---------------------------------------------------------------------------------------


def penalty(stop: float | None, name: str = "gcsr", **arguments: Any) -> GradientCoherentRegularization:
    arguments = {"strength": 0.07, "update": "proximal", "gate": None} | arguments
    return GradientCoherentRegularization(schedule=Schedule(stop=stop), name=name, **arguments)


@pytest.mark.parametrize("stop", [4, 0.5])
@pytest.mark.parametrize("first", ["penalty", "zeros"])
def test_none_starts_where_the_penalty_stops(tmp_path: Path, first: str, stop: float) -> None:
    snapshots, callback = Snapshots(), KeepZeros()
    pair: list[Callback] = [penalty(stop), callback] if first == "penalty" else [callback, penalty(stop)]
    fit(tmp_path, Regression(make_optimizer=momentum), [*pair, snapshots], max_epochs=2)
    zeros = snapshots.weights[3]["net.0.weight"] == 0  # after the last step with a penalty
    assert 0 < zeros.double().mean() < 1
    for weights in snapshots.weights[4:]:
        assert torch.equal(weights["net.0.weight"] == 0, zeros)
    assert torch.equal(callback.state_dict()["zeros"]["net.0.weight"], zeros)


@pytest.mark.parametrize(
    ("stops", "start"), [((2, 5), 5), ((5, 2), 5), ((0.25, 5), 5), ((0.75, 5), 6), ((None, 3), 3)], ids=str
)
def test_none_starts_where_the_last_of_two_penalties_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stops: tuple[Any, Any], start: int
) -> None:
    first = penalty(stops[0], "first", include=[r"net\.0\.weight"])
    second = penalty(stops[1], "second", include=[r"net\.2\.weight"], strength=0.01)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(tmp_path, Regression(make_optimizer=adam), [KeepZeros(), first, second], max_epochs=2)
    assert f"KeepZeros: from step {start} on" in caplog.text


class StopAfterSixSteps(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 6


def test_a_stop_in_steps_needs_no_length_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = penalty(4, strength=0.5)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(
            tmp_path,
            Regression(make_optimizer=adam),
            [callback, KeepZeros(), StopAfterSixSteps()],
            max_epochs=-1,
        )
    assert "KeepZeros: from step 4 on" in caplog.text


@pytest.mark.parametrize("callbacks", [[], [penalty(None)]], ids=["no penalty", "no stop"])
def test_none_without_a_penalty_that_stops_is_refused(tmp_path: Path, callbacks: list[Callback]) -> None:
    model = Regression()
    message = r"`KeepZeros` with start=None starts where a penalty stops.*Schedule\(stop=\.\.\.\), or `KeepZeros`"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, model, [*callbacks, KeepZeros()])
    assert model.training_steps == 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("plugins", [[], [scaled()]], ids=["32", "16-mixed"])
def test_steps_are_counted_as_the_penalty_counts_them(tmp_path: Path, plugins: list[Any]) -> None:
    """A batch whose ``training_step`` gives ``None`` is no step, for neither; else zeros are kept under the penalty."""
    regularization, callback = penalty(5, strength=0.01), KeepZeros()
    model = Regression(make_optimizer=momentum, none_at=[1])
    fit(tmp_path, model, [regularization, callback], max_epochs=3, plugins=plugins)
    assert regularization.regularizer is not None


def test_a_training_that_ends_before_is_warned_of(tmp_path: Path) -> None:
    message = r"KeepZeros: the training ended after 4 steps, before step 5, from which on zeros were to be kept\. Let"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, Regression(), KeepZeros(5))


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"start": -1},
            ValueError,
            r"`start` must be an integer of at least 0, got start=-1\. Use N",
        ),
        (
            {"start": 1.5},
            ValueError,
            r"`start` must be a number in \[0, 1\], got start=1\.5\. A float",
        ),
        ({"start": -0.5}, ValueError, r"`start` must be a number in \[0, 1\], got start=-0\.5"),
        ({"start": float("nan")}, ValueError, r"`start` must be a number in \[0, 1\], got start=nan"),
        ({"start": True}, TypeError, r"`start` must be an integer of at least 0, got start=True"),
        ({"start": "3"}, TypeError, r"`start` must be an integer of at least 0, got start='3'"),
        ({"include": "weight"}, TypeError, r"`include` must be a list of regular expressions"),
        ({"exclude": []}, ValueError, r"`exclude` must have at least one regular expression"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_bad_argument_is_told_at_once(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        KeepZeros(**arguments)


def test_lbfgs_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = Regression(make_optimizer=torch.optim.LBFGS)
    with pytest.raises(MisconfigurationException, match=r"`KeepZeros`: LBFGS is not supported"):
        fit(tmp_path, model, KeepZeros(0))
    assert model.training_steps == 0


def test_an_unknown_precision_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model, trainer = Regression(), make_trainer(tmp_path, [KeepZeros(0)])
    trainer.strategy.precision_plugin.precision = "transformer-engine"
    with pytest.raises(MisconfigurationException, match=r"`KeepZeros` does not support precision='transformer-engine'"):
        trainer.fit(model, loader())
    assert model.training_steps == 0


# -- clipping, accumulation, mixed precision -----------------------------------------------------------------------


def test_kept_zeros_do_not_count_in_the_norm_that_is_clipped(tmp_path: Path) -> None:
    """Under SGD each step is as long as the learning rate times the norm that is allowed; with them it is shorter."""
    snapshots = Snapshots()
    model = Regression(net=planted_mlp().double(), make_optimizer=OPTIMIZERS["sgd"])
    fit(
        tmp_path,
        model,
        [KeepZeros(0), snapshots],
        loader(dtype=torch.float64),
        gradient_clip_val=1e-3,
        precision="64-true",
    )
    for before, after in zip(snapshots.weights, snapshots.weights[1:], strict=False):
        moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
        assert float(moved.norm()) == pytest.approx(0.05 * 1e-3, rel=1e-3)
        assert_kept(after)


@pytest.mark.parametrize("model_class", [Regression, ManualRegression])
def test_accumulated_batches_make_one_step(tmp_path: Path, model_class: Any) -> None:
    automatic = model_class is Regression
    model = model_class(make_optimizer=momentum, **({} if automatic else {"every": 2}))
    callback, snapshots = KeepZeros(2), Snapshots()
    accumulate = {"accumulate_grad_batches": 2} if automatic else {}
    fit(tmp_path, model, [Plant(2), callback, snapshots], max_epochs=2, **accumulate)
    for weights in snapshots.weights[5:]:
        assert_kept(weights)


def fused_adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Adam that divides by the loss scale itself, within its step."""
    return torch.optim.Adam(parameters, lr=0.05, fused=True)


@pytest.mark.parametrize("make_optimizer", [momentum, fused_adam])
def test_the_loss_scale_changes_nothing(tmp_path: Path, make_optimizer: Make) -> None:
    results = []
    for precision in ({}, {"plugins": [scaled(1.0)]}, {"plugins": [scaled(1024.0)]}):
        model = Regression(net=Elementwise(), make_optimizer=make_optimizer)
        fit(tmp_path, model, [Plant(), KeepZeros(START)], max_epochs=2, **precision)
        assert_kept(weights_of(model), ["net.weight"])
        results.append(weights_of(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("skipped", [1, START, START + 1], ids=["before", "at the start", "after"])
@pytest.mark.parametrize("make_optimizer", [momentum, fused_adam])
def test_a_skipped_step_counts_and_leaves_all_as_it_is(tmp_path: Path, make_optimizer: Make, skipped: int) -> None:
    snapshots, callback = Snapshots(), KeepZeros(START)
    model = Regression(net=Elementwise(), make_optimizer=make_optimizer, factors={skipped: float("inf")})
    trainer = fit(tmp_path, model, [Plant(), callback, snapshots], max_epochs=2, plugins=[scaled()])
    assert trainer.scaler is not None
    assert trainer.scaler.get_scale() == 512.0
    assert same(snapshots.weights[skipped - 1], snapshots.weights[skipped])
    for weights in snapshots.weights[START:]:
        assert_kept(weights, ["net.weight"])
        assert weights["net.weight"].isfinite().all()


# -- several optimizers, sparse gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "both hold gradients"])
def test_two_optimizers_keep_their_own_zeros(tmp_path: Path, toggle: bool) -> None:
    model, callback = Adversaries(toggle, every=(1, 2)), KeepZeros(0)
    plant(model)
    fit(tmp_path, model, callback)
    assert_kept(weights_of(model), ["generator.weight", "critic.weight"])


def test_the_start_is_one_moment_for_all_optimizers(tmp_path: Path) -> None:
    """The generator makes four steps and the critic two; both keep their zeros from the second of the four batches."""
    callback = KeepZeros(2)
    fit(tmp_path, Adversaries(toggle=True, every=(1, 2)), callback)
    assert set(callback.state_dict()["zeros"]) == {"generator.weight", "critic.weight"}


class Words(LightningModule):
    """An embedding with sparse gradients, of whose rows each batch touches some, one of them twice."""

    def __init__(self, make_optimizer: Make) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4, sparse=True)
        nn.init.normal_(self.words.weight, generator=torch.Generator().manual_seed(0))
        plant(self)
        self.make_optimizer = make_optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.words(batch[0]) - 1.0).square().sum()

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


WORDS = torch.tensor([0, 1, 1, 3, 3, 4, 4, 1, 0, 0, 1, 4])


class SparseGradients(Callback):
    """Keeps the gradients as the optimizer sees them."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.seen.append(pl_module.words.weight.grad.to_dense())


SPARSE: dict[str, Make] = {
    "sgd": OPTIMIZERS["sgd"],
    "adam": lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.1),
}


@pytest.mark.parametrize("name", SPARSE)
def test_zeros_of_a_sparse_embedding_are_kept(tmp_path: Path, name: str) -> None:
    model = Words(SPARSE[name])
    start = model.words.weight.detach().clone()
    fit(tmp_path, model, KeepZeros(0), DataLoader(TensorDataset(WORDS), batch_size=3))
    weight = model.words.weight.detach()
    assert torch.equal(weight == 0, planted(weight.shape))
    touched = torch.zeros(6, 4, dtype=torch.bool)
    touched[WORDS.unique()] = True
    assert torch.equal(weight != start, touched & ~planted(weight.shape))


@pytest.mark.parametrize("name", SPARSE)
def test_the_sparse_gradient_of_kept_zeros_is_zero(tmp_path: Path, name: str) -> None:
    """A gradient fresh from an embedding is not coalesced: one row stands in it several times."""
    gradients, model = SparseGradients(), Words(SPARSE[name])
    data = DataLoader(TensorDataset(WORDS), batch_size=3)
    trainer = fit(tmp_path, model, [KeepZeros(0), gradients], data)
    kept = planted(model.words.weight.shape)
    assert len(gradients.seen) == 4
    for gradient in gradients.seen:
        assert gradient[~kept].any()
        assert not gradient[kept].any()
    for value in trainer.optimizers[0].state[model.words.weight].values():
        if isinstance(value, Tensor) and value.shape == kept.shape:
            assert not value[kept].any()


# -- hooks, and life beyond one fit --------------------------------------------------------------------------------


class Faulty(Regression):
    """Fails in its third batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == 2:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


def test_no_hook_is_left_behind_by_two_fits_nor_by_a_failure(tmp_path: Path) -> None:
    net = planted_mlp()
    optimizer, callback = momentum(net.parameters()), KeepZeros(0)
    counts: list[int] = []

    class Count(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            counts.append(post_hooks(optimizer))

    for model_class in (Regression, Regression, Faulty):
        model = model_class(net=net, make_optimizer=lambda _: optimizer)
        if model_class is Faulty:
            with pytest.raises(RuntimeError, match="on purpose"):
                fit(tmp_path, model, [callback, Count()])
        else:
            fit(tmp_path, model, [callback, Count()])
        assert post_hooks(optimizer) == 0
    assert set(counts) == {1}


def test_after_the_fit_the_optimizer_is_free_again(tmp_path: Path) -> None:
    net = planted_mlp()
    optimizer = momentum(net.parameters())
    fit(tmp_path, Regression(net=net, make_optimizer=lambda _: optimizer), KeepZeros(0))
    assert (net[0].weight == 0).any()
    net(torch.ones(2, FEATURES)).sum().backward()
    optimizer.step()
    assert (net[0].weight == 0).sum() < planted(net[0].weight.shape).sum()


def test_a_fresh_trainer_with_the_same_callback_starts_from_zero(tmp_path: Path) -> None:
    callback, weights = KeepZeros(START), []
    for _ in range(2):
        model = Regression(make_optimizer=momentum)
        fit(tmp_path, model, [Plant(), callback], max_epochs=2)
        weights.append(weights_of(model))
    assert same(*weights)


def test_fit_goes_on_with_the_zeros_of_an_earlier_fit(tmp_path: Path) -> None:
    model, callback = Regression(make_optimizer=momentum), KeepZeros(START)
    trainer = make_trainer(tmp_path, [Plant(), callback], max_epochs=1)
    trainer.fit(model, loader())
    assert_kept(weights_of(model))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    assert_kept(weights_of(model))


def test_validating_a_checkpoint_does_not_disturb(tmp_path: Path) -> None:
    path = tmp_path / "early.ckpt"
    early = fit(tmp_path, Regression(make_optimizer=momentum), KeepZeros(1))
    early.save_checkpoint(path)

    model, callback = ValidatedRegression(make_optimizer=momentum), KeepZeros(START)
    trainer = make_trainer(tmp_path, [Plant(), callback], max_epochs=1)
    trainer.fit(model, loader(), loader())
    weights, state = weights_of(model), callback.state_dict()
    trainer.validate(model, loader(), ckpt_path=path, verbose=False)
    assert same(callback.state_dict()["zeros"], state["zeros"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(), loader())
    assert_kept(weights_of(model))


def test_the_state_is_a_copy_and_loads_weights_only(tmp_path: Path) -> None:
    callback = KeepZeros(0)
    trainer = fit(tmp_path, Regression(net=planted_mlp(), make_optimizer=adam), callback)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    state = torch.load(tmp_path / "kept.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert all(torch.equal(zeros, planted(zeros.shape)) for zeros in state["zeros"].values())
    callback.state_dict()["zeros"]["net.0.weight"].fill_(False)
    assert callback.state_dict()["zeros"]["net.0.weight"].any()
