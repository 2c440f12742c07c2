"""How the cost of a step grows with the number of weights and of tensors, and how long it takes to set up.

    python tests/benchmarks/scaling.py --figure docs/images/scaling.png

Cost linear in the number of weights is a horizontal line in the left picture: nanoseconds for each weight.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent))
from cost import regularized_step, title
from parameter_sets import evenly, make_parameters
from timing import machine, median_times

from lightning_gcsr import CoherentRegularizer, Gate

SETTINGS = (
    {},
    {"gate": Gate(averaging=0.0, tolerance=0.0), "update": "gradient"},
    {"gate": Gate("direction", scope="model"), "update": "gradient"},
)


def measure(weights: int, tensors: int, device: torch.device, repeats: int) -> list[dict[str, object]]:
    """One row for SGD and each setting."""
    module = make_parameters(lambda: evenly(weights, tensors), device)
    count = sum(parameter.numel() for parameter in module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    optimizer.step()
    contestants = {"SGD": optimizer.step}
    contestants |= {title(setting): regularized_step(module, optimizer, False, **setting) for setting in SETTINGS}
    times = median_times(contestants, repeats, device)
    return [
        {"weights": count, "tensors": tensors, "step": name, "ns for each weight": 1e9 * seconds / count}
        | {"microseconds for each tensor": 1e6 * seconds / tensors, "of an SGD step": seconds / times["SGD"]}
        for name, seconds in times.items()
    ]


def setup_milliseconds(tensors: int, repeats: int) -> float:
    """How long it takes to select from so many parameters by name, strengths by regular expressions included."""
    module = evenly(4 * tensors, tensors)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        CoherentRegularizer(module, strength={r"^1.*weight": 0.1, ".": 0.2}, exclude=[r"^2.*weight"])
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2]


def draw(frame: pd.DataFrame, by_weights: pd.DataFrame, path: Path) -> None:
    """The two pictures side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name, rows in by_weights.groupby("step", sort=False):
        left.loglog(rows["weights"], rows["ns for each weight"], marker="o", label=name)
    left.set(xlabel="weights, in 16 tensors", ylabel="nanoseconds for each weight")
    left.legend()
    for name, rows in frame.drop(by_weights.index).groupby("step", sort=False):
        right.loglog(rows["tensors"], rows["microseconds for each tensor"], marker="o", label=name)
    right.set(xlabel="tensors of 1,024 weights", ylabel="microseconds for each tensor")
    figure.savefig(path, dpi=110)


def main(
    weights: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 10**8),
    tensors: tuple[int, ...] = (10, 100, 1000, 10_000),
    device: str = "cpu",
    repeats: int = 9,
    figure: Optional[Path] = None,
) -> None:
    """Print the table, and draw the figure where it is wanted.

    Args:
        weights: Numbers of weights, in 16 tensors.
        tensors: Numbers of tensors, of 1,024 weights each.
        device: Where, such as cpu or cuda.
        repeats: The number of rounds.
        figure: Where to draw.
    """
    where = torch.device(device)
    by_weights = [row for count in weights for row in measure(count, 16, where, repeats)]
    by_tensors = [row for count in tensors for row in measure(1024 * count, count, where, repeats)]
    frame = pd.DataFrame(by_weights + by_tensors)
    print(f"On a {machine(where)}, torch {torch.__version__}, medians of {repeats} rounds.\n")
    print(frame.to_markdown(index=False, floatfmt=".3g", intfmt=","))
    for count in (1000, 10_000):
        print(f"\nSetting up with {count:,} parameters takes {setup_milliseconds(count, repeats):.1f} ms.")
    if figure is not None:
        draw(frame, frame.iloc[: len(by_weights)], figure)


if __name__ == "__main__":
    auto_cli(main)
