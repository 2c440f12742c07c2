"""The rules that hold between the settings of a regularizer, each of which knows its own."""

from __future__ import annotations

from typing import Literal, Optional

from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.schedule import Schedule
from lightning_gcsr.core.sparsity_controller import check_target_sparsity
from lightning_gcsr.validation import argument_error, check_choice

__all__ = ["UpdateName", "check_aim", "check_rule", "default_schedule"]

UpdateName = Literal["gradient", "proximal", "dual_averaging"]


def default_schedule(gate: Optional[Gate], schedule: Schedule) -> Schedule:
    """The schedule with a warm-up of 0.3 where none was given and the gate has a tolerance, else with none.

    Example:
        >>> default_schedule(Gate(), Schedule()), default_schedule(None, Schedule())
        (Schedule(warmup=0.3), Schedule(warmup=0))
    """
    return schedule.with_default_warmup(0.3 if gate is not None and gate.tolerance else 0)


def check_aim(strength: object, target_sparsity: object, penalty: Penalty, update: str, schedule: Schedule) -> None:
    """Raise unless there is either a strength or a target sparsity that the penalty and the update can arrive at."""
    if target_sparsity is None:
        if strength is None:
            advice = "`find_strength` finds one; or give `target_sparsity`, the fraction of weights that shall be zero."
            raise argument_error("strength", None, "must be given", advice, TypeError)
        return
    check_target_sparsity(target_sparsity, penalty, update)
    if strength is not None:
        advice = "Give one of the two: with a target the strength is found during training."
        raise argument_error("strength", strength, "must be None where target_sparsity is given", advice)
    if schedule.warmup:
        advice = "Leave it out: the wanted sparsity rises gradually by itself."
        raise argument_error("warmup", schedule.warmup, "must be 0 where target_sparsity is given", advice)


def check_rule(gate: object, schedule: object, update: object) -> None:
    """Raise unless these are a gate or ``None``, a schedule, and the name of an update."""
    if gate is not None and not isinstance(gate, Gate):
        advice = "Write gate=Gate(...), or gate=None for plain strong regularization."
        raise argument_error("gate", gate, "must be a Gate or None", advice, TypeError)
    if not isinstance(schedule, Schedule):
        raise argument_error("schedule", schedule, "must be a Schedule", "Write schedule=Schedule(...).", TypeError)
    check_choice("update", update, ["gradient", "proximal", "dual_averaging"])
