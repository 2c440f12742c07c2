"""Train a deep network on handwritten digits under strong L1 in four ways, and compare the results.

The ways are: no penalty, plain L1, delayed L1 and gradient-coherent L1. Network, seed, strength and warm-up are the
same: plain and gradient-coherent L1 differ in the gate alone. At this strength, the network collapses without a gate.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # draws into files, also where there is no screen

import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_gcsr import (
    CompressionMonitor,
    CompressionRatio,
    Gate,
    GradientCoherentRegularization,
    Schedule,
    Sparsity,
    module_bytes,
    save_compressed,
)

TRAINING_IMAGES = 1300
BATCH_SIZE = 64
NAMES = {"l1": "L1", "l2": "L2", "elastic_net": "elastic net", "group_lasso": "group lasso"}


class DigitsClassifier(LightningModule):
    """A deep multilayer perceptron: 64 inputs, seven hidden layers of 128 units, ten classes.

    The module contains no regularization; the callback adds it.
    """

    def __init__(self, lr: float = 0.02, max_epochs: int = 40) -> None:
        super().__init__()
        self.lr, self.max_epochs = lr, max_epochs
        sizes = [64, *[128] * 7]
        hidden = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(128, 10))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("test_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = self.max_epochs * -(-TRAINING_IMAGES // BATCH_SIZE)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class History(Callback):
    """Records what the figure shows: test accuracy and sparsity over the steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.accuracy: list[float] = []
        self.sparsity: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)
        self.accuracy.append(float(trainer.callback_metrics["test_accuracy"]))
        self.sparsity.append(float(trainer.callback_metrics["sparsity/model"]))


@dataclass
class Run:
    """One trained network."""

    method: str
    accuracy: float
    sparsity: float
    ratio: float
    dense_bytes: int
    stored_bytes: int
    model: DigitsClassifier = field(repr=False)
    history: History = field(repr=False)


