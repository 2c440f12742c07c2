"""Find a strength of L1 for a network on handwritten digits, then train with it.

The search needs no strength and no range to begin with. It takes about a minute and a half.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from digits import TRAINING_IMAGES, DigitsClassifier, digits
from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split

from lightning_gcsr import CompressionRatio, GradientCoherentRegularization, find_strength

VALIDATION_IMAGES = 300


class Classifier(DigitsClassifier):
    """The network of ``digits.py``, with validation images to choose the strength on and test images to judge it."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("test_accuracy", self.accuracy)


def make_trainer(epochs: int, *callbacks: Callback) -> Trainer:
    """A Trainer as the search and the trainings after it use it."""
    return Trainer(
        accelerator="cpu",  # a network this small is faster there
        max_epochs=epochs,
        check_val_every_n_epoch=max(1, epochs // 4),
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def main(seed: NonNegativeInt = 0, epochs: PositiveInt = 40, output: Path = Path("runs/find_strength")) -> None:
    """Find a strength, compare it with that of plain L1, and train with and without a penalty.

    Args:
        seed: Seed of the split, the weights and the order of the data.
        epochs: Passes over the training images, of each trial and of the trainings that follow.
        output: Where the figure and the result go.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the layers are too small for more threads to help

    seed_everything(seed, verbose=False)
    model = Classifier(max_epochs=epochs)
    both, test = digits(seed)
    sizes = [TRAINING_IMAGES - VALIDATION_IMAGES, VALIDATION_IMAGES]
    training, validation = random_split(both.dataset, sizes, torch.Generator().manual_seed(seed))
    train_loader = DataLoader(training, batch_size=64, shuffle=True)
    val_loader = DataLoader(validation, batch_size=512)

    result = find_strength(make_trainer(epochs), model, train_loader, val_loader, compare_plain=True)

    console = Console(highlight=False, soft_wrap=True)
    suggestion = result.suggestion()
    console.print(f"Suggested strength: {suggestion.strength:.3g}, {suggestion.reason}.")
    for name, level in (("with the gate", result.tolerance_level), ("plain", result.plain_tolerance_level)):
        end = f"fails at {level.failed:.3g}" if level.failed else "did not fail at any strength tried"
        console.print(f"Tolerance level, {name}: learned at {level.strength:.3g}, {end}.")
    output.mkdir(parents=True, exist_ok=True)
    result.plot(suggestion).savefig(output / "strength.png", dpi=120)
    result.save(output / "strength.json")
    console.print(f"Figure: {output / 'strength.png'}, result: {output / 'strength.json'}")

    for name, callbacks in (
        ("no penalty", []),
        (f"strength {suggestion.strength:.3g}", [GradientCoherentRegularization("l1", strength=suggestion.strength)]),
    ):
        seed_everything(seed, verbose=False)
        model = Classifier(max_epochs=epochs)
        trainer = make_trainer(epochs, *callbacks)
        trainer.fit(model, train_loader, val_loader)
        [metrics] = trainer.test(model, test, verbose=False)
        ratio = float(CompressionRatio()(model))
        console.print(f"Trained with {name}: test accuracy {100 * metrics['test_accuracy']:.1f} %, {ratio:.3g}×")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
