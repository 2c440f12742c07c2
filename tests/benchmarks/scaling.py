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
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from contestants import optimizer_step, regularized_step
from cost import title
from parameter_sets import evenly
from timing import Benchmark, machine, time_in_turns

from lightning_gcsr import CoherentRegularizer, Gate

SETTINGS = (
    {},
    {"gate": Gate(averaging=0.0, tolerance=0.0), "update": "gradient"},
    {"gate": Gate("direction", scope="model"), "update": "gradient"},
)


def measure(weights: int, tensors: int, device: torch.device, rounds: int) -> list[dict[str, object]]:
    """One row for SGD and each setting."""

    def make() -> nn.Module:
        return evenly(weights, tensors)

    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in make().parameters())
    contestants = {"SGD": optimizer_step(make, device)}
    contestants |= {title(setting): regularized_step(make, device, **setting) for setting in SETTINGS}
    times = time_in_turns(contestants, rounds, device)
    return [
        {
            "weights": count,
            "tensors": tensors,
            "step": name,
            "ns for each weight": 1e9 * times.median(name) / count,
            "microseconds for each tensor": 1e6 * times.median(name) / tensors,
            "of an SGD step": times.ratio(name, "SGD"),
        }
        for name in contestants
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
    for axis in (left, right):
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=110)


def benchmark(
    weights: tuple[int, ...], tensors: tuple[int, ...], device: torch.device, rounds: int, figure: Optional[Path] = None
) -> Benchmark:
    """The table, and the ratios to SGD's step; the figure, where it is wanted."""
    by_weights = [row for count in weights for row in measure(count, 16, device, rounds)]
    by_tensors = [row for count in tensors for row in measure(1024 * count, count, device, rounds)]
    frame = pd.DataFrame(by_weights + by_tensors)
    if figure is not None:
        draw(frame, frame.iloc[: len(by_weights)], figure)
    text = [
        f"On a {machine(device)}, torch {torch.__version__}, medians of {rounds} rounds.",
        frame.to_markdown(index=False, floatfmt=".3g", intfmt=","),
        *(f"Setting up with {n:,} parameters takes {setup_milliseconds(n, 5):.0f} ms." for n in (1000, 10_000)),
    ]
    ours = frame[frame["step"] != "SGD"]
    ratios = {
        f"scaling: {row.weights:,} weights, {row.tensors:,} tensors, {row.step}": row.ratio
        for row in ours.rename(columns={"of an SGD step": "ratio"}).itertuples()
    }
    return Benchmark("\n\n".join(text), ratios)


def main(
    weights: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 10**8),
    tensors: tuple[int, ...] = (10, 100, 1000, 10_000),
    device: str = "cpu",
    rounds: int = 9,
    figure: Optional[Path] = None,
) -> None:
    """Print the table, and draw the figure where it is wanted.

    Args:
        weights: Numbers of weights, in 16 tensors.
        tensors: Numbers of tensors, of 1,024 weights each.
        device: Where, such as cpu or cuda.
        rounds: The number of rounds.
        figure: Where to draw.
    """
    print(benchmark(weights, tensors, torch.device(device), rounds, figure).text)


if __name__ == "__main__":
    auto_cli(main)
