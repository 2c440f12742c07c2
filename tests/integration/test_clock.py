"""One clock: what schedules are read against, the same for every callback of a fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gcsr import GradientCoherentRegularization, KeepZeros, Schedule
from lightning_gcsr._lightning import clock

from .models import (
    Adversaries,
    ManualRegression,
    MemoryLogger,
    Regression,
    ResumableLoader,
    Stream,
    fit,
    loader,
    make_trainer,
    samples,
)

SHARES: dict[str, Any] = {"schedule": Schedule(delay=0.25, warmup=0.5, stop=0.875)}


def regularization(**arguments: Any) -> GradientCoherentRegularization:
    return GradientCoherentRegularization(**({"strength": 0.4, "gate": None} | arguments))


class Progress(Callback):
    """What the clock says before each step, and after a callback of the user's own rhythm."""

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(clock(trainer).progress)


class EverySecond(Regression):
    """Steps at a rhythm of its own: after every second batch, which Lightning does not know of."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx % 2:
            optimizer.step(closure=closure)
        else:
            closure()


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (Regression, {"max_epochs": 2}, [i / 8 for i in range(8)]),
        (Regression, {"max_epochs": 4, "accumulate_grad_batches": 2}, [i / 8 for i in range(8)]),
        (Regression, {"max_epochs": 2, "accumulate_grad_batches": 3}, [0, 0.375, 0.5, 0.875]),
        (Regression, {"max_epochs": 9, "max_steps": 8}, [i / 8 for i in range(8)]),
        (Regression, {"max_epochs": -1, "max_steps": 8}, [i / 8 for i in range(8)]),
        (Regression, {"max_epochs": 4, "limit_train_batches": 2}, [i / 8 for i in range(8)]),
        (Regression, {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}, [i / 8 for i in range(8)]),
        (partial(ManualRegression, every=4), {"max_epochs": 4}, [3 / 16, 7 / 16, 11 / 16, 15 / 16]),
        (EverySecond, {"max_epochs": 2}, [1 / 8, 3 / 8, 5 / 8, 7 / 8]),
        (partial(Adversaries, toggle=True), {"max_epochs": 1}, [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]),
    ],
    ids=str,
)
def test_progress_is_the_fraction_of_batches_or_steps_that_are_done(
    tmp_path: Path, make: Any, arguments: dict[str, Any], expected: list[float]
) -> None:
    seen = Progress()
    fit(tmp_path, make(), seen, **arguments)
    assert seen.seen == pytest.approx(expected)


@pytest.mark.parametrize("make", [Regression, ManualRegression, EverySecond])
def test_the_schedule_is_read_against_the_progress(tmp_path: Path, make: Any) -> None:
    logger, callback, seen = MemoryLogger(), regularization(**SHARES), Progress()
    fit(tmp_path, make(), [callback, seen], logger=logger, max_epochs=2)
    factors = [min(1.0, (p - 0.25) / 0.5) if 0.25 <= p < 0.875 else 0.0 for p in seen.seen if p is not None]
    assert logger.values("gcsr/strength") == pytest.approx([0.4 * factor for factor in factors])


def test_a_stop_and_the_zeros_that_follow_it_are_at_one_moment(tmp_path: Path) -> None:
    """A penalty that joins at a resume, and a backbone that joins later, change nothing in it."""
    path = tmp_path / "dense.ckpt"
    fit(tmp_path, Regression(), max_epochs=2).save_checkpoint(path)
    logger, zeros = MemoryLogger(), KeepZeros()
    callbacks = [regularization(schedule=Schedule(stop=0.75)), zeros]
    make_trainer(tmp_path, callbacks, logger=logger, max_epochs=4).fit(Regression(), loader(), ckpt_path=path)
    assert logger.values("gcsr/strength") == pytest.approx([0.4] * 4 + [0.0] * 4)
    assert zeros.state_dict()["zeros"]


def test_the_same_callback_counts_anew_in_a_longer_training(tmp_path: Path) -> None:
    callback = regularization(**SHARES)
    for epochs, without in ((2, 3), (4, 6)):
        logger = MemoryLogger()
        fit(tmp_path, Regression(), callback, max_epochs=epochs, logger=logger)
        assert logger.values("gcsr/strength").count(0.0) == without + 1  # and the first of the warm-up


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(samples()), batch_size=4)


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": 2}], ids=str)
@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (lambda: regularization(schedule=Schedule(warmup=0.3)), r"gcsr: warmup=0\.3"),
        (lambda: KeepZeros(0.5), r"KeepZeros: start=0\.5"),
        (lambda: GradientCoherentRegularization(target_sparsity=0.5), r"gcsr: the way to target_sparsity=0\.5"),
    ],
    ids=["regularization", "KeepZeros", "target"],
)
def test_a_fraction_of_a_training_without_a_known_end_is_refused(
    tmp_path: Path, callback: Any, name: str, arguments: dict[str, Any]
) -> None:
    """Endless epochs, or epochs of a length that nobody knows: Lightning answers the two differently."""
    model = Regression()
    trainer = make_trainer(tmp_path, [callback()], **arguments)
    message = rf"{name} is a fraction of the training, whose length is not known\. Give the Trainer max_steps"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model, stream())
    assert model.training_steps == 0


@pytest.mark.parametrize("arguments", [{"max_epochs": 2}, {"max_epochs": -1}], ids=str)
def test_a_stream_with_max_steps_has_an_end(tmp_path: Path, arguments: dict[str, Any]) -> None:
    seen = Progress()
    fit(tmp_path, Regression(), [regularization(**SHARES), seen], stream(), max_steps=8, **arguments)
    assert seen.seen == [i / 8 for i in range(8)]


def test_numbers_of_steps_need_no_end(tmp_path: Path) -> None:
    logger = MemoryLogger()
    callback = regularization(schedule=Schedule(delay=1, stop=3))
    fit(tmp_path, Regression(), callback, stream(), max_epochs=1, logger=logger)
    assert logger.values("gcsr/strength") == pytest.approx([0.0, 0.4, 0.4, 0.0])


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_fast_development_run_bears_fractions(tmp_path: Path, share: float) -> None:
    """It makes a single step; it is there to find faults of the user, not ours."""
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
