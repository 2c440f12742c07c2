"""Optimizers: which can be regularized, which parameters they step, and how far a proximal step goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["check_optimizer", "is_sgd", "proximal_step_size", "stepped_parameters"]


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise a ``ValueError`` if a step of this optimizer cannot be regularized.

    ``LBFGS`` evaluates the loss several times within a step and would search along a line on which the penalty is
    missing; ``maximize=True`` would turn the penalty around.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS is not supported: within a step it evaluates the loss, in which there is no penalty, repeatedly."
            " Use SGD, Adam or another first-order optimizer."
        )
    if any(group.get("maximize", False) for group in optimizer.param_groups):
        raise ValueError(
            "An optimizer with maximize=True is not supported: it would maximize the penalty."
            " Negate the loss and use maximize=False."
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


def is_sgd(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of this group are stepped by SGD, that is, by gradients of their own scale.

    RMSprop has momentum too, but of rescaled gradients; dampening tells SGD from it.

    Example:
        >>> is_sgd(torch.optim.SGD([torch.ones(1)], lr=0.1).param_groups[0])
        True
        >>> is_sgd(torch.optim.AdamW([torch.ones(1)], lr=0.1).param_groups[0])
        False
    """
    return "dampening" in group


def proximal_step_size(group: Mapping[str, Any], strength: float) -> float | Tensor:
    """lr·λ; under SGD with momentum times (1 − dampening)/(1 − momentum). A tensor where ``lr`` is one.

    This factor is what a steady injected gradient moves a weight by, so λ means the same in both updates.

    Example:
        >>> proximal_step_size({"lr": 0.5, "momentum": 0.75, "dampening": 0.0}, strength=0.01)
        0.02
    """
    step: float | Tensor = group["lr"] * strength
    if is_sgd(group) and group.get("momentum", 0):
        step = step * ((1 - group["dampening"]) / (1 - group["momentum"]))
    return step
