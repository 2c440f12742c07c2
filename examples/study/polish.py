"""What `KeepZeros` gives back: a penalty throughout, and a polish on top, on the networks of the study.

Three trainings at each strength: so many epochs with the penalty; half as many more, without penalty but with zeros
kept; and as many in all with the penalty throughout. The learning rate falls to zero at the end of each.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from pathlib import Path

import torch
from data import load_data
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from methods import Method
from problems import Problem
from rich import box
from rich.console import Console
from rich.table import Table
from training import Outcome, train

COMPARED = {
    "digits, deep MLP": (("digits", "deep_mlp", 30, 0.02, None), (0.03, 0.1)),
    "Fashion-MNIST, LeNet-300-100": (("fashion_mnist", "lenet_300_100", 12, 0.05, 5000), (0.003, 0.01)),
}


def problem(data: str, network: str, epochs: int, lr: float, train_images: int | None, longer: bool) -> Problem:
    """The training, half as long again if asked for."""
    epochs = epochs * 3 // 2 if longer else epochs
    return Problem(data=data, network=network, epochs=epochs, lr=lr, train_images=train_images, batch_size=64)


def method(strength: float, polish: bool, longer: bool) -> Method:
    """The callback's defaults; the strength rises over as many epochs in each."""
    return Method(
        method="coherent",
        penalty="l1",
        strength=strength,
        coherence="agreement",
        scope="element",
        averaging=0.98,
        tolerance=0.1,
        update="proximal",
        warmup=0.2 if longer else 0.3,
        polish=1 / 3 if polish else 0.0,
    )


def figures(outcomes: list[Outcome]) -> str:
    """Mean test accuracy with its standard error, and mean compression."""
    accuracies = [100 * outcome.test_accuracy for outcome in outcomes]
    error = statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else float("nan")
    compression = statistics.mean(outcome.weights / max(1, outcome.nonzeros) for outcome in outcomes)
    return f"{statistics.mean(accuracies):.1f} ± {error:.1f} ({compression:.3g}×)"


def main(seeds: PositiveInt = 3, data_root: Path = Path("data"), output: Path = Path("runs/polish.md")) -> None:
    """Train, compare, and write the table.

    Args:
        seeds: How many trainings for each mean.
        data_root: Where image sets are that are not bundled.
        output: The table, in Markdown.
    """
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    table = Table(box=box.MARKDOWN)
    for column in ("", "strength", "penalty", "penalty, then a polish half as long", "penalty all the time, as long"):
        table.add_column(column, justify="right" if column else "left")
    for title, (settings, strengths) in COMPARED.items():
        images = load_data(settings[0], data_root, output.parent, settings[-1])
        for strength in strengths:
            cells = []
            for polish, longer in ((False, False), (True, True), (False, True)):
                setting = problem(*settings, longer), method(strength, polish, longer)
                cells.append(figures([train(*setting, seed, images) for seed in range(seeds)]))
            table.add_row(title, f"{strength:g}", *cells)
            print(title, f"strength {strength:g}:", "; ".join(cells), flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        Console(file=file, width=160).print(table)
    print(f"Table: {output}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
