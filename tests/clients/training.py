"""A short training that reaches its target under any optimizer that works."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcsr import GradientCoherentRegularization

TARGET = 0.8


def loader() -> DataLoader[Any]:
    """A regression of 256 samples."""
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, :1] * inputs[:, 1:2]).sign() + inputs[:, 2:3]
    return DataLoader(TensorDataset(inputs, targets), batch_size=16)


class Client(LightningModule):
    """A small network with the optimizer of a user.

    Args:
        make_optimizer: Makes the optimizer from the parameters.
        net: The network, from 16 numbers to one.
    """

    def __init__(self, make_optimizer: Callable[[Any], Optimizer], net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 1, bias=False))
        self.make_optimizer = make_optimizer

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def train(model: LightningModule, max_epochs: int = 8, **arguments: Any) -> GradientCoherentRegularization:
    """Train on the CPU with the callback's defaults and return it; a target of 80 % zeros, if no aim is given."""
    aim = {} if "strength" in arguments else {"target_sparsity": TARGET}
    callback = GradientCoherentRegularization(**(aim | arguments))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for about in (".*is deprecated.*", ".*Deprecat.*", ".*add_.* is deprecated.*"):  # within those packages
            warnings.filterwarnings("ignore", about)
        trainer = Trainer(
            max_epochs=max_epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
        )
        trainer.fit(model, loader())
    return callback


def sparsity(callback: GradientCoherentRegularization) -> float:
    """The fraction of the weights of the module that are zero."""
    assert callback.regularizer is not None
    weights = callback.regularizer.parameters.values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
