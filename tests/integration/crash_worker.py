"""What runs in the process that is killed: a small classifier of scikit-learn's digits, trained as a user would."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gcsr import CompressionMonitor, Gate, GradientCoherentRegularization, Schedule

from .models import MemoryLogger, make_trainer

BATCH_SIZE = 64
BATCHES = 29
"""In an epoch; the last one is smaller, and so is the last of the windows of two."""
EPOCHS = {1: 4, 2: 8}
STEPS = {1: 116, 2: 120}
"""By the number of accumulated batches."""

DELAY, WARMUP = 50, 40
CASES: dict[str, dict[str, Any]] = {
    "agreement of elements, proximal": {
        "update": "proximal",
        "strength": 0.02,
        "gate": Gate("agreement", scope="element"),
        "schedule": Schedule(delay=DELAY, warmup=WARMUP),
    },
    "direction of parameters, gradient, accumulated": {
        "update": "gradient",
        "strength": 0.01,
        "gate": Gate("direction", scope="parameter", threshold=0.5),
        "schedule": Schedule(delay=DELAY, warmup=WARMUP),
    },
}
ACCUMULATE = dict(zip(CASES, (1, 2), strict=True))


class DigitBatches:
    """Batches in an order that the number of the epoch decides; goes on within an epoch after a resume."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy(images).float() / 16
        self.labels = torch.from_numpy(labels).long()
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[Tensor]]:
        # Lightning makes an iterator before it restores the position, but asks it for a batch only afterwards.
        if self.position == BATCHES:
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.epoch))
        for indices in order.split(BATCH_SIZE)[self.position :]:
            self.position += 1
            yield [self.images[indices], self.labels[indices]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Classifier(LightningModule):
    """A small perceptron under SGD with momentum and a learning rate that changes at every step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Journal(MemoryLogger):
    """Appends what it gets to a file, a line for each call, in one write."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            # A kill may still tear the line where a page of memory ends: then it stands alone.
            file.write("\n" + json.dumps({"step": step, **metrics}) + "\n")


class Progress(Callback):
    """Tells how many optimizer steps are made, after the decision is in the journal and before a checkpoint is."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.tell(trainer.global_step)


class CheckpointWithin(ModelCheckpoint):
    """Saves right after an optimizer step within an epoch, because of two faults of Lightning 2.6.

    After a resume Lightning's own has forgotten that it saved this step already, and saves it again at the first
    micro-batch that follows. The gradient of that micro-batch is in no checkpoint: who resumes from there loses it.
    And who resumes from after the last batch of an epoch, and then from a checkpoint of that run, is one epoch behind.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, i)


def train(
    folder: Path, case: str, checkpoint: Path | None = None, tell: Callable[[int], None] = lambda step: None
) -> Path:
    """Train to the end, from a checkpoint if there is one; returns the path of the checkpoint of the end."""
    accumulate = ACCUMULATE[case]
    trainer = make_trainer(
        folder,
        [
            GradientCoherentRegularization(**CASES[case]),
            CompressionMonitor(),
            Progress(tell),
            CheckpointWithin(folder / "checkpoints", "{step}", every_n_train_steps=5, save_top_k=-1, save_last=True),
        ],
        max_epochs=EPOCHS[accumulate],
        accumulate_grad_batches=accumulate,
        logger=Journal(folder / "journal.jsonl"),
        enable_checkpointing=True,
    )
    trainer.fit(Classifier(STEPS[accumulate]), DigitBatches(), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "final.ckpt")
    return folder / "final.ckpt"


def work(folder: Path, case: str, checkpoint: Path | None, progress: Connection, limit: int | None) -> None:
    """The life of one process.

    Args:
        folder: Where everything is written.
        case: The name of the settings.
        checkpoint: Where to start from.
        progress: Gets the number of steps made.
        limit: The step at which the process waits to be killed, should the killer be slow.
    """
    torch.set_num_threads(1)
    # As under pytest a warning is an error, except that a restarted user has checkpoints already.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "GPU available but not used")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")

    def tell(step: int) -> None:
        progress.send(step)
        if step == limit:
            time.sleep(60)

    train(folder, case, checkpoint, tell)
