"""Train LeNet-5 with group lasso over coupled groups, remove its zero units, and compare speed and sizes.

The training takes about a minute on a part of Fashion-MNIST. Debian's package dataset-fashion-mnist has the images.
Elsewhere, pass the folder that holds them as --data_root, or let torchvision download them there.
"""

from __future__ import annotations

import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_gcsr import (
    CoupledGroupLasso,
    GradientCoherentRegularization,
    KeepZeros,
    Schedule,
    save_compressed,
    shrink_units,
)

sys.path.append(str(Path(__file__).parent / "study"))  # whose data and networks these are
from batches import Batches
from images import MissingDataError, load_images
from networks import make_network


class Classifier(LightningModule):
    """A network, its cross-entropy, and SGD with a learning rate that falls to zero."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.network, self.example_input_array = network, example

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@torch.no_grad()
def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The share of these images that the network puts into their class."""
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in Batches(data, 1_000))
    return right / len(data[1])


@torch.no_grad()
def milliseconds(networks: list[nn.Module], images: Tensor, repeats: int = 60) -> list[float]:
    """The median time of a batch. The networks take turns, so that disturbances hit all of them."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(repeats):
        for network, measured in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(images)
            measured.append(1_000 * (time.perf_counter() - start))
    return [statistics.median(measured[5:]) for measured in times]


def file_bytes(network: nn.Module) -> tuple[int, int]:
    """The bytes of the weights as torch saves them, and as a compressed file."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    with tempfile.TemporaryDirectory() as folder:
        save_compressed(network, path := Path(folder) / "network.safetensors")
        return len(buffer.getvalue()), path.stat().st_size


def main(
    target_sparsity: ClosedUnitInterval = 0.9,
    data: str = "fashion_mnist",
    data_root: Path = Path("data"),
    train_images: PositiveInt = 12_000,
    epochs: PositiveInt = 10,
    seed: NonNegativeInt = 0,
) -> None:
    """Train with group lasso, shrink, and compare.

    Args:
        target_sparsity: The fraction of the units that shall be zero; the outputs of the last layer stay.
        data: The name of an image set of the study, of images of at least 16×16 pixels.
        data_root: The folder that holds the image set, in torchvision's layout.
        train_images: How many images to train on.
        epochs: Passes over them.
        seed: Seed of the weights and of the order of the images.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers).*")
    console = Console()
    seed_everything(seed, verbose=False)
    torch.set_num_threads(1)
    try:
        images = load_images(data, data_root, data_root, train_images)
    except MissingDataError as error:
        sys.exit(str(error))
    network = make_network("lenet_5", images.shape, images.classes)
    regularization = GradientCoherentRegularization(
        CoupledGroupLasso(), target_sparsity=target_sparsity, schedule=Schedule(stop=0.7)
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[regularization, KeepZeros()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    console.print(f"Training LeNet-5 on {train_images:,} images of {data}, {epochs} epochs ...")
    trainer.fit(Classifier(network, images.test[0][:1]), Batches(images.train, 64, seed))
    network.eval()

    batch = images.test[0][:256]
    smaller, report = shrink_units(network, batch)

    units = ", ".join(f"{before} → {after}" for before, after in report.units.values())
    console.print(f"Units: {units}. Outputs differ by at most {report.difference:.1e}.")
    for name, reason in report.left_alone.items():
        console.print(f"{name}: {reason}.")
    table = Table("", "trained", "shrunk", "ratio")
    rows: list[tuple[str, float, float, str]] = [
        ("test accuracy in %", 100 * accuracy(network, images.test), 100 * accuracy(smaller, images.test), ".2f"),
        ("parameters", report.parameters.before, report.parameters.after, ",.0f"),
    ]
    before, after = (flops / len(batch) / 1e6 for flops in report.flops)
    rows.append(("MFLOP for an image", before, after, ".2f"))
    for title, images_of_batch in (("ms for 1 image", batch[:1]), ("ms for 256 images", batch)):
        before, after = milliseconds([network, smaller], images_of_batch)
        rows.append((title, before, after, ".2f"))
    (saved, compressed), (saved_after, compressed_after) = file_bytes(network), file_bytes(smaller)
    rows.append(("bytes saved by torch", saved, saved_after, ",.0f"))
    rows.append(("bytes compressed", compressed, compressed_after, ",.0f"))
    for title, before, after, form in rows:
        ratio = f"{before / after:.1f}×" if title != "test accuracy in %" else ""
        table.add_row(title, f"{before:{form}}", f"{after:{form}}", ratio)
    console.print(table)


if __name__ == "__main__":
    auto_cli(main)
