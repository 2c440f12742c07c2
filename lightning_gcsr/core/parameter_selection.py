"""Selection: which parameters of a module are regularized, and at which strength each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_gcsr.validation import argument_error, check_choice, check_finite_number, near_names

__all__ = [
    "StrengthScale",
    "assign_strengths",
    "check_patterns",
    "check_strength",
    "fan_in",
    "parameter_aliases",
    "select_parameters",
]

StrengthScale = Literal["uniform", "fan_in"]

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
# Norm layers that others wrote: LlamaRMSNorm, LayerNorm2d, but not NormalizedLinear.
_NORM_CLASS_NAME = re.compile(r"Norm(\dd)?$")


def _is_norm_layer(module: nn.Module) -> bool:
    return isinstance(module, _NORM_LAYERS) or _NORM_CLASS_NAME.search(type(module).__name__) is not None


def check_patterns(name: str, patterns: Sequence[str] | None) -> None:
    """Raise unless ``patterns`` is ``None`` or a non-empty list of regular expressions that compile."""
    if patterns is None:
        return
    if isinstance(patterns, str):
        advice = f"Write {name}=[{patterns!r}]."
        raise argument_error(name, patterns, "must be a list of regular expressions", advice, TypeError)
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise argument_error(name, patterns, "must be a list of regular expressions or None", kind=TypeError)
    if not list(patterns):
        raise argument_error(name, patterns, "must have at least one regular expression", "Use None for no pattern.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            rule = f"must hold regular expressions that compile ({error})"
            raise argument_error(name, pattern, rule, "Escape special characters with a backslash.") from error


def check_strength(strength: float | Mapping[str, float]) -> None:
    """Raise unless ``strength`` is finite and not negative, or such numbers by regular expressions that compile."""
    advice = "Use 0 for no penalty."
    if not isinstance(strength, Mapping):
        check_finite_number("strength", strength, minimum=0.0, advice=advice)
        return
    check_patterns("strength", list(strength))
    for pattern, value in strength.items():
        check_finite_number(f"strength[{pattern!r}]", value, minimum=0.0, advice=advice)


@dataclass(slots=True)
class _Candidate:
    """One floating-point parameter, all its names (tied weights have several), and the layer that owns it."""

    parameter: nn.Parameter
    layer: nn.Module
    names: list[str]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module, of which the names are: Fabric and data parallelism put theirs around it."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(original := getattr(module, "_original_module", None), nn.Module):
            module = original
        else:
            return module


def _candidates(module: nn.Module) -> list[_Candidate]:
    module = _unwrapped(module)
    found: dict[int, _Candidate] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        # torch.compile puts the marker into the names of a compiled submodule; the user never wrote it.
        prefix = f"{prefix}.".replace("_orig_mod.", "").lstrip(".")
        for name, parameter in layer._parameters.items():  # `named_parameters` takes five times as long
            if parameter is None:
                continue
            full_name = prefix + name
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"The lazy parameter {full_name!r} has no shape yet. Run one batch through the module first."
                )
            if parameter.is_floating_point() or parameter.is_complex():
                found.setdefault(id(parameter), _Candidate(parameter, layer, [])).names.append(full_name)
    return list(found.values())


def _matching(argument: str, pattern: str, names: Mapping[str, Sequence[str]]) -> set[str]:
    """The first names of the parameters of which the pattern is found in any name."""
    search = re.compile(pattern).search
    matches = {first for first, aliases in names.items() if any(map(search, aliases))}
    if not matches:
        every = [alias for aliases in names.values() for alias in aliases]
        known = f"Near names: {', '.join(map(repr, near_names(pattern, every)))}." if every else "There are none."
        raise argument_error(argument, pattern, "must match the name of a parameter", known)
    return matches


def select_parameters(
    module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    r"""The parameters to regularize, by name, in the module's order; a parameter tied to several names once.

    By default these are the parameters with two or more dimensions that do not belong to a norm layer: no biases, no
    norms. A pattern is a regular expression that is searched for in the full name (``re.search``); of a parameter that
    is tied to several names, in each of them.

    Args:
        module: The module.
        include: Regular expressions that replace the default: every floating-point parameter that matches one of
            them is selected, biases and norm parameters too if they match.
        exclude: Regular expressions of parameters to leave out of these.

    Raises:
        ValueError: If a pattern does not compile or matches no parameter (with near names), if nothing is selected,
            or if a lazy parameter has no shape yet.
        TypeError: If a list of patterns is something else.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        >>> list(select_parameters(net))
        ['0.weight', '2.weight']
        >>> list(select_parameters(net, exclude=[r"^2\."]))
        ['0.weight']
    """
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    candidates = {candidate.names[0]: candidate for candidate in _candidates(module)}
    names = {name: candidate.names for name, candidate in candidates.items()}
    if include is None:
        selected = {
            name
            for name, candidate in candidates.items()
            if candidate.parameter.dim() >= 2 and not _is_norm_layer(candidate.layer)
        }
    else:
        selected = set().union(*(_matching("include", pattern, names) for pattern in include))
    for pattern in exclude or ():
        selected -= _matching("exclude", pattern, names)
    if not selected:
        raise ValueError(
            "There is nothing to regularize: no parameter is selected. By default these are the parameters with two or"
            " more dimensions outside norm layers, less those that `exclude` matches; name others with `include`."
            f" The module has: {', '.join(map(repr, names)) or 'no parameters'}."
        )
    return {name: candidate.parameter for name, candidate in candidates.items() if name in selected}


def parameter_aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of each floating-point parameter, by the first of them; tied weights have several.

    Example:
        >>> from torch import nn
        >>> net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        >>> net["head"].weight = net["embedding"].weight
        >>> parameter_aliases(net)
        {'embedding.weight': ['embedding.weight', 'head.weight']}
    """
    return {candidate.names[0]: candidate.names for candidate in _candidates(module)}


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
            for name in _matching("strength", pattern, names):
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
