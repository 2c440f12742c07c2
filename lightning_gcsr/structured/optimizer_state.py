"""The state of an optimizer carried over to a smaller network, in which training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gcsr.structured.shrink import ShrinkReport

__all__ = ["carry_optimizer_state"]


@torch.no_grad()
def carry_optimizer_state(
    optimizer: torch.optim.Optimizer,
    new_optimizer: torch.optim.Optimizer,
    module: nn.Module,
    smaller: nn.Module,
    report: ShrinkReport,
) -> None:
    """Give a new optimizer the state of the old one, such as momentum, for the entries that are left.

    State that has the shape of its parameter is cut as the parameter was, and so is each dimension of factored state,
    such as Adafactor's, that has the size of the parameter's. All other state is copied. Everything goes to the device
    and the dtype of the new parameter, as in ``load_state_dict``, which loads it. A bias that was made for constants
    starts without state. Learning rates, groups and other settings are those of the new optimizer.

    Under a Lightning Trainer call it in ``on_train_start`` of the second ``fit``, where ``trainer.optimizers`` are the
    new optimizers.

    Args:
        optimizer: The optimizer of ``module``. It stays as it is.
        new_optimizer: An optimizer of the same class, made for the parameters of ``smaller``, which gets the state.
        module: The network that was shrunk.
        smaller: The network that :func:`~lightning_gcsr.shrink_units` made of it.
        report: What it reported.

    Raises:
        ValueError: If the optimizers are of different classes, or the networks are not those of the report.

    Example:
        >>> from lightning_gcsr import shrink_units
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = net[0].weight.data[0].zero_()
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> smaller, report = shrink_units(net, torch.ones(1, 2))
        >>> new = torch.optim.SGD(smaller.parameters(), lr=0.1, momentum=0.9)
        >>> carry_optimizer_state(optimizer, new, net, smaller, report)
        >>> new.state[smaller[0].weight]["momentum_buffer"].shape
        torch.Size([2, 2])
    """
    if type(optimizer) is not type(new_optimizer):
        raise ValueError(
            f"`new_optimizer` must be of the class of the old one, {type(optimizer).__name__}, got"
            f" {type(new_optimizer).__name__}. Their states mean different things."
        )
    old_parameters, names = dict(module.named_parameters()), {p: name for name, p in smaller.named_parameters()}
    loaded = new_optimizer.state_dict()
    numbers = [number for group in loaded["param_groups"] for number in group["params"]]
    parameters = [parameter for group in new_optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        name = names.get(parameter, "")
        old = old_parameters.get(name)
        if old is None:
            continue
        kept = report.kept.get(name, tuple(torch.arange(size) for size in old.shape))
        if tuple(len(left) for left in kept) != tuple(parameter.shape):
            raise ValueError(
                f"`report` must be the one on this network, and it has other indices than {name!r} has now. Carry the"
                " state over right after `shrink_units`."
            )
        if old in optimizer.state:
            loaded["state"][number] = _cut(optimizer.state[old], old, kept)
    new_optimizer.load_state_dict(loaded)


def _cut(state: Mapping[str, Any], parameter: Tensor, kept: tuple[Tensor, ...]) -> dict[str, Any]:
    smaller: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() == parameter.dim():
            for dim, left in enumerate(kept):
                if value.shape[dim] == parameter.shape[dim]:
                    value = value.index_select(dim, left.to(value.device))
        smaller[key] = value.clone() if isinstance(value, Tensor) else value
    return smaller
