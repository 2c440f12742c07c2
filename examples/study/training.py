"""One run of the study: a network trained once by one method from one seed, and what came out."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass

import torch
from batches import Batches, Dataset
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from methods import Method
from networks import make_network
from problems import Problem
from torch import Tensor, nn

from lightning_gcsr import module_bytes
from lightning_gcsr.core.parameter_selection import select_parameters

TESTED_AT_ONCE = 500
"""How many images or sequences are in a batch of validation and test."""


@dataclass(frozen=True)
class Outcome:
    """What came out of one run.

    Accuracies are in [0, 1], of text the share of the next characters that are predicted; losses are cross-entropies in
    nats. Nonzeros are exact, as ``sparsity/model`` counts them: of the weights that a penalty may reach. Bytes are
    those of the whole network, dense and as :func:`~lightning_gcsr.save_compressed` stores it.
    """

    validation_accuracy: float
    test_accuracy: float
    validation_loss: float
    test_loss: float
    weights: int
    nonzeros: int
    dense_bytes: int
    stored_bytes: int
    train_loss: float
    seconds: float
    train_images: int
    classes: int


class Classifier(LightningModule):
    """A network and its cross-entropy. Methods come as callbacks and as optimizers."""

    def __init__(self, network: nn.Module, problem: Problem, method: Method, steps: int) -> None:
        super().__init__()
        self.network, self.problem, self.method, self.steps = network, problem, method, steps
        self.loss = torch.zeros(())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.network(inputs).flatten(0, -2), labels.flatten())
        self.loss = loss.detach()
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.method.optimizer(self.network, self.problem, self.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.problem.lr_factor(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(problem: Problem, method: Method, seed: int, data: Dataset) -> Outcome:
    """Train once and measure. The data decide the device; the seed decides the weights and the order of the data."""
    device = data.train[0].device
    seed_everything(seed, verbose=False)
    network = make_network(problem.network, data.shape, data.classes).to(device)
    batches = Batches(data.train, problem.batch_size, seed, problem.augment)
    module = Classifier(network, problem, method, problem.epochs * len(batches))
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
    validation, test = measure(network, data.validation), measure(network, data.test)
    dense_bytes, stored_bytes = module_bytes(network)
    weights = select_parameters(network).values()
    return Outcome(
        validation_accuracy=validation[0],
        test_accuracy=test[0],
        validation_loss=validation[1],
        test_loss=test[1],
        weights=sum(weight.numel() for weight in weights),
        nonzeros=sum(int(weight.count_nonzero()) for weight in weights),
        dense_bytes=dense_bytes,
        stored_bytes=stored_bytes,
        train_loss=train_loss,
        seconds=seconds,
        train_images=len(data.train[1]),
        classes=data.classes,
    )


@torch.no_grad()
def measure(network: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy, the share of the labels that the network gives the highest score, and mean cross-entropy."""
    right, loss = [], []
    for inputs, labels in Batches(data, TESTED_AT_ONCE):
        logits = network(inputs).flatten(0, -2)
        right.append((logits.argmax(1) == labels.flatten()).sum())
        loss.append(nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").double())
    return int(torch.stack(right).sum()) / data[1].numel(), float(torch.stack(loss).sum()) / data[1].numel()


def quieten() -> None:
    """Keep Lightning from saying the same with each of hundreds of runs."""
    for name in ("lightning.pytorch", "torch.utils._pytree"):  # the second, of an enumeration of torchao's
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*(LeafSpec|have collapsed|does not have many workers|logging interval).*")
