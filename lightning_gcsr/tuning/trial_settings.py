"""What a search tries: which callback, under which target sparsities or strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional, Union

from lightning_gcsr._lightning import Trainer, trainer_callbacks
from lightning_gcsr.callbacks import GradientCoherentRegularization
from lightning_gcsr.validation import argument_error, check_finite_number, check_integer

__all__ = ["checked_strengths", "checked_targets", "regularization_of", "scaled_strength", "with_target"]

TARGETS = (0.5, 0.75, 0.9, 0.95, 0.98)


def regularization_of(
    trainer: Trainer, given: Optional[GradientCoherentRegularization]
) -> GradientCoherentRegularization:
    if given is None:
        present = [
            callback for callback in trainer_callbacks(trainer) if isinstance(callback, GradientCoherentRegularization)
        ]
        if len(present) > 1:
            rule = f"must be given where the Trainer has {len(present)} of them"
            raise argument_error("regularization", None, rule, "Name the one whose strength is wanted.")
        given = present[0] if present else GradientCoherentRegularization("l1", strength=1.0)
    if not isinstance(given, GradientCoherentRegularization):
        rule = "must be a GradientCoherentRegularization"
        raise argument_error("regularization", given, rule, "Its strength is ignored.", TypeError)
    return given


def scaled_strength(strength: Union[float, Mapping[str, float]], largest: float) -> Union[float, dict[str, float]]:
    """The strength, or where there are several the same proportions with this one as the largest."""
    if not isinstance(strength, Mapping):
        return largest
    known = max(strength.values())
    return {pattern: largest * value / known if known else largest for pattern, value in strength.items()}


def with_target(wanted: GradientCoherentRegularization, target: float) -> GradientCoherentRegularization:
    if isinstance(wanted.strength, Mapping):
        rule = "must be None where the regularization has several strengths"
        raise argument_error("target_sparsities", (target,), rule, "Give `strengths`, such as strengths=9.")
    try:
        return wanted.with_changes(strength=None, target_sparsity=target)
    except ValueError as error:
        raise ValueError(f"`find_strength` tries target sparsities: {error} Here: strengths=9.") from error


def checked_strengths(strengths: Union[int, Sequence[float], None]) -> Union[int, list[float], None]:
    if strengths is None:
        return None
    if isinstance(strengths, (str, bytes, int)) or not hasattr(strengths, "__iter__"):
        check_integer("strengths", strengths, minimum=2, advice="Or give a list of strengths.")
        return strengths  # type: ignore[return-value]
    values = list(strengths)
    for value in values:
        check_finite_number("strengths", value, 0.0, advice="Give a number of strengths for a range that fits.")
        if value == 0:
            rule = "must be greater than 0"
            raise argument_error("strengths", value, rule, "The trial without a penalty is made anyway.")
    return _ascending("strengths", values)


def checked_targets(
    targets: Optional[Sequence[float]], strengths: Union[int, Sequence[float], None]
) -> Sequence[float]:
    if targets is None:
        return TARGETS if strengths is None else ()
    if strengths is not None:
        raise argument_error("target_sparsities", targets, "must be None where strengths are given", "Try one of them.")
    if isinstance(targets, (str, bytes)) or not hasattr(targets, "__iter__"):
        raise argument_error("target_sparsities", targets, "must be a list of numbers", "Write [0.9].", TypeError)
    values = list(targets)
    for value in values:
        check_finite_number("target_sparsities", value, 0.0, 1.0, "They are fractions of the weights.")
        if value in (0, 1):
            raise argument_error("target_sparsities", value, "must lie between 0 and 1", "0.9 leaves one in ten.")
    return _ascending("target_sparsities", values)


def _ascending(name: str, values: list[float]) -> list[float]:
    if not values:
        raise argument_error(name, values, "must have at least one number", "Leave it out for a choice.")
    return sorted({float(value) for value in values})
