"""Optimizers: which can be regularized, which parameters they step, and how far a gradient moves a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "accumulates_squares",
    "check_optimizer",
    "learning_rate",
    "momentum_factor",
    "rescales_gradients",
    "square_decay",
    "stepped_parameters",
]


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise a ``ValueError`` if a step of this optimizer cannot be regularized.

    ``LBFGS`` evaluates the loss several times within a step and would search along a line on which the penalty is
    missing; ``maximize=True`` would turn the penalty around; a schedule-free optimizer evaluates other weights than it
    trains; and where ``lr`` is ``None``, nothing says how far a step goes.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS is not supported: within a step it evaluates the loss, in which there is no penalty, repeatedly."
            " Use SGD, Adam or another first-order optimizer."
        )
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if group.get("maximize", False):
            raise ValueError(
                "An optimizer with maximize=True is not supported: it would maximize the penalty."
                " Negate the loss and use maximize=False."
            )
        if "train_mode" in group:
            raise ValueError(
                f"{name} is not supported: it evaluates an average of the weights that it trains, in which weights"
                " that became zero are not zero. Use the optimizer without its schedule-free form."
            )
        if group.get("lr", 0.0) is None:
            raise ValueError(
                f"{name} with lr=None is not supported: nothing says how far a step goes. Give it a learning rate"
                " (Adafactor: relative_step=False and lr=...)."
            )


def stepped_parameters(
    optimizer: Optimizer, names: Mapping[int, str]
) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    """Name, parameter and parameter group of each regularized parameter that the optimizer steps, in its order.

    Args:
        optimizer: The optimizer.
        names: The names of the regularized parameters by their ``id``.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                yield names[id(parameter)], parameter, group


def rescales_gradients(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of this group are stepped by rescaled gradients, as by Adam, and not as by SGD.

    RMSprop has momentum too, but of rescaled gradients; dampening tells SGD from it.

    Example:
        >>> rescales_gradients(torch.optim.SGD([torch.ones(1)], lr=0.1).param_groups[0])
        False
        >>> rescales_gradients(torch.optim.AdamW([torch.ones(1)], lr=0.1).param_groups[0])
        True
    """
    return "dampening" not in group and "t0" not in group  # ASGD has no momentum, and a start of its averages


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate at work: ``lr``, times the factor d that Prodigy and D-Adaptation multiply it by."""
    rate: float | Tensor = group["lr"]
    return rate * group["d"] if "d" in group and "growth_rate" in group else rate


def momentum_factor(group: Mapping[str, Any]) -> float:
    """How far a steady gradient moves a weight, over lr times that gradient: (1 − dampening)/(1 − momentum).

    It is 1 under Adam and its kin, whose momentum is an average.

    Example:
        >>> momentum_factor({"lr": 0.5, "momentum": 0.75, "dampening": 0.0})
        4.0
    """
    momentum = group.get("momentum", 0)
    if not momentum or ("dampening" not in group and "alpha" not in group):  # RMSprop has `alpha`
        return 1.0
    return float((1 - group.get("dampening", 0.0)) / (1 - momentum))


def square_decay(group: Mapping[str, Any]) -> float:
    """The decay with which an optimizer that rescales gradients averages their squares: β₂ of Adam, α of RMSprop.

    Example:
        >>> square_decay({"betas": (0.9, 0.95)}), square_decay({})
        (0.95, 0.999)
    """
    betas = group.get("betas")
    if betas is not None and len(betas) > 1 and isinstance(betas[1], float):
        return float(betas[1])
    return float(group.get("alpha", 0.999)) if "centered" in group else 0.999


def accumulates_squares(optimizer_state: Mapping[str, Any]) -> bool:
    """Whether the optimizer divides by the root of a sum of all squared gradients, as Adagrad does."""
    return "sum" in optimizer_state
