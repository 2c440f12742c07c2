"""Trainers, modules, loggers and strategies of ``lightning.pytorch`` and of ``pytorch_lightning`` work alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_gcsr import (
    CompressedCheckpoint,
    CompressionMonitor,
    Gate,
    GradientCoherentRegularization,
    KeepZeros,
    Schedule,
    find_strength,
    threshold_curve,
)
from lightning_gcsr.callbacks.reporting.tensorboard_layout import run_holds

from .models import loader, mlp, same, weights_of

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]


pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> Any:
    """One of the two packages."""
    return pytest.importorskip(request.param)


def make_module(pl: Any, manual: bool = False) -> Any:
    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"size": 8})
            self.net = mlp()
            self.automatic_optimization = not manual

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def make_trainer(pl: Any, path: Path, callbacks: list[Any], **arguments: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    given = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": path, "log_every_n_steps": 1}
    return pl.Trainer(callbacks=callbacks, **(quiet | given | arguments))


def penalty(**arguments: Any) -> GradientCoherentRegularization:
    return GradientCoherentRegularization(**({"strength": 0.05, "gate": Gate(), "update": "proximal"} | arguments))


SETTINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "accumulation": lambda pl: {"accumulate_grad_batches": 2},
    "clipping": lambda pl: {"gradient_clip_val": 0.1},
    "a loss scale": lambda pl: {
        "plugins": [
            importlib.import_module(f"{pl.__name__}.plugins").MixedPrecision(
                "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)
            )
        ]
    },
    "manual": lambda pl: {},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("update", ["proximal", "dual_averaging", "gradient"])
def test_both_packages_train_the_same_weights(tmp_path: Path, setting: str, update: Any) -> None:
    pytest.importorskip("pytorch_lightning")
    weights = []
    for name in PACKAGES:
        pl = importlib.import_module(name)
        module = make_module(pl, manual=setting == "manual")
        callbacks = [penalty(update=update, schedule=Schedule(stop=0.5)), KeepZeros()]
        make_trainer(pl, tmp_path, callbacks, **SETTINGS[setting](pl)).fit(module, loader(), loader())
        weights.append(weights_of(module))
    assert same(*weights)
    assert not same(weights[0], weights_of(make_module(importlib.import_module(PACKAGES[0]))))


def test_a_run_that_is_stopped_and_resumed_ends_as_the_run_that_was_not(tmp_path: Path, pl: Any) -> None:
    ends = []
    for parts in ([4], [2, 4]):
        path = None
        for epochs in parts:
            module, saved = (
                make_module(pl),
                pl.callbacks.ModelCheckpoint(tmp_path / str(parts), save_last=True, enable_version_counter=False),
            )
            callbacks = [penalty(update="dual_averaging", schedule=Schedule(warmup=2, stop=6)), KeepZeros(), saved]
            trainer = make_trainer(pl, tmp_path, callbacks, max_epochs=epochs, enable_checkpointing=True)
            trainer.fit(module, loader(), loader(), ckpt_path=path)
            path = saved.last_model_path
        ends.append(weights_of(module))
    assert same(*ends)


def test_loggers_and_checkpoints_get_all_that_they_can_take(tmp_path: Path, pl: Any) -> None:
    monitor = CompressionMonitor(verbose=False, histograms=True, images_every_n_steps=4)
    best = pl.callbacks.ModelCheckpoint(tmp_path / "best", monitor="sparsity/model", mode="max")
    loggers = [pl.loggers.TensorBoardLogger(tmp_path / "tensorboard"), pl.loggers.CSVLogger(tmp_path / "csv")]
    callbacks = [penalty(), monitor, CompressedCheckpoint(), best]
    trainer = make_trainer(pl, tmp_path, callbacks, logger=loggers, enable_checkpointing=True)
    trainer.fit(make_module(pl), loader(), loader())
    tags = EventAccumulator(loggers[0].log_dir).Reload().Tags()
    assert {"layers/sparsity", "layers/gcsr/injected", "layers/weights"} <= set(tags["images"])
    assert "weights/net.0.weight" in tags["histograms"]
    assert {"custom_scalars__config__", "summary/text_summary"} <= set(tags["tensors"])
    assert {"gcsr/injected", "sparsity/model"} <= set(tags["scalars"])
    assert run_holds(loggers[0], "_hparams_/")
    assert (Path(loggers[1].log_dir) / "summary.md").exists()
    assert best.best_model_path


def test_the_trials_of_the_finder_and_the_curve_run(tmp_path: Path, pl: Any) -> None:
    trainer, module = make_trainer(pl, tmp_path, [], max_epochs=3), make_module(pl)
    result = find_strength(trainer, module, loader(), loader(), strengths=[1e-3, 2e-3], progress=False)
    assert [trial.strength for trial in result.trials] == [0.0, 1e-3, 2e-3]
    curve = threshold_curve(trainer, module, loader(), thresholds=[0.1], progress=False)
    assert len(curve.points) == 2


def test_errors_are_of_the_trainers_own_package(tmp_path: Path, pl: Any) -> None:
    error = importlib.import_module(f"{pl.__name__}.utilities.exceptions").MisconfigurationException
    callbacks = [penalty(), penalty()]
    with pytest.raises((error, RuntimeError), match=r"name of its own|more than one stateful callback"):
        make_trainer(pl, tmp_path, callbacks).fit(make_module(pl), loader(), loader())
    with pytest.raises(error, match=r"none of the Trainer's callbacks is a .* whose schedule has a `stop`"):
        make_trainer(pl, tmp_path, [penalty(), KeepZeros()]).fit(make_module(pl), loader(), loader())
