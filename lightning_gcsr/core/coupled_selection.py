"""Which parameters a penalty takes, and which coupled groups take part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_gcsr.core.coupled_penalty import CoupledGroupLasso
from lightning_gcsr.core.members import Member
from lightning_gcsr.core.optimizers import learning_rate, momentum_factor, square_decay
from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.sharding import is_sharded
from lightning_gcsr.validation import argument_error

__all__ = ["check_coupled", "check_one_step_size", "check_whole", "select_for"]


def select_for(
    penalty: Penalty, module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[Penalty, dict[str, nn.Parameter]]:
    """The penalty and the parameters that it takes, by name, in the module's order.

    Of coupled groups those take part of which all weights of layers are selected, and no parameter is one that
    ``exclude`` matches; the parameters are all that make them.

    Raises:
        ValueError: As :func:`~lightning_gcsr.core.parameter_selection.select_parameters`; if groups are not known yet,
            if none is left, or if a parameter of theirs is not in the module, or sharded.
    """
    selected = select_parameters(module, include, exclude)
    if not isinstance(penalty, CoupledGroupLasso):
        return penalty, selected
    if penalty.groups is None:
        advice = "`coupled_groups` finds them; only a Lightning callback does so by itself."
        raise argument_error("groups", None, f"must be given to {penalty!r}", advice)
    every = select_parameters(module, [""])
    weights = select_parameters(module, [""] if include is not None else None)
    kept = select_parameters(module, [""], exclude)
    left_out = (weights.keys() - selected.keys()) | (every.keys() - kept.keys())
    if include is not None:  # biases and norms belong to a group without being named
        left_out -= {name for name in left_out & kept.keys() if every[name].dim() < 2}
    groups = [group for group in penalty.groups if not group.made_by & left_out]
    if not groups:
        raise ValueError(
            f"There is nothing to regularize: each of the {len(penalty.groups)} coupled groups has a part that"
            " `include` and `exclude` leave out. A group takes part only as a whole."
        )
    members = set().union(*(group.made_by for group in groups))
    if missing := members - every.keys():
        raise ValueError(
            f"The groups of {penalty!r} must be those of the module, which has no parameter {min(missing)!r}. Call"
            " `coupled_groups` on the module that is regularized."
        )
    parameters = {name: parameter for name, parameter in every.items() if name in members}
    check_whole(penalty, parameters.items())
    _check_alike(parameters)
    return penalty.over(groups), parameters


def check_whole(penalty: CoupledGroupLasso, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise if one of these parameters, given by name, is sharded."""
    if sharded := [name for name, parameter in parameters if is_sharded(parameter)]:
        raise ValueError(
            f"{penalty!r} does not fit {sharded[0]!r}, which is sharded: what belongs together lies on several"
            " processes. Use DDP, which keeps weights whole, or GroupLasso."
        )


def check_coupled(present: Mapping[str, nn.Parameter], names: Iterable[str]) -> None:
    """Raise unless one step of an optimizer can treat these parameters as one tensor.

    Args:
        present: The regularized parameters that have a gradient in this step, by name.
        names: The names of all regularized parameters.
    """
    if missing := [name for name in names if name not in present]:
        raise ValueError(
            f"Every parameter of coupled groups must have a gradient in each step of one optimizer, and {missing[0]!r}"
            " has none. Leave its groups out with `exclude`."
        )
    _check_alike(present)


def _check_alike(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless these parameters could lie end to end in one tensor, and their gradients too."""
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) > 1 or any(p.grad is not None and p.grad.is_sparse for p in parameters.values()):
        raise ValueError(
            "The parameters of coupled groups must have one dtype, one device and dense gradients, got"
            f" {', '.join(sorted(f'{dtype} on {device}' for dtype, device in kinds))}. Leave some groups out with"
            " `exclude`, or use sparse=False."
        )


def check_one_step_size(members: Sequence[Member]) -> None:
    """Raise unless the optimizer steps these parameters of coupled groups with one learning rate and one momentum."""
    settings = "lr", "momentum factor", "decay of squares"
    found: dict[tuple[float, ...], str] = {}
    for member in members:
        group = member.group
        found.setdefault((float(learning_rate(group)), momentum_factor(group), square_decay(group)), member.name)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        what, here, there = next(row for row in zip(settings, first, second, strict=True) if row[1] != row[2])
        raise ValueError(
            "The parameters of coupled groups must have one learning rate and one momentum, got"
            f" {what}={here:g} for {one!r} and {what}={there:g} for {other!r}, in different parameter groups of the"
            " optimizer. Give them the same, or leave some groups out with `exclude`."
        )
