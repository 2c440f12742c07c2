"""Whether `target_sparsity` is met: five targets under three optimizers and four schedules, three seeds each.

A LeNet-300-100 on scikit-learn's handwritten digits, 180 trainings of about two seconds. The page says how far the
share of exact zeros, as `sparsity/model` counts it, is from the one that was asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from batches import Batches, Dataset
from data import load_data
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from networks import make_network
from page import wrapped
from pytorch_optimizer import Lion
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from training import measure, quieten

from lightning_gcsr import GradientCoherentRegularization
from lightning_gcsr.core.parameter_selection import select_parameters

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda module: SGD(module.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda module: AdamW(module.parameters(), lr=0.003),
    "Lion": lambda module: Lion(module.parameters(), lr=0.0003),
}
SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    "warm-up": lambda optimizer, steps: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.2 * steps))),
    "OneCycle": lambda optimizer, steps: OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps
    ),
}
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.98)
BATCH_SIZE = 64


class Digits(LightningModule):
    """A classifier under one of the optimizers and schedules."""

    def __init__(self, network: nn.Module, optimizer: str, schedule: str, steps: int) -> None:
        super().__init__()
        self.network, self.optimizer, self.schedule, self.steps = network, optimizer, schedule, steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = OPTIMIZERS[self.optimizer](self.network)
        scheduler = SCHEDULES[self.schedule](optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(optimizer: str, schedule: str, target: float, seed: int, epochs: int, data: Dataset) -> dict[str, object]:
    """Train once towards the target: the sparsities asked for and found, and the test accuracy."""
    seed_everything(seed, verbose=False)
    network = make_network("lenet_300_100", data.shape, data.classes)
    batches = Batches(data.train, BATCH_SIZE, seed)
    trainer = Trainer(
        accelerator="cpu",  # a network this small is faster there
        max_epochs=epochs,
        callbacks=[GradientCoherentRegularization("l1", target_sparsity=target)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(network, optimizer, schedule, epochs * len(batches)), batches)
    network.eval()
    weights = select_parameters(network).values()
    nonzeros = sum(int(weight.count_nonzero()) for weight in weights)
    return {
        "optimizer": optimizer,
        "schedule": schedule,
        "target": target,
        "seed": seed,
        "sparsity": 1 - nonzeros / sum(weight.numel() for weight in weights),
        "test_accuracy": measure(network, data.test)[0],
    }


def write_page(runs: pd.DataFrame, epochs: int, path: Path) -> None:
    """The page: the largest miss first, then a row for each optimizer and schedule."""
    runs = runs.assign(miss=100 * (runs["sparsity"] - runs["target"]))
    worst = runs.loc[runs["miss"].abs().idxmax()]
    within = (runs["miss"].abs() <= 0.5).sum()
    grouped = runs.groupby(["optimizer", "schedule", "target"], sort=False)["miss"]
    largest = grouped.apply(lambda misses: misses.abs().max()).unstack("target")
    table = largest.map(lambda miss: f"{miss:.2f}").rename(columns=lambda target: f"{100 * target:g} %").reset_index()
    accuracies = runs.groupby(["optimizer", "target"], sort=False)["test_accuracy"].mean().unstack("target")
    reached = accuracies.map(lambda accuracy: f"{100 * accuracy:.1f}")
    reached = reached.rename(columns=lambda target: f"{100 * target:g} %").reset_index()
    lines = [
        "# Is a target sparsity met?",
        "",
        f"{within} of {len(runs)} trainings ended within half a point of the sparsity that was asked for. The largest"
        f" miss is {abs(worst['miss']):.2f} points: {100 * worst['sparsity']:.2f} % of zeros where"
        f" {100 * worst['target']:g} % were asked for, under {worst['optimizer']} with the schedule"
        f" {worst['schedule']!r}.",
        "",
        "**The largest miss over the seeds, in percentage points**",
        "",
        str(table.to_markdown(index=False, disable_numparse=True)),
        "",
        "**Test accuracy in %, mean over schedules and seeds**",
        "",
        str(reached.to_markdown(index=False, disable_numparse=True)),
        "",
        "## How it was measured",
        "",
        f"`examples/study/targets.py` trains LeNet-300-100 on scikit-learn's handwritten digits for {epochs} epochs of"
        f" 18 steps, with `GradientCoherentRegularization('l1', target_sparsity=...)` and seeds"
        f" {runs['seed'].min()} to {runs['seed'].max()}. Learning rates: SGD 0.05 with momentum 0.9, AdamW 0.003, Lion"
        " 0.0003. *Warm-up* rises over the first fifth of the training and then stays; *cosine* and *OneCycle* end at"
        " zero. Zeros are exact zeros, counted as `sparsity/model` counts them. Every run:"
        f" [{path.stem}.csv]({path.stem}.csv).",
        "",
    ]
    path.write_text(wrapped(lines))


def main(
    seeds: PositiveInt = 3, epochs: PositiveInt = 30, output: Path = Path("docs/results/target_sparsity.md")
) -> None:
    """Train the grid, print each run, and write the page and a CSV file beside it.

    Args:
        seeds: How many trainings for each cell of the grid.
        epochs: Passes over the 1,118 training images.
        output: The page, in Markdown.
    """
    warnings.filterwarnings("ignore", ".*of the weights are zero at the end.*")  # the page says so
    quieten()
    torch.set_num_threads(1)  # more would only wait for each other: the layers are small
    data = load_data("digits", Path("data"), Path("runs"))
    rows = []
    for seed in range(seeds):
        for optimizer in OPTIMIZERS:
            for schedule in SCHEDULES:
                for target in TARGETS:
                    rows.append(row := train(optimizer, schedule, target, seed, epochs, data))
                    print(*row.values(), flush=True)
        runs = pd.DataFrame(rows)
        output.parent.mkdir(parents=True, exist_ok=True)
        runs.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
        write_page(runs, epochs, output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
