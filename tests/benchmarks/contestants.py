"""What is timed against each other: an optimizer's step, the regularizer's, and the penalty in the loss.

Each has parameters of its own. On shared ones, the regularizer would take another's step for a change of the weights by
hand, and would look at all of them again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from parameter_sets import make_parameters

from lightning_gcsr import CoherentRegularizer, Schedule

__all__ = ["STRENGTH", "loss_term", "optimizer_step", "regularized_step"]

STRENGTH = 1e-6  # so that after hundreds of steps the weights are still weights


def optimizer_of(module: nn.Module, kind: str) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; both with multi-tensor operations."""
    if kind == "SGD":
        return torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    return torch.optim.AdamW(module.parameters(), lr=1e-6, foreach=True)


def optimizer_step(make: Callable[[], nn.Module], device: torch.device, kind: str = "SGD") -> Callable[[], object]:
    """One step over all parameters."""
    step: Callable[[], object] = optimizer_of(make_parameters(make, device), kind).step
    return step


def regularized_step(
    make: Callable[[], nn.Module], device: torch.device, *, kind: str = "SGD", report: bool = False, **setting: Any
) -> Callable[[], None]:
    """What the regularizer does around an optimizer's step; the optimizer itself does not step."""
    module = make_parameters(make, device)
    optimizer = optimizer_of(module, kind)
    regularizer = CoherentRegularizer(module, strength=STRENGTH, schedule=Schedule(warmup=0), **setting)

    def step() -> None:
        regularizer.before_step(optimizer, report=report)
        regularizer.after_step(optimizer)

    return step


def loss_term(make: Callable[[], nn.Module], device: torch.device, penalty: str) -> Callable[[], None]:
    """The usual practice: the penalty of the same weights in the loss, forward and backward."""
    module = make_parameters(make, device)
    weights = list(CoherentRegularizer(module, strength=STRENGTH).parameters.values())

    def step() -> None:
        if penalty == "l1":
            term = sum(weight.abs().sum() for weight in weights)
        else:
            term = sum(weight.square().sum() for weight in weights) / 2
        (STRENGTH * term).backward()

    return step
