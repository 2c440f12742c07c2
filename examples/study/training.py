"""One run of the study: a network trained once by one method from one seed, and what came out."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from typing import Optional

import torch
from images import Batches, Images, check_image_set
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from methods import Method
from networks import check_network, make_network
from torch import Tensor, nn

from lightning_gcsr import module_bytes
from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.validation import check_choice, check_finite_number, check_integer

ZERO_THRESHOLD = 1e-3
"""Weights smaller than this count as zero, and are set to zero before the accuracy beside a compression is taken."""


@dataclass(frozen=True)
class Problem:
    """What is trained, on what, and how: SGD with momentum and a learning rate that falls to zero as a cosine."""

    data: str
    network: str
    epochs: int
    lr: float
    momentum: float = 0.9
    batch_size: int = 128
    train_images: Optional[int] = None
    augment: Optional[str] = None

    def __post_init__(self) -> None:
        for name in ("lr", "momentum"):
            if isinstance(value := getattr(self, name), int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))  # 1 and 1.0 are one run
        check_image_set(self.data)
        check_network(self.network)
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_finite_number("lr", self.lr, 0)
        check_finite_number("momentum", self.momentum, 0, 0.999)
        check_choice("augment", self.augment, [None, "crop", "crop_flip"])
        if self.train_images is not None:
            check_integer("train_images", self.train_images, 1)

    @property
    def title(self) -> str:
        """What the report calls it."""
        return f"{self.data.removeprefix('folder:')}, {self.network}"


@dataclass(frozen=True)
class Outcome:
    """Accuracies in [0, 1]; those with ``zeroed`` after weights below the zero threshold were set to zero."""

    validation_accuracy: float
    test_accuracy: float
    validation_accuracy_zeroed: float
    test_accuracy_zeroed: float
    weights: int
    nonzeros: int
    exact_nonzeros: int
    dense_bytes: int
    stored_bytes: int
    train_loss: float
    seconds: float
    train_images: int
    classes: int


class Classifier(LightningModule):
    """A network and its cross-entropy. Methods come as callbacks, but for the one that is an optimizer."""

    def __init__(self, network: nn.Module, problem: Problem, method: Method, steps: int) -> None:
        super().__init__()
        self.network, self.problem, self.method, self.steps = network, problem, method, steps
        self.loss = torch.zeros(())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.loss = loss.detach()
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.method.optimizer(self.network, self.problem.lr, self.problem.momentum)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(problem: Problem, method: Method, seed: int, images: Images) -> Outcome:
    """Train once and measure. The images decide the device; the seed decides the weights and the order of the data."""
    device = images.train[0].device
    seed_everything(seed, verbose=False)
    network = make_network(problem.network, images.shape, images.classes).to(device)
    batches = Batches(images.train, problem.batch_size, seed, problem.augment)
    steps = problem.epochs * len(batches)
    module = Classifier(network, problem, method, steps)
    trainer = Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.index is None else [device.index],
        max_epochs=problem.epochs,
        callbacks=method.callbacks(network, problem.epochs),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(module, batches)
    train_loss = float(module.loss)  # waits for the device
    seconds = time.perf_counter() - start
    network.to(device).eval()
    exact_nonzeros = nonzero_weights(network)
    as_trained = accuracy(network, images.validation), accuracy(network, images.test)
    with torch.no_grad():
        for weight in select_parameters(network).values():
            weight.mul_(weight.abs() >= ZERO_THRESHOLD)
    nonzeros = nonzero_weights(network)
    changed = nonzeros != exact_nonzeros
    zeroed = (accuracy(network, images.validation), accuracy(network, images.test)) if changed else as_trained
    dense_bytes, stored_bytes = module_bytes(network)
    return Outcome(
        validation_accuracy=as_trained[0],
        test_accuracy=as_trained[1],
        validation_accuracy_zeroed=zeroed[0],
        test_accuracy_zeroed=zeroed[1],
        weights=sum(weight.numel() for weight in select_parameters(network).values()),
        nonzeros=nonzeros,
        exact_nonzeros=exact_nonzeros,
        dense_bytes=dense_bytes,
        stored_bytes=stored_bytes,
        train_loss=train_loss,
        seconds=seconds,
        train_images=len(images.train[1]),
        classes=images.classes,
    )


def nonzero_weights(network: nn.Module) -> int:
    """The number of weights, of those that a penalty may reach, that are not zero."""
    return sum(int(weight.count_nonzero()) for weight in select_parameters(network).values())


@torch.no_grad()
def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The share of these images that the network puts into their class."""
    right = [(network(images).argmax(1) == labels).sum() for images, labels in Batches(data, 2_000)]
    return int(torch.stack(right).sum()) / len(data[1])


def quieten() -> None:
    """Keep Lightning from saying the same with each of hundreds of runs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*(LeafSpec|as good as dead|does not have many workers|logging interval).*")
