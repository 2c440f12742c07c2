"""Find out how small a network for handwritten digits can be, and what each step costs, then train it.

The network is a small CNN under AdamW with a one-cycle schedule. The search needs no strength and no range to begin
with; it takes about half a minute.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Literal

import torch
from digits import TRAINING_IMAGES, digits
from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_gcsr import CompressionRatio, GradientCoherentRegularization, find_strength

VALIDATION_IMAGES = 300


class Classifier(LightningModule):
    """A CNN of 151,072 weights, with validation images to choose on and test images to judge."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
        head = [nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)]
        self.net = nn.Sequential(*convolutions, nn.MaxPool2d(2), *head)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images.reshape(-1, 1, 8, 8))
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_acc", self.accuracy)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_trainer(epochs: int, *callbacks: Callback) -> Trainer:
    """A Trainer as the search and the trainings after it use it."""
    return Trainer(
        accelerator="cpu",  # a network this small is faster there
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def main(
    seed: NonNegativeInt = 0,
    epochs: PositiveInt = 10,
    by: Literal["target", "strength"] = "target",
    output: Path = Path("runs/find_strength"),
) -> None:
    """Find a trade-off between accuracy and size, and train with and without what it suggests.

    Args:
        seed: Seed of the split, the weights and the order of the data.
        epochs: Passes over the training images, of each trial and of the trainings that follow.
        by: Whether target sparsities or strengths are tried.
        output: Where the figure and the result go.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the layers are too small for more threads to help

    seed_everything(seed, verbose=False)
    model = Classifier()
    both, test = digits(seed)
    sizes = [TRAINING_IMAGES - VALIDATION_IMAGES, VALIDATION_IMAGES]
    training, validation = random_split(both.dataset, sizes, torch.Generator().manual_seed(seed))
    train_loader = DataLoader(training, batch_size=64, shuffle=True)
    val_loader = DataLoader(validation, batch_size=512)

    result = find_strength(
        make_trainer(epochs),
        model,
        train_loader,
        val_loader,
        metric="val_acc",
        mode="max",
        strengths=9 if by == "strength" else None,
        progress=False,
    )

    console = Console(highlight=False, soft_wrap=True)
    console.print(result)
    suggestion = result.suggestion()
    console.print(f"Suggested: {suggestion.reason}.")
    output.mkdir(parents=True, exist_ok=True)
    result.plot(suggestion).savefig(output / f"{by}.png", dpi=120)
    result.save(output / f"{by}.json")
    console.print(f"Figure: {output / f'{by}.png'}, result: {output / f'{by}.json'}")

    chosen = ", ".join(f"{name}={value:.3g}" for name, value in suggestion.arguments.items())
    for name, callbacks in (
        ("no penalty", []),
        (chosen, [GradientCoherentRegularization("l1", **suggestion.arguments)]),
    ):
        seed_everything(seed, verbose=False)
        model = Classifier()
        trainer = make_trainer(epochs, *callbacks)
        trainer.fit(model, train_loader, val_loader)
        [metrics] = trainer.test(model, test, verbose=False)
        ratio = float(CompressionRatio()(model))
        console.print(f"Trained with {name}: test accuracy {100 * metrics['test_acc']:.1f} %, {ratio:.3g}×")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
