"""Ask for a sparsity instead of a strength: 80, 90, 95 and 98 % on handwritten digits."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from digits import DigitsClassifier, digits
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization


@dataclass
class Run:
    """One training: the sparsity asked for, and the results."""

    target: float
    seed: int
    accuracy: float = 0.0
    steps: list[int] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)


class History(Callback):
    """Records sparsity and strength at the end of each epoch."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.steps.append(trainer.global_step)
        self.run.sparsity.append(float(trainer.callback_metrics["sparsity/model"]))
        self.run.strength.append(float(trainer.callback_metrics["gcsr/strength"]))
        self.run.accuracy = float(trainer.callback_metrics["test_accuracy"])


def train(target: float, seed: int, epochs: int) -> Run:
    """Train the network of ``digits.py`` towards the target."""
    run = Run(target, seed)
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",  # a network this small is faster there
        max_epochs=epochs,
        callbacks=[
            GradientCoherentRegularization("l1", target_sparsity=target),
            CompressionMonitor(verbose=False),
            History(run),
        ],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(DigitsClassifier(max_epochs=epochs), *digits(seed))
    return run


def draw(runs: list[Run], path: Path) -> None:
    """Sparsity and strength over the training, a line for each run, a color for each target."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {target: f"C{i}" for i, target in enumerate(dict.fromkeys(run.target for run in runs))}
    for run in runs:
        label = f"{100 * run.target:g} % asked for" if run.seed == 0 else None
        left.plot(run.steps, [100 * sparsity for sparsity in run.sparsity], color=colors[run.target], label=label)
        right.plot(run.steps, run.strength, color=colors[run.target], label=label)
    for target, color in colors.items():
        left.axhline(100 * target, color=color, linewidth=0.8, linestyle=":")
    left.set(xlabel="optimizer step", ylabel="sparsity in %", ylim=(0, 102))
    right.set(xlabel="optimizer step", ylabel="strength", yscale="log")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(
    targets: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98),
    seeds: PositiveInt = 3,
    epochs: PositiveInt = 40,
    output: Path = Path("runs/target_sparsity"),
) -> None:
    """Train towards each target from several seeds, and print the sparsity that each training ends with.

    Args:
        targets: The sparsities to ask for, each in (0, 1).
        seeds: How many trainings for each.
        epochs: Passes over the 1,300 training images.
        output: Where the figure and the table go.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # more would only wait for each other: the layers are small
    table = Table(box=box.MARKDOWN)
    for column in ("asked for", *(f"seed {seed}" for seed in range(seeds)), "test accuracy", "compression"):
        table.add_column(column, justify="right")
    runs: list[Run] = []
    for target in targets:
        of_target = [train(target, seed, epochs) for seed in range(seeds)]
        runs += of_target
        accuracy = sum(run.accuracy for run in of_target) / seeds
        density = 1 - sum(run.sparsity[-1] for run in of_target) / seeds
        reached = [f"{100 * run.sparsity[-1]:.2f} %" for run in of_target]
        table.add_row(f"{100 * target:g} %", *reached, f"{100 * accuracy:.1f} %", f"{1 / density:.3g}×")
        print(f"{100 * target:g} % asked for: {', '.join(reached)}", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    draw(runs, output / "target_sparsity.png")
    with (output / "target_sparsity.md").open("w") as file:
        Console(file=file, width=120).print(table)
    print(f"Figure: {output / 'target_sparsity.png'}, table: {output / 'target_sparsity.md'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
