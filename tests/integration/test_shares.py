"""Delay, warm-up and stop as shares of the training: the same steps as the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gcsr import GradientCoherentRegularization, KeepZeros, Schedule

from .models import (
    ManualRegression,
    MemoryLogger,
    Regression,
    ResumableLoader,
    Stream,
    fit,
    loader,
    make_trainer,
    momentum,
    same,
    samples,
    weights_of,
)

SHARES: dict[str, Any] = {"schedule": Schedule(delay=0.25, warmup=0.5, stop=0.875)}


def regularization(**arguments: Any) -> GradientCoherentRegularization:
    return GradientCoherentRegularization(**({"strength": 0.4, "gate": None} | arguments))


def steps_of_settings(callback: GradientCoherentRegularization) -> tuple[Any, Any, Any]:
    assert callback.regularizer is not None
    settings = callback.regularizer.settings
    return settings.delay_steps, settings.warmup_steps, settings.stop_steps


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 2}, (2, 4, 7)),  # 8 steps
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, (2, 4, 7)),  # 8 steps
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, (1, 2, 4)),  # 2 steps in each epoch, 3.5 is 4
        ({"max_epochs": 9, "max_steps": 8}, (2, 4, 7)),
        ({"max_epochs": -1, "max_steps": 8}, (2, 4, 7)),
        ({"max_epochs": 4, "limit_train_batches": 2}, (2, 4, 7)),
    ],
    ids=str,
)
def test_shares_are_of_the_optimizer_steps_of_the_training(
    tmp_path: Path, arguments: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    logger, callback = MemoryLogger(), regularization(**SHARES)
    trainer = fit(tmp_path, Regression(), callback, logger=logger, **arguments)
    assert steps_of_settings(callback) == expected
    delay, warmup, stop = expected
    factors = [min(1.0, (i - delay + 1) / warmup) if delay <= i < stop else 0.0 for i in range(trainer.global_step)]
    assert logger.values("gcsr/strength") == pytest.approx([0.4 * factor for factor in factors])
    assert callback.settings.delay_steps == 0.25  # what the user wrote stays


def test_shares_train_as_the_numbers_of_steps_do(tmp_path: Path) -> None:
    weights = []
    for arguments in (SHARES, {"schedule": Schedule(delay=2, warmup=4, stop=7)}):
        model = Regression(make_optimizer=momentum)
        fit(tmp_path, model, regularization(strength=0.05, update="proximal", **arguments), max_epochs=2)
        weights.append(weights_of(model))
    assert same(*weights)


def test_shares_work_under_manual_optimization(tmp_path: Path) -> None:
    callback = regularization(**SHARES)
    fit(tmp_path, ManualRegression(), callback, max_epochs=2)
    assert steps_of_settings(callback) == (2, 4, 7)


def test_the_same_callback_counts_anew_in_a_longer_training(tmp_path: Path) -> None:
    callback = regularization(**SHARES)
    for epochs, expected in ((2, (2, 4, 7)), (4, (4, 8, 14))):
        fit(tmp_path, Regression(), callback, max_epochs=epochs)
        assert steps_of_settings(callback) == expected


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(samples()), batch_size=4)


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": 2}], ids=str)
@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (lambda: regularization(schedule=Schedule(warmup=0.3)), r"gcsr: warmup_steps=0\.3"),
        (lambda: KeepZeros(0.5), r"KeepZeros: start_steps"),
    ],
    ids=["regularization", "KeepZeros"],
)
def test_a_share_of_a_training_without_a_known_end_is_refused(
    tmp_path: Path, callback: Any, name: str, arguments: dict[str, Any]
) -> None:
    """Endless epochs, or epochs of a length that nobody knows: Lightning answers the two differently."""
    model = Regression()
    trainer = make_trainer(tmp_path, [callback()], **arguments)
    message = rf"{name} is a share of the training, whose length is not known\. Give the Trainer max_steps"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model, stream())
    assert model.training_steps == 0


@pytest.mark.parametrize("arguments", [{"max_epochs": 2}, {"max_epochs": -1}], ids=str)
def test_a_stream_with_max_steps_has_an_end(tmp_path: Path, arguments: dict[str, Any]) -> None:
    callback = regularization(**SHARES)
    fit(tmp_path, Regression(), callback, stream(), max_steps=8, **arguments)
    assert steps_of_settings(callback) == (2, 4, 7)


def test_numbers_of_steps_need_no_end(tmp_path: Path) -> None:
    callback = regularization(schedule=Schedule(delay=1, stop=3))
    fit(tmp_path, Regression(), callback, stream(), max_epochs=1)
    assert steps_of_settings(callback) == (1, 0, 3)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_fast_development_run_bears_shares(tmp_path: Path, share: float) -> None:
    """It makes a single step, of which every share is 0 or 1; it is there to find faults of the user, not ours."""
    callback = regularization(schedule=Schedule(stop=share))
    trainer = fit(tmp_path, Regression(), callback, loader(), fast_dev_run=True)
    assert trainer.global_step == 1


def test_asking_for_the_length_does_not_rewind_the_loader_of_a_resumed_run(tmp_path: Path) -> None:
    """Lightning sets up the data where it is asked too early, and then does not restore their position any more."""
    path = tmp_path / "middle.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)

    callbacks = [regularization(strength=0.05, schedule=Schedule(warmup=0.5)), KeepZeros(0.5)]
    fit(tmp_path, Regression(), [*callbacks, Save()], ResumableLoader(samples(), batch_size=4))
    seen: list[Tensor] = []

    class Remember(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    trainer = make_trainer(tmp_path, [*callbacks, Remember()])
    trainer.fit(Regression(), ResumableLoader(samples(), batch_size=4), ckpt_path=path)
    expected = samples().tensors[0][8:]
    assert torch.equal(torch.cat(seen), expected)
