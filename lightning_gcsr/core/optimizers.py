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
    "smallest_weight_scale",
    "square_decay",
    "stepped_parameters",
]


def check_optimizer(optimizer: Optimizer, update: str = "gradient", has_target: bool = False) -> None:
    """Raise a ``ValueError`` if a step of this optimizer cannot be regularized.

    ``LBFGS`` evaluates the loss several times within a step and would search along a line on which the penalty is
    missing; ``maximize=True`` would turn the penalty around; a schedule-free optimizer evaluates other weights than it
    trains; and where ``lr`` is ``None``, nothing says how far a step goes. An update that moves the weights by a step
    of its own also needs a learning rate that says how far the optimizer moves them.

    Args:
        optimizer: The optimizer, of torch or of another package.
        update: ``"proximal"``, ``"dual_averaging"``, or ``"gradient"``, which changes gradients only.
        has_target: Whether a target sparsity decides how far a step goes, and not a strength.
    """
    if type(optimizer).__name__ == "AcceleratedOptimizer":  # it has all methods that the one within might have
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS) or name == "LBFGS":
        raise ValueError(
            "LBFGS is not supported: within a step it evaluates the loss, in which there is no penalty, repeatedly."
            " Use SGD, Adam or another first-order optimizer."
        )
    _check_weights_in_use(optimizer, name)
    for group in optimizer.param_groups:
        if group.get("maximize", False):
            raise ValueError(
                "An optimizer with maximize=True is not supported: it would maximize the penalty."
                " Negate the loss and use maximize=False."
            )
        if group.get("lr", 0.0) is None:
            raise ValueError(
                f"{name} with lr=None is not supported: nothing says how far a step goes. Give it a learning rate"
                " (Adafactor: relative_step=False and lr=...)."
            )
    if update != "gradient":
        _check_step(optimizer, name, update, has_target)


def _check_weights_in_use(optimizer: Optimizer, name: str) -> None:
    """Refuse optimizers that evaluate other weights than they train."""
    switches = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if switches or any("train_mode" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{name} is not supported: it evaluates an average of the weights that it trains, in which weights"
            " that became zero are not zero. Use the optimizer without its schedule-free form."
        )


def _check_step(optimizer: Optimizer, name: str, update: str, has_target: bool) -> None:
    """Refuse optimizers whose steps do not go with an update that moves the weights by a step of its own."""
    if update == "dual_averaging" and hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise ValueError(
            f"{name} with update='dual_averaging' is not supported: this optimizer remembers the weights within a step"
            " and writes them back. Use update='proximal'."
        )
    if name in ("Adadelta", "Rprop"):
        raise ValueError(
            f"{name} with update={update!r} is not supported: its learning rate does not say how far a step goes, and"
            " the length of a proximal step is taken from it. Use AdamW or SGD, or update='gradient'."
        )
    if any(group.get("relative_step", False) for group in optimizer.param_groups):
        raise ValueError(
            f"{name} with relative_step=True and update={update!r} is not supported: it chooses its learning rate"
            " itself, and the length of a proximal step is taken from `lr`. Use relative_step=False with a learning"
            " rate, or update='gradient'."
        )
    if not has_target and any({"trust_coefficient", "trust_coeff"} & group.keys() for group in optimizer.param_groups):
        raise ValueError(
            f"{name} with update={update!r} and a strength is not supported: a trust ratio of each layer says how far"
            " its step goes, and not the learning rate. Give target_sparsity in place of a strength, or"
            " update='gradient'."
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
    """The learning rate at work: ``lr``, times the factor d that Prodigy and D-Adaptation multiply it by.

    The d of torch's Adafactor is something else, the size at which updates are clipped.

    Example:
        >>> learning_rate({"lr": 1.0, "d": 1e-6}), learning_rate({"lr": 0.01, "d": 1.0, "beta2_decay": -0.8})
        (1e-06, 0.01)
    """
    rate: float | Tensor = group["lr"]
    return rate * group["d"] if "d" in group and "beta2_decay" not in group else rate


def smallest_weight_scale(group: Mapping[str, Any]) -> float | None:
    """Where steps are relative to the weights, as Adafactor's are, the least root mean square of them; else ``None``.

    Such an optimizer multiplies its learning rate by the root mean square of each tensor's weights, or by this number
    where that is larger.

    Example:
        >>> smallest_weight_scale(torch.optim.Adafactor([torch.ones(1)]).param_groups[0])
        0.001
        >>> smallest_weight_scale({"lr": 0.1, "betas": (0.9, 0.999)}) is None
        True
    """
    if "beta2_decay" not in group and not group.get("scale_parameter", False):
        return None
    return float(group["eps2"] if "eps2" in group else group["eps"][1])


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
