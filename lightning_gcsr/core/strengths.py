"""The strength of each parameter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from lightning_gcsr.core.parameter_selection import check_patterns, matching_names
from lightning_gcsr.validation import check_choice, check_finite_number

__all__ = ["StrengthScale", "assign_strengths", "check_strength", "collapsing_strength", "fan_in"]

StrengthScale = Literal["uniform", "fan_in"]


def check_strength(strength: float | Mapping[str, float]) -> None:
    """Raise unless ``strength`` is finite and not negative, or such numbers by regular expressions that compile."""
    advice = "Use 0 for no penalty."
    if not isinstance(strength, Mapping):
        check_finite_number("strength", strength, minimum=0.0, advice=advice)
        return
    check_patterns("strength", list(strength))
    for pattern, value in strength.items():
        check_finite_number(f"strength[{pattern!r}]", value, minimum=0.0, advice=advice)


def fan_in(parameter: Tensor) -> float:
    """The number of weights that feed one output: that of a slice along dimension 0; 1 for vectors.

    Example:
        >>> import torch
        >>> fan_in(torch.empty(16, 3, 5, 5))
        75.0
    """
    return parameter.numel() / max(1, parameter.shape[0]) if parameter.dim() >= 2 else 1.0


def assign_strengths(
    parameters: Mapping[str, Tensor],
    strength: float | Mapping[str, float],
    strength_scale: StrengthScale = "uniform",
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """The strength of each parameter that gets one, by name.

    Args:
        parameters: The selected parameters by name.
        strength: One strength for all, or a mapping from regular expressions to strengths, of which the first that
            is found in a name wins. Parameters that none matches, and those at strength 0 beside others above 0, are
            not regularized.
        strength_scale: ``"uniform"``: as given. ``"fan_in"``: multiplied by the parameter's :func:`fan_in` over the
            mean fan-in of all weights that get a strength.
        aliases: All names of each parameter, see :func:`parameter_aliases`; a pattern may be found in any of them.

    Raises:
        ValueError: If a strength is negative or not finite, or a pattern does not compile or matches no parameter.

    Example:
        >>> import torch
        >>> weights = {"conv.weight": torch.empty(2, 3), "head.weight": torch.empty(2, 9)}
        >>> assign_strengths(weights, {"head": 1e-3, ".": 1e-2})
        {'conv.weight': 0.01, 'head.weight': 0.001}
        >>> assign_strengths(weights, 0.01, "fan_in")
        {'conv.weight': 0.004, 'head.weight': 0.012}
    """
    check_strength(strength)
    check_choice("strength_scale", strength_scale, ["uniform", "fan_in"])
    strengths: dict[str, float] = {}
    names = {name: (aliases or {}).get(name, [name]) for name in parameters}
    if isinstance(strength, Mapping):
        for pattern, value in strength.items():
            for name in matching_names("strength", pattern, names):
                strengths.setdefault(name, float(value))
        if any(strengths.values()):
            strengths = {name: value for name, value in strengths.items() if value > 0}
    else:
        strengths = dict.fromkeys(parameters, float(strength))
    strengths = {name: strengths[name] for name in parameters if name in strengths}
    if strength_scale == "uniform":
        return strengths
    total = sum(parameters[name].numel() for name in strengths)
    mean = sum(parameters[name].numel() * fan_in(parameters[name]) for name in strengths) / max(1, total) or 1.0
    return {name: value * fan_in(parameters[name]) / mean for name, value in strengths.items()}


def collapsing_strength(spans: Mapping[str, float], paths: Mapping[str, float]) -> float:
    """The strength at which proximal steps bring the median tensor to zero within a training without a loss.

    Args:
        spans: How far the penalty must carry each tensor to zero, as ``CoherentRegularizer.spans`` gives it.
        paths: How far it is carried at strength 1: the proximal step sizes of all steps, added up.

    Returns:
        The median of span ÷ path over the tensors for which it is positive and finite; 1 if there are none.

    Example:
        >>> collapsing_strength({"first": 0.5, "second": 0.1, "head": 0.2}, {"first": 100, "second": 100, "head": 100})
        0.002
    """
    strengths = [spans[name] / paths[name] for name in spans if paths.get(name, 0) > 0 and 0 < spans[name] < math.inf]
    return statistics.median(strengths) if strengths else 1.0
