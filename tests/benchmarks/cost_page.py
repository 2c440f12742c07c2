"""Run all benchmarks, write their tables into docs/cost.md and their ratios into ratios.json: `make benchmarks`.

    python tests/benchmarks/cost_page.py
    python tests/benchmarks/cost_page.py --quick true

The page marks the place of each benchmark with comments; the text between them is replaced, and nothing else. Before
the ratios are replaced they are compared with the new ones, and what got slower by more than the margin is printed. On
a machine that does other work at the same time ratios move by more than the margin. A quick run writes nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent))
import budget
import cost
import operations
import scaling
import traffic
import trainings
from timing import Benchmark, machine

ROOT = Path(__file__).parents[2]
PAGE, RATIOS = ROOT / "docs" / "cost.md", Path(__file__).parent / "ratios.json"
MARGIN = 0.2
"""The fraction by which a ratio may differ between two runs of the same code on a quiet machine."""


def benchmarks(device: torch.device, quick: bool) -> dict[str, Callable[[], Benchmark]]:
    """All benchmarks by the name of their script; quick ones show that they run, and little more."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    if quick:
        return {
            "budget": lambda: budget.benchmark(device, 5),
            "trainings": lambda: trainings.benchmark(accelerator, "perceptron", 10),
            "traffic": lambda: traffic.benchmark(100),
            "operations": lambda: operations.benchmark(4, 3),
            "scaling": lambda: scaling.benchmark((10**4, 10**5), (10, 100), device, 3),
            "cost": lambda: cost.benchmark(["ResNet-18"], ("l1",), device, 2, "default"),
        }
    weights, tensors = (10**4, 10**5, 10**6, 10**7, 10**8), (10, 100, 1000, 10_000)
    figure = ROOT / "docs" / "images" / "scaling.png"
    return {
        "budget": lambda: budget.benchmark(device),
        "trainings": lambda: trainings.benchmark(accelerator),
        "traffic": traffic.benchmark,
        "operations": operations.benchmark,
        "scaling": lambda: scaling.benchmark(weights, tensors, device, 9, figure),
        "cost": lambda: cost.benchmark(["ResNet-18", "transformer"], ("l1", "l2"), device, 7),
    }


def filled(page: str, script: str, text: str) -> str:
    """The page with this text in the place of what the benchmark printed last time."""
    begin, end = f"<!-- printed by tests/benchmarks/{script}.py -->", "<!-- end of what it printed -->"
    before, rest = page.split(begin, maxsplit=1)
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end, maxsplit=1)[1]}"


def slower(before: Mapping[str, float], now: Mapping[str, float], margin: float = MARGIN) -> list[str]:
    """A line for each ratio that grew by more than the margin, the worst first."""
    grown = {name: now[name] / before[name] - 1 for name in now.keys() & before.keys()}
    worst = sorted((name for name in grown if grown[name] > margin), key=lambda name: -grown[name])
    return [f"{name}: {before[name]:.2f} -> {now[name]:.2f} (+{grown[name]:.0%})" for name in worst]


def main(quick: bool = False, device: str = "cpu") -> None:
    """Measure, compare with the ratios of the last time, and unless this is a quick run write page and ratios.

    Args:
        quick: Whether to measure a little of everything and write nothing.
        device: Where, such as cpu or cuda. Only what is measured on a CPU is written.
    """
    where = torch.device(device)
    page, ratios = PAGE.read_text(encoding="utf-8"), dict[str, float]()
    for script, run in benchmarks(where, quick).items():
        start = time.perf_counter()
        text, measured = run()
        ratios |= measured
        page = filled(page, script, text)
        print(f"{text}\n\n({script}.py took {time.perf_counter() - start:.0f} s)\n", flush=True)
    known = json.loads(RATIOS.read_text(encoding="utf-8")) if RATIOS.exists() else {"machine": None, "ratios": {}}
    lines = slower(known["ratios"], ratios)
    print(f"{len(lines)} of {len(ratios)} ratios grew by more than {MARGIN:.0%} since the last time:", *lines, sep="\n")
    if known["machine"] not in (None, machine(where)):
        print(f"The last time was on a {known['machine']}, so that the ratios need not be alike.")
    if not quick and where.type == "cpu":
        PAGE.write_text(page, encoding="utf-8")
        content = {"machine": machine(where), "torch": torch.__version__, "ratios": ratios}
        RATIOS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main)
