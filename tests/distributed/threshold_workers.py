"""The curve in two processes, after a training, each with its own data and metrics that Lightning does not average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from integration.models import ValidatedRegression, make_trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_gcsr import threshold_curve

from .finder_workers import WORLD, share_of


class Unaveraged(ValidatedRegression):
    """Its metric is that of each process."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=False)


def curves(rank: int, path: Path) -> dict[str, Any]:
    """The table, what this process alone would say of the same thresholds, and what is left of the weights."""
    model, data = Unaveraged(), share_of(rank)
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer(path, strategy=strategy, devices=WORLD, use_distributed_sampler=False)
    trainer.fit(model, data, data)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    table = threshold_curve(trainer, model, data, thresholds=4, progress=False).table
    thresholds = [row["threshold"] for row in table]
    alone = threshold_curve(make_trainer(path), model, data, thresholds=thresholds, progress=False).table
    same = all(map(torch.equal, before, model.parameters()))
    return {"table": table, "own": [row["val_loss"] for row in alone], "same weights": same}
