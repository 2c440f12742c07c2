"""What a step of the regularizer costs, against a step of SGD, against the loss term, and against the memory's limit.

    python tests/benchmarks/cost.py --parameters ResNet-18 --json cost.json

Every number is a ratio within one run. SGD is ``torch.optim.SGD(momentum=0.9, foreach=True)`` over all parameters; the
loss term is the penalty added to a loss, forward and backward; the limit is one read of gradient and weight and one
write of the gradient, measured as ``torch.add(g, w, out=g)`` over all of them in one piece. Extra memory is the most
that torch holds during a step beyond parameters, gradients and momentum: on a CPU by torch's own tracker of tensors, on
a GPU by its allocator.
"""

from __future__ import annotations

import itertools
import json
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
from parameter_sets import PARAMETER_SETS, make_parameters
from timing import machine, median_times

from lightning_gcsr import CoherentRegularizer, Gate, Schedule

SCOPES = ("model", "parameter", "element")
STRENGTH = 1e-6  # so that after hundreds of steps the weights are still weights


def settings() -> Iterator[dict[str, Any]]:
    """Every measure, scope and update, and what the callback does by default."""
    for update in ("gradient", "proximal"):
        yield {"gate": None, "update": update}
        for coherence, scope in itertools.product(("direction", "agreement", "temporal"), SCOPES):
            yield {"gate": Gate(coherence, scope, averaging=0.0, tolerance=0.0), "update": update}
        for coherence, scope in itertools.product(("direction", "agreement"), SCOPES):
            yield {"gate": Gate(coherence, scope, averaging=0.98, tolerance=0.0), "update": update}
    yield {"gate": Gate(), "update": "dual_averaging"}
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


def regularized_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, report: bool, **setting: Any
) -> Callable[[], None]:
    """What the regularizer does around an optimizer's step."""
    regularizer = CoherentRegularizer(module, strength=STRENGTH, schedule=Schedule(warmup=0), **setting)

    def step() -> None:
        regularizer.before_step(optimizer, report=report)
        regularizer.after_step(optimizer)

    return step


def loss_term(module: nn.Module, penalty: str) -> Callable[[], None]:
    """The usual practice: the penalty of the same weights in the loss."""
    names = CoherentRegularizer(module, strength=STRENGTH).parameters
    weights = [parameter for name, parameter in module.named_parameters() if name in names]

    def step() -> None:
        if penalty == "l1":
            term = sum(weight.abs().sum() for weight in weights)
        else:
            term = sum(weight.square().sum() for weight in weights) / 2
        (STRENGTH * term).backward()

    return step


def extra_megabytes(module: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> float:
    """The most that a step holds beyond the parameters, their gradients and what the optimizer keeps."""
    device = next(module.parameters()).device
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


def measure(parameters: str, penalty: str, device: torch.device, repeats: int, only: Optional[str]) -> pd.DataFrame:
    """One row for each setting."""
    module = make_parameters(PARAMETER_SETS[parameters], device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    count = sum(parameter.numel() for parameter in module.parameters())
    flat = torch.randn(count, device=device), torch.randn(count, device=device)
    optimizer.step()  # which makes the momentum
    rows = []
    for setting in settings():
        if only is not None and only not in title(setting):
            continue
        ours = regularized_step(module, optimizer, False, penalty=penalty, **setting)
        times = median_times(
            {
                "SGD": optimizer.step,
                "loss term": loss_term(module, penalty),
                "limit": lambda: torch.add(*flat, out=flat[0]),
                "ours": ours,
                "reported": regularized_step(module, optimizer, True, penalty=penalty, **setting),
            },
            repeats,
            device,
        )
        rows.append(
            {
                "parameters": parameters,
                "penalty": penalty,
                "setting": title(setting),
                "of an SGD step": times["ours"] / times["SGD"],
                "of the loss term": times["ours"] / times["loss term"],
                "of the limit": times["ours"] / times["limit"],
                "of an SGD step, reported": times["reported"] / times["SGD"],
                "in extra MB": extra_megabytes(module, optimizer, ours),
                "SGD in ms": 1e3 * times["SGD"],
            }
        )
        print(f"{penalty}, {title(setting)}: {rows[-1]['of an SGD step']:.2f}", file=sys.stderr, flush=True)
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


def main(
    parameters: Optional[list[str]] = None,
    penalties: tuple[Literal["l1", "l2"], ...] = ("l1", "l2"),
    device: str = "cpu",
    repeats: int = 15,
    only: Optional[str] = None,
    json_file: Optional[Path] = None,
    show: Optional[list[Path]] = None,
) -> None:
    """Print the tables.

    Args:
        parameters: Of which networks: ResNet-18, VGG-16, transformer; all of them by default.
        penalties: Which penalties.
        device: Where, such as cpu or cuda.
        repeats: The number of rounds.
        only: Only settings with this in their title.
        json_file: Where to write the numbers as well.
        show: Files written earlier, to print the tables of these and measure nothing.
    """
    if show is not None:
        print(tables(pd.concat([pd.DataFrame(json.loads(path.read_text())["rows"]) for path in show])))
        return
    where = torch.device(device)
    names = parameters or list(PARAMETER_SETS)
    frame = pd.concat([measure(name, penalty, where, repeats, only) for name in names for penalty in penalties])
    print(f"On a {machine(where)}, torch {torch.__version__}, medians of {repeats} rounds.\n\n{tables(frame)}")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(where), "rows": frame.to_dict("records")}, indent=1))


if __name__ == "__main__":
    auto_cli(main)