def digits(seed: int) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """1,300 training and 497 test images of 8×8 pixels, from scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(images).float()[order]
    y = torch.from_numpy(labels).long()[order]
    x = (x - x[:TRAINING_IMAGES].mean()) / x[:TRAINING_IMAGES].std()
    train = TensorDataset(x[:TRAINING_IMAGES], y[:TRAINING_IMAGES])
    test = TensorDataset(x[TRAINING_IMAGES:], y[TRAINING_IMAGES:])
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(train, BATCH_SIZE, shuffle=True, generator=shuffle), DataLoader(test, 512)


def train(method: str, callbacks: list[Callback], logger: TensorBoardLogger, seed: int, epochs: int) -> Run:
    """Train the network once from the same seed and report what came out."""
    seed_everything(seed, verbose=False)
    model = DigitsClassifier(max_epochs=epochs)
    history = History()
    monitor = CompressionMonitor(prog_bar=True, images_every_n_steps=210, verbose=False)
    trainer = Trainer(
        accelerator="cpu",  # a network this small is faster there
        max_epochs=epochs,
        callbacks=[*callbacks, monitor, history],
        logger=logger,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, *digits(seed))
    sparsity, ratio = Sparsity(), CompressionRatio()
    dense, stored = module_bytes(model)
    return Run(method, history.accuracy[-1], float(sparsity(model)), float(ratio(model)), dense, stored, model, history)


def table(runs: list[Run], title: str | None, style: box.Box) -> Table:
    """The results as a table."""
    result = Table(title=title, box=style)
    result.add_column("method")
    for column in ("test accuracy", "sparsity", "compression ratio", "stored size", "of dense"):
        result.add_column(column, justify="right")
    for run in runs:
        ratio = f"{run.ratio:,.1f}×" if run.ratio != float("inf") else "all zero"
        share = f"{run.stored_bytes / run.dense_bytes:.1%}"
        result.add_row(run.method, f"{run.accuracy:.1%}", f"{run.sparsity:.2%}", ratio, f"{run.stored_bytes:,}", share)
    return result


def summary(runs: list[Run]) -> str:
    """What the table says, in two sentences."""
    dense, *others, coherent = runs
    collapsed = [run.method for run in others if run.accuracy < dense.accuracy / 2]
    outcome = f"At this strength, the network collapses under {' and '.join(collapsed)} L1. " if collapsed else ""
    if coherent.sparsity == 1:
        return (
            outcome
            + "Gradient-coherent L1 made every weight zero: the strength is too large. Lower it with --strength."
        )
    return outcome + (
        f"The gradient-coherent network keeps {1 - coherent.sparsity:.2%} of its weights and has a test accuracy of"
        f" {coherent.accuracy:.1%}, against {dense.accuracy:.1%} without a penalty."
    )


def draw(runs: list[Run], title: str, path: Path) -> None:
    """Accuracy and sparsity over the optimizer steps, a line for each method."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    # Lines that coincide must not hide one another.
    styles = [("tab:gray", 5.0, "-"), ("tab:orange", 4.0, "-"), ("tab:green", 2.0, "--"), ("tab:blue", 2.0, "-")]
    for run, (color, width, dash) in zip(runs, styles, strict=True):
        for axis, values in zip(axes, (run.history.accuracy, run.history.sparsity), strict=True):
            axis.plot(
                run.history.steps,
                [100 * value for value in values],
                dash,
                color=color,
                linewidth=width,
                label=run.method,
            )
    for axis, label in zip(axes, ("test accuracy in %", "sparsity in %"), strict=True):
        axis.set(xlabel="optimizer step", ylabel=label, ylim=(-2, 102))
        axis.grid(alpha=0.3)
    axes[0].legend(loc="center right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    strength: NonNegativeFloat = 0.03,
    seed: NonNegativeInt = 0,
    epochs: PositiveInt = 40,
    penalty: Literal["l1", "l2", "elastic_net", "group_lasso"] = "l1",
    delay_epochs: NonNegativeInt = 8,
    output: Path = Path("runs/digits"),
) -> None:
    """Train a deep MLP on handwritten digits under a strong penalty in four ways, and compare.

    Args:
        strength: The strength of the penalty. At the default, the network collapses under plain regularization.
        seed: Seed of the split, the weights and the order of the data; the same for the four runs.
        epochs: Passes over the 1,300 training images.
        penalty: The penalty: l1 makes single weights zero, group_lasso whole units, l2 only makes weights small.
        delay_epochs: Epochs without penalty at the start of the delayed run, before the warm-up.
        output: Each call makes a folder version_0, version_1, ... in it, with figure, table, the small model and
            TensorBoard logs.
    """
    # The data are in memory; workers would only slow this down.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
    torch.set_num_threads(1)  # the layers are too small for more threads to help
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the four runs would repeat the same lines
    version = TensorBoardLogger(output.parent, name=output.name).version

    def regularization(gate: Gate | None, delay: int = 0) -> list[Callback]:
        schedule = Schedule(delay=delay, warmup=0.3)  # the default warm-up with a gate, for all
        return [GradientCoherentRegularization(penalty, strength=strength, gate=gate, schedule=schedule)]

    delay_steps = delay_epochs * -(-TRAINING_IMAGES // BATCH_SIZE)
    methods: dict[str, list[Callback]] = {
        "no penalty": [],
        "plain": regularization(gate=None),
        "delayed": regularization(gate=None, delay=delay_steps),
        "gradient-coherent": regularization(gate=Gate()),
    }
    runs = []
    for number, (method, callbacks) in enumerate(methods.items(), start=1):
        print(f"\n[{number}/{len(methods)}] {method}", flush=True)
        logger = TensorBoardLogger(output.parent, output.name, version, sub_dir=method.replace(" ", "-"))
        runs.append(train(method, callbacks, logger, seed, epochs))

    folder = Path(logger.root_dir) / f"version_{version}"
    title = f"Handwritten digits, {NAMES[penalty]} with strength {strength:g}, {epochs} epochs, seed {seed}"
    draw(runs, title, folder / "digits.png")
    markdown = Console(width=120, file=io.StringIO(), record=True)
    markdown.print(table(runs, None, box.MARKDOWN))
    (folder / "results.md").write_text(markdown.export_text().strip() + "\n")
    coherent = runs[-1]
    compressed = folder / f"{coherent.method}.safetensors"
    save_compressed(coherent.model, compressed)
    tensorboard = os.path.relpath(Path(sys.executable).parent / "tensorboard")  # also where no environment is active
    console = Console(width=110, highlight=False, soft_wrap=True)
    console.print()
    console.print(table(runs, title, box.SIMPLE_HEAD))
    if penalty in ("l1", "elastic_net", "group_lasso"):
        console.print(f"{summary(runs)}\n")
    console.print(
        "Only the weights of layers are regularized and counted here; the stored size, in bytes, includes the biases.\n"
    )
    console.print(f"Figure:      {folder / 'digits.png'}")
    console.print(f"Table:       {folder / 'results.md'}")
    console.print(
        f"Small model: {compressed}, {os.path.getsize(compressed):,} bytes with its header, of"
        f" {coherent.dense_bytes:,}; load_compressed restores every bit"
    )
    console.print(f"TensorBoard: {folder}, open it with\n\n    {tensorboard} --logdir {folder}\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
