"""The compressed file beside the best checkpoint: the right weights, in the right place, at the right time."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcsr import CompressedCheckpoint, load_compressed

from .models import Regression, ValidatedRegression, loader, make_trainer, same


def files(path: Path) -> set[str]:
    """All compressed files and what might be left of one."""
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.suffix in (".safetensors", ".tmp")}


def train(path: Path, *callbacks: Callback, module: LightningModule | None = None, **kwargs: Any) -> LightningModule:
    module = Regression() if module is None else module
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(path, callbacks, **{"max_epochs": 3, "enable_checkpointing": checkpoints} | kwargs)
    trainer.fit(module, loader(), *([loader()] if isinstance(module, ValidatedRegression) else []))
    return module


class Worse(ValidatedRegression):
    """Its best epoch is the second one, whatever it learns."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("score", abs(self.current_epoch - 1.0))


@pytest.mark.parametrize(
    "options",
    [{}, {"save_weights_only": True}, {"save_last": True}, {"save_top_k": -1}],
    ids=lambda o: "".join(o) or "plain",
)
def test_the_weights_are_those_of_the_best_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    best = ModelCheckpoint(tmp_path / "kept", monitor="score", **options)
    compressed = CompressedCheckpoint()
    module = train(tmp_path, compressed, best, module=Worse())
    assert compressed.path == best.best_model_path.replace(".ckpt", ".safetensors")
    assert files(tmp_path) == {"kept/epoch=1-step=8.safetensors"}
    loaded = load_compressed(compressed.path)
    assert same(loaded, torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert not same(loaded, module.state_dict())
    Worse().load_state_dict(loaded)


def test_of_several_it_is_the_first_as_for_lightning(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "first", monitor="score")
    second = ModelCheckpoint(tmp_path / "second", monitor="score", mode="max")
    train(tmp_path, first, second, CompressedCheckpoint(), module=Worse())
    assert files(tmp_path) == {"first/epoch=1-step=8.safetensors"}


def test_without_a_monitor_it_is_the_last_checkpoint(tmp_path: Path) -> None:
    compressed = CompressedCheckpoint()
    module = train(tmp_path, compressed, ModelCheckpoint(tmp_path))
    assert files(tmp_path) == {"epoch=2-step=12.safetensors"}
    assert same(load_compressed(compressed.path), module.state_dict())


def test_a_checkpoint_that_is_written_in_the_background_is_waited_for(tmp_path: Path) -> None:
    compressed = CompressedCheckpoint()
    module = train(tmp_path, compressed, ModelCheckpoint(tmp_path), plugins=[AsyncCheckpointIO()])
    assert same(load_compressed(compressed.path), module.state_dict())


@pytest.mark.parametrize(
    ("callbacks", "logger", "place"),
    [
        ([], False, "model.safetensors"),
        ([], True, "logs/version_0/model.safetensors"),
        ([ModelCheckpoint(save_top_k=0)], False, "checkpoints/model.safetensors"),
    ],
    ids=["root", "logger", "no best"],
)
def test_without_a_best_checkpoint_it_is_the_weights_at_the_end(
    tmp_path: Path, callbacks: list[Callback], logger: bool, place: str
) -> None:
    compressed = CompressedCheckpoint()
    loggers = CSVLogger(tmp_path, "logs") if logger else False
    module = train(tmp_path, compressed, *callbacks, logger=loggers)
    assert compressed.path == str(tmp_path / place)
    assert files(tmp_path) == {place}
    assert same(load_compressed(compressed.path), module.state_dict())


@pytest.mark.parametrize("filename", ["small", "small.safetensors"])
@pytest.mark.parametrize("best", [False, True])
def test_the_place_can_be_given(tmp_path: Path, filename: str, best: bool) -> None:
    callbacks = [ModelCheckpoint(tmp_path / "kept")] if best else []
    compressed = CompressedCheckpoint(tmp_path / "new" / "folder", filename)
    train(tmp_path, compressed, *callbacks)
    assert files(tmp_path) == {"new/folder/small.safetensors"}


def test_it_says_what_it_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compressed = CompressedCheckpoint()
    assert compressed.path is None
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        train(tmp_path, compressed)
    size = Path(compressed.path).stat().st_size
    [line] = [m for m in caplog.messages if m.startswith("CompressedCheckpoint")]
    assert line == (
        f"CompressedCheckpoint: {compressed.path}, {size:,} bytes, {size / 196:.1%} of the 196 bytes"
        " of the last weights."
    )


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # as it should
def test_after_a_resume_it_is_the_best_of_both_runs(tmp_path: Path) -> None:
    train(tmp_path, ModelCheckpoint(tmp_path, monitor="score", save_last=True), module=Worse())
    best, compressed = ModelCheckpoint(tmp_path, monitor="score"), CompressedCheckpoint()
    trainer = make_trainer(tmp_path, [best, compressed], max_epochs=5, enable_checkpointing=True)
    trainer.fit(Worse(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert compressed.path == str(tmp_path / "epoch=1-step=8.safetensors")


def test_a_second_fit_writes_again(tmp_path: Path) -> None:
    compressed, module = CompressedCheckpoint(), Regression()
    trainer = make_trainer(tmp_path, [compressed])
    trainer.fit(module, loader())
    before = load_compressed(compressed.path)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert not same(load_compressed(compressed.path), before)
    assert same(load_compressed(compressed.path), module.state_dict())


@pytest.mark.filterwarnings(r"ignore:You are trying to `self.log\(\)`:UserWarning")  # which barebones does not do
@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
def test_a_run_that_leaves_nothing_leaves_no_file(tmp_path: Path, mode: str) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[CompressedCheckpoint()],
        default_root_dir=tmp_path,
        **{mode: True},
    )
    trainer.fit(Regression(), loader())
    assert not files(tmp_path)


def test_a_run_that_fails_leaves_no_file(tmp_path: Path) -> None:
    class Fails(Regression):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(tmp_path, CompressedCheckpoint(), module=Fails())
    assert not files(tmp_path)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_only_fit_writes(tmp_path: Path, stage: str) -> None:
    class Tested(ValidatedRegression):
        def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    trainer = make_trainer(tmp_path, [CompressedCheckpoint()])
    getattr(trainer, stage)(Tested(), loader(), verbose=False)
    assert not files(tmp_path)


# --- refusals ------------------------------------------------------------------------------------------------------


class NoSteps(Regression):
    """Fails if it is trained."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        raise AssertionError


class ExtraState(NoSteps):
    """Has something in its state dict that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


def test_a_state_dict_of_more_than_tensors_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="must hold nothing but tensors, got '_extra_state'"):
        train(tmp_path, CompressedCheckpoint(), module=ExtraState())


def test_sharded_weights_are_refused_at_setup() -> None:
    # The strategy asks for a GPU if it is the Trainer that starts it.
    trainer = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy), precision="32-true")
    with pytest.raises(MisconfigurationException, match="does not support ModelParallelStrategy"):
        CompressedCheckpoint().setup(trainer, NoSteps(), "fit")


def test_remote_checkpoints_need_a_folder_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"the checkpoints go to memory://kept\. Give it a `dirpath`"):
        train(tmp_path, CompressedCheckpoint(), ModelCheckpoint("memory://kept"), module=NoSteps())


class Custom:
    """Not something that a checkpoint of weights may hold."""


def test_a_checkpoint_that_needs_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    module = Regression()
    module.save_hyperparameters({"custom": Custom()})
    with pytest.raises(
        MisconfigurationException, match=r"loads weights only, and the best checkpoint, .* Leave them out"
    ):
        train(tmp_path, CompressedCheckpoint(), ModelCheckpoint(tmp_path), module=module)
    assert not files(tmp_path)
