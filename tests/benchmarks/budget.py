"""What a step costs in the default setting and beside it, for the networks that the budget is stated for.

    python tests/benchmarks/budget.py

Every number is a ratio within one run: of the regularizer's step, without a report, to one step of the optimizer over
all parameters.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent))
from contestants import optimizer_step, regularized_step
from parameter_sets import BUDGET_SETS
from timing import Benchmark, machine, time_in_turns

__all__ = ["benchmark"]

COLUMNS: dict[str, dict[str, Any]] = {
    "default, dual averaging": {},
    "proximal": {"update": "proximal"},
    "gradient": {"update": "gradient"},
    "default under AdamW": {"kind": "AdamW"},
    "proximal under AdamW": {"kind": "AdamW", "update": "proximal"},
}
"""What is measured, under SGD unless it says otherwise."""


def measure(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """One row."""
    make = BUDGET_SETS[name]
    contestants = {kind: optimizer_step(make, device, kind) for kind in ("SGD", "AdamW")}
    contestants |= {column: regularized_step(make, device, **setting) for column, setting in COLUMNS.items()}
    times = time_in_turns(contestants, rounds, device)
    row: dict[str, Any] = {"network": name, "SGD in ms": 1e3 * times.median("SGD")}
    row |= {column: times.ratio(column, setting.get("kind", "SGD")) for column, setting in COLUMNS.items()}
    return row | {"dual averaging over proximal": times.ratio("default, dual averaging", "proximal")}


def benchmark(device: torch.device, rounds: int = 60) -> Benchmark:
    """The table and all its ratios. Small networks, whose steps are short, get ten times as many rounds."""
    small = ("perceptron",)
    rows = [measure(name, device, 10 * rounds if name.startswith(small) else rounds) for name in BUDGET_SETS]
    frame = pd.DataFrame(rows)
    ratios = {
        f"budget: {row['network']}, {column}": ratio
        for row in rows
        for column, ratio in row.items()
        if column not in ("network", "SGD in ms")
    }
    text = f"On a {machine(device)}, torch {torch.__version__}, medians of {rounds} rounds or more.\n\n"
    return Benchmark(text + frame.to_markdown(index=False, floatfmt=".2f"), ratios)


def main(device: str = "cpu", rounds: int = 60) -> None:
    """Print the table.

    Args:
        device: Where, such as cpu or cuda.
        rounds: The number of rounds.
    """
    print(benchmark(torch.device(device), rounds).text)


if __name__ == "__main__":
    auto_cli(main)
