"""What a step of the regularizer costs in every setting: against SGD, the loss term, and the limit of the memory.

    python tests/benchmarks/cost.py --parameters '[VGG-16]'

Every number is a ratio within one run. SGD is ``torch.optim.SGD(momentum=0.9, foreach=True)`` over all parameters; the
loss term is the penalty added to a loss, forward and backward; the limit is one read of gradient and weight and one
write of the gradient, measured as ``torch.add(g, w, out=g)`` over all of them in one piece. Extra memory is the most
that torch holds during a step beyond parameters, gradients and momentum: on a CPU by torch's own tracker of tensors, on
a GPU by its allocator.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Optional

import pandas as pd
import torch
from jsonargparse import auto_cli
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).parent))
from contestants import STRENGTH, loss_term, optimizer_step, regularized_step
from parameter_sets import PARAMETER_SETS, make_parameters
from timing import Benchmark, machine, time_in_turns

from lightning_gcsr import CoherentRegularizer, Gate, Schedule

SCOPES = ("model", "parameter", "element")


def settings() -> Iterator[dict[str, Any]]:
    """Every measure, scope and update, and what the callback does by default."""
    for update in ("gradient", "proximal"):
        yield {"gate": None, "update": update}
        for coherence, scope in itertools.product(("direction", "agreement", "temporal"), SCOPES):
            yield {"gate": Gate(coherence, scope, averaging=0.0, tolerance=0.0), "update": update}
        for coherence, scope in itertools.product(("direction", "agreement"), SCOPES):
            yield {"gate": Gate(coherence, scope, averaging=0.98, tolerance=0.0), "update": update}
    yield {}


def title(setting: dict[str, Any]) -> str:
    """A setting in one line."""
    if not setting:
        return "the callback's defaults"
    gate, update = setting["gate"], setting["update"].replace("_", " ")
    if gate is None:
        return f"no gate, {update}"
    details = [f"{gate.coherence}, {gate.scope}, {update}", *(["averaged"] if gate.averaging else [])]
    return ", ".join([*details, *(["tolerance"] if gate.tolerance else [])])


def extra_megabytes(make: Callable[[], nn.Module], device: torch.device, **setting: Any) -> float:
    """The most that a step holds beyond the parameters, their gradients and what the optimizer keeps."""
    module = make_parameters(make, device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    regularizer = CoherentRegularizer(module, strength=STRENGTH, schedule=Schedule(warmup=0), **setting)

    def step() -> None:
        regularizer.before_step(optimizer, report=False)
        regularizer.after_step(optimizer)

    step()  # what is kept from step to step is there from now on
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    tracker = MemTracker()
    tracker.track_external(module, optimizer)
    with tracker:
        step()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    known = {"Parameter", "Buffer", "Gradient", "Optstate", "Total"}
    return sum(size for kind, size in peak.items() if getattr(kind, "value", kind) not in known) / 1e6


def measure(parameters: str, penalty: str, device: torch.device, rounds: int, only: Optional[str]) -> pd.DataFrame:
    """One row for each setting."""
    make = PARAMETER_SETS[parameters]
    count = sum(parameter.numel() for parameter in make_parameters(make, device).parameters())
    flat = torch.randn(count, device=device), torch.randn(count, device=device)
    others = {
        "SGD": optimizer_step(make, device),
        "loss term": loss_term(make, device, penalty),
        "limit": lambda: torch.add(*flat, out=flat[0]),
    }
    rows = []
    for setting in settings():
        if only is not None and only not in title(setting):
            continue
        ours = regularized_step(make, device, penalty=penalty, **setting)
        reported = regularized_step(make, device, report=True, penalty=penalty, **setting)
        times = time_in_turns(others | {"ours": ours, "reported": reported}, rounds, device)
        rows.append(
            {
                "parameters": parameters,
                "penalty": penalty,
                "setting": title(setting),
                "of an SGD step": times.ratio("ours", "SGD"),
                "of the loss term": times.ratio("ours", "loss term"),
                "of the limit": times.ratio("ours", "limit"),
                "of an SGD step, reported": times.ratio("reported", "SGD"),
                "in extra MB": extra_megabytes(make, device, penalty=penalty, **setting),
            }
        )
    return pd.DataFrame(rows)


HEADINGS = {
    "of an SGD step": "Cost as a multiple of an SGD step",
    "of an SGD step, reported": "The same with the report",
    "of the loss term": "As a multiple of the loss term",
    "of the limit": "As a multiple of the memory's limit",
    "in extra MB": "Extra memory in MB",
}
"""What each column is called on the page on the cost."""


def tables(frame: pd.DataFrame) -> str:
    """One table for each kind of ratio, with a column for each network and penalty."""
    frame = frame.assign(of=frame["parameters"] + ", " + frame["penalty"].str.upper())
    text = []
    for column, heading in HEADINGS.items():
        wide = frame.pivot_table(column, "setting", "of", sort=False)
        text.append(f"### {heading}\n\n{wide.to_markdown(floatfmt='.2f')}\n")
    return "\n".join(text)


def benchmark(
    parameters: list[str], penalties: tuple[str, ...], device: torch.device, rounds: int, only: Optional[str] = None
) -> Benchmark:
    """The tables, and for each setting the ratio to SGD's step."""
    frame = pd.concat([measure(name, penalty, device, rounds, only) for name in parameters for penalty in penalties])
    text = f"On a {machine(device)}, torch {torch.__version__}, medians of {rounds} rounds.\n\n{tables(frame)}"
    names = "cost: " + frame["parameters"] + ", " + frame["penalty"] + ", " + frame["setting"]
    return Benchmark(text, dict(zip(names, frame["of an SGD step"], strict=True)))


def main(
    parameters: Optional[list[str]] = None,
    penalties: tuple[Literal["l1", "l2"], ...] = ("l1", "l2"),
    device: str = "cpu",
    rounds: int = 9,
    only: Optional[str] = None,
) -> None:
    """Print the tables.

    Args:
        parameters: Of which networks: ResNet-18, VGG-16, transformer; all of them by default.
        penalties: Which penalties.
        device: Where, such as cpu or cuda.
        rounds: The number of rounds.
        only: Only settings with this in their title.
    """
    print(benchmark(parameters or list(PARAMETER_SETS), penalties, torch.device(device), rounds, only).text)


if __name__ == "__main__":
    auto_cli(main)
