"""Which parameters of a module are regularized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_gcsr.validation import argument_error, near_names

__all__ = [
    "beyond_default",
    "check_patterns",
    "left_out_by_default",
    "matching_names",
    "parameter_aliases",
    "select_parameters",
]

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
# What names a table that is added to the inputs instead of multiplied with them: pos, pos_embed, positional_embedding,
# absolute_pos_embed, relative_position_bias_table, cls_token; but not pos_proj, pos_weight or compose.
_POSITION_NAME = re.compile(
    r"(^|_)(pos(ition(al|s)?)?(_?(emb|enc)\w*|_?tables?|_?bias\w*)?|(cls|class)_?(tokens?|emb\w*))$", re.IGNORECASE
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


@dataclass(slots=True)
class _Candidate:
    """One floating-point parameter, all its names (tied weights have several), and the layer that owns it."""

    parameter: nn.Parameter
    layer: nn.Module
    names: list[str]
    spared: bool = False
    """Whether the model itself asks to leave the parameter alone, by ``no_weight_decay()``."""

    @property
    def is_matrix(self) -> bool:
        """Whether it has two or more dimensions that are not singleton, outside norm layers."""
        shape = self.parameter.shape
        # The weight of a layer with one output or one input is a matrix all the same.
        is_matrix = sum(size > 1 for size in shape) >= 2 or (len(shape) == 2 and self._is_weight)
        return is_matrix and not _is_norm_layer(self.layer)

    @property
    def is_regularized_by_default(self) -> bool:
        """Whether it is the weight of a layer: a matrix that is neither a table of positions nor spared."""
        shape, name = self.parameter.shape, self.names[0].rpartition(".")[2]
        # What is broadcast over the batch is added to it: position embeddings and tokens of vision transformers.
        is_broadcast = len(shape) >= 3 and shape[0] == 1 and not self._is_weight
        is_table = is_broadcast or _POSITION_NAME.search(name) is not None
        return self.is_matrix and not is_table and not self.spared

    @property
    def _is_weight(self) -> bool:
        return "weight" in self.names[0].rpartition(".")[2]


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
    spared: set[str] = set()
    for prefix, layer in module.named_modules(remove_duplicate=False):
        # torch.compile puts the marker into the names of a compiled submodule; the user never wrote it.
        prefix = f"{prefix}.".replace("_orig_mod.", "").lstrip(".")
        spared |= {prefix + name for name in _spared_by(layer)}
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
    for candidate in found.values():
        candidate.spared = any(name in spared for name in candidate.names)
    return list(found.values())


def _spared_by(layer: nn.Module) -> set[str]:
    """The names that a model asks to spare from weight decay, by the convention of timm."""
    asks = getattr(type(layer), "no_weight_decay", None)
    return {str(name) for name in layer.no_weight_decay()} if callable(asks) else set()  # type: ignore[operator]


def matching_names(argument: str, pattern: str, names: Mapping[str, Sequence[str]]) -> set[str]:
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

    By default these are the weights of layers: the parameters with two or more dimensions that are not of size 1,
    outside norm layers. Left out are those that the model itself asks to spare by ``no_weight_decay()``, as models of
    timm do for position embeddings and class tokens; those whose own name says that they are one of these, such as
    ``pos``, ``position_embedding`` or ``cls_token``; and those with three or more dimensions, the first of size 1, and
    no "weight" in their name. All of these are added to the samples of a batch instead of multiplied with them.

    A pattern is a regular expression that is searched for in the full name (``re.search``); of a parameter that is
    tied to several names, in each of them.

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
        selected = {name for name, candidate in candidates.items() if candidate.is_regularized_by_default}
    else:
        selected = set().union(*(matching_names("include", pattern, names) for pattern in include))
    for pattern in exclude or ():
        selected -= matching_names("exclude", pattern, names)
    if not selected:
        raise ValueError(
            "There is nothing to regularize: no parameter is selected. By default these are the parameters with two or"
            " more dimensions outside norm layers, less those that `exclude` matches; name others with `include`."
            f" The module has: {', '.join(map(repr, names)) or 'no parameters'}."
        )
    return {name: candidate.parameter for name, candidate in candidates.items() if name in selected}


def left_out_by_default(module: nn.Module) -> list[str]:
    """The matrices that :func:`select_parameters` leaves out by default: tables of positions, and what a model spares.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> net.pos = nn.Parameter(torch.zeros(5, 4))
        >>> left_out_by_default(net)
        ['pos']
    """
    return [c.names[0] for c in _candidates(module) if c.is_matrix and not c.is_regularized_by_default]


def beyond_default(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these parameters that only ``include`` selects: biases, norms, tables of positions, what a model spares.

    Example:
        >>> beyond_default(nn.Sequential(nn.Linear(4, 3)), ["0.weight", "0.bias"])
        ['0.bias']
    """
    wanted = set(names)
    found = [c for c in _candidates(module) if not c.is_regularized_by_default]
    return [candidate.names[0] for candidate in found if candidate.names[0] in wanted]


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
