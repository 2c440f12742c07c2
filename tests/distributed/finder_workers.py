"""The search in two processes, each with data of its own and metrics that Lightning does not average."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from integration.models import make_trainer, samples
from integration.searching import Learner, learning_sgd
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_gcsr import find_strength

WORLD = 2


class UnevenlyLogged(Learner):
    """Its metrics are those of each process, and the first process logs one more."""

    def __init__(self) -> None:
        super().__init__(make_optimizer=learning_sgd)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=False)
        if self.global_rank == 0:
            self.log("a_number_of_the_first", loss, sync_dist=False, rank_zero_only=True)


def share_of(rank: int) -> DataLoader[Any]:
    """Half of the data, which is another for each process."""
    return DataLoader(Subset(samples(32), list(range(rank, 32, WORLD))), batch_size=4)


def searches(rank: int, path: Path) -> dict[str, Any]:
    """The same search twice, and what is left of the weights and random numbers."""
    model = UnevenlyLogged()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = make_trainer(
        path,
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=WORLD,
        use_distributed_sampler=False,
        max_epochs=5,
    )
    state = torch.get_rng_state()
    arguments: dict[str, Any] = {"strengths": 3, "progress": False}
    data = share_of(rank)
    results = [find_strength(trainer, model, data, data, **arguments) for _ in range(2)]
    untouched = torch.equal(state, torch.get_rng_state())
    alone = make_trainer(path)
    own = alone.validate(model, data, verbose=False)[0]["val_loss"]
    return {
        "results": [asdict(result) for result in results],
        "suggestion": list(results[0].suggestion(tolerance=1)),
        "same weights": all(map(torch.equal, before, model.parameters())),
        "same random state": untouched,
        "own": own,
    }
