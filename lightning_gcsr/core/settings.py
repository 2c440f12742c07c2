"""The rules that hold between the settings of a regularizer, each of which knows its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, Optional

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from lightning_gcsr.core.gate import DEFAULT_TOLERANCE, Gate
from lightning_gcsr.core.penalties import GroupLasso, Penalty
from lightning_gcsr.core.schedule import Schedule
from lightning_gcsr.core.sparsity_controller import check_target_sparsity
from lightning_gcsr.validation import argument_error, check_choice

__all__ = ["UpdateName", "check_aim", "check_layers", "check_rule", "default_schedule"]

UpdateName = Literal["gradient", "proximal", "dual_averaging"]


def default_schedule(gate: Optional[Gate], schedule: Schedule) -> Schedule:
    """The schedule with a warm-up of 0.3 where none was given and the gate has a tolerance, else with none.

    Example:
        >>> default_schedule(Gate(), Schedule()), default_schedule(None, Schedule())
        (Schedule(warmup=0.3), Schedule(warmup=0))
    """
    return schedule.with_default_warmup(0.3 if gate is not None and gate.tolerance else 0)


def check_aim(
    penalty: Penalty,
    *,
    strength: object,
    target_sparsity: object,
    gate: Optional[Gate],
    update: str,
    schedule: Schedule,
    strength_scale: str,
) -> None:
    """Raise unless there is either a strength or a target sparsity that the penalty and the update can arrive at."""
    if penalty.coupled and isinstance(strength, Mapping):
        advice = "Groups lie in several tensors. Choose groups with `include` and `exclude`."
        raise argument_error("strength", strength, f"must be one number with {penalty!r}", advice)
    if penalty.coupled and strength_scale != "uniform":
        advice = "Groups lie in several tensors."
        raise argument_error("strength_scale", strength_scale, f"must be 'uniform' with {penalty!r}", advice)
    if target_sparsity is None:
        if strength is None:
            advice = "`find_strength` finds one; or give `target_sparsity`, the sparsity at the end."
            raise argument_error("strength", None, "must be given", advice, TypeError)
        return
    check_target_sparsity(target_sparsity, penalty, update)
    if strength is not None:
        advice = "Give one of the two: with a target the strength is found during training."
        raise argument_error("strength", strength, "must be None where target_sparsity is given", advice)
    if schedule.warmup:
        advice = "Leave it out: the wanted sparsity rises gradually by itself."
        raise argument_error("warmup", schedule.warmup, "must be 0 where target_sparsity is given", advice)
    if gate is not None and gate.tolerance not in (0, DEFAULT_TOLERANCE):
        rule = f"must be 0 or the default {DEFAULT_TOLERANCE} where target_sparsity is given"
        raise argument_error("tolerance", gate.tolerance, rule, "Leave it out: a target sets its own tolerance.")


def check_rule(gate: object, schedule: object, update: object) -> None:
    """Raise unless these are a gate or ``None``, a schedule, and the name of an update."""
    if gate is not None and not isinstance(gate, Gate):
        advice = "Write gate=Gate(...), or gate=None for plain strong regularization."
        raise argument_error("gate", gate, "must be a Gate or None", advice, TypeError)
    if not isinstance(schedule, Schedule):
        raise argument_error("schedule", schedule, "must be a Schedule", "Write schedule=Schedule(...).", TypeError)
    check_choice("update", update, ["gradient", "proximal", "dual_averaging"])


def check_layers(module: nn.Module, parameters: Mapping[str, nn.Parameter], penalty: Penalty, update: str) -> None:
    """Refuse and warn of parameters that do not mean in their layer what they mean elsewhere.

    Raises:
        ValueError: If zeros are to be made in the directions of ``weight_norm``: a row of zeros has no direction.
    """
    _warn_of_transposed_groups(module, parameters, penalty)
    if update == "gradient" or not penalty.makes_zeros:
        return
    directions = {
        id(parametrization.original1)
        for layer in module.modules()
        if parametrize.is_parametrized(layer)
        for parametrization in layer.get_submodule("parametrizations").children()
        if any(type(part).__name__ == "_WeightNorm" for part in parametrization.children())
    }
    directions |= {
        id(getattr(layer, f"{hook.name}_v"))
        for layer in module.modules()
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, WeightNorm)
    }
    if found := [name for name, parameter in parameters.items() if id(parameter) in directions]:
        raise ValueError(
            f"{found[0]!r} holds the directions of weight_norm, and a row of zeros has no direction: the loss would be"
            f" NaN once a row has become zero. Leave the directions out with exclude=[{found[0].rpartition('.')[2]!r}],"
            " regularize the norms of the rows with `include`, or use update='gradient'."
        )


def _warn_of_transposed_groups(module: nn.Module, parameters: Mapping[str, nn.Parameter], penalty: Penalty) -> None:
    """Warn where the groups of a group lasso over outputs are inputs: a transposed convolution exchanges the two."""
    if not isinstance(penalty, GroupLasso):
        return
    transposed = {id(layer.weight): layer for layer in module.modules() if isinstance(layer, _ConvTransposeNd)}
    if found := [name for name, parameter in parameters.items() if id(parameter) in transposed]:
        layer = type(transposed[id(parameters[found[0]])]).__name__
        warnings.warn(
            f"{penalty!r} groups {found[0]!r} by dimension {penalty.dim}, which in a {layer} is that of the"
            f" {'inputs' if penalty.dim == 0 else 'outputs'}: dimension 0 are the inputs there, dimension 1 the"
            " outputs."
            " Give such layers a penalty of their own, with `include` and `exclude`.",
            stacklevel=4,
        )
