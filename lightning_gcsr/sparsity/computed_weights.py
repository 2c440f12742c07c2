"""Which weights are counted: those that a module computes with, the trained ones apart from the frozen ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_gcsr.core.sharding import is_sharded

__all__ = ["CountedWeights", "computed_weights", "counted_weights", "masked_attributes"]


class CountedWeights(NamedTuple):
    """The weights of a module by name."""

    trained: dict[str, Tensor]
    """Those that a sparsity is about: made of parameters that require a gradient. If none does, all of them."""
    frozen: dict[str, Tensor]
    """The others."""


def counted_weights(module: nn.Module, parameters: Mapping[str, Tensor]) -> CountedWeights:
    """The weights that the module computes with in place of these parameters, trained and frozen ones apart.

    Everything in this package that gives one sparsity for a module counts the trained weights: with a frozen backbone
    or with LoRA, the zeros that a penalty makes would drown among weights that never change.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
        >>> weights = counted_weights(net, {"0.weight": net[0].weight, "1.weight": net[1].weight})
        >>> list(weights.trained), list(weights.frozen)
        (['1.weight'], ['0.weight'])
    """
    groups = _groups(module, parameters)
    values = _values(groups)
    trained = {name for name, (_, sources) in groups.items() if any(source.requires_grad for source in sources)}
    trained = trained or set(values)
    return CountedWeights(
        {name: value for name, value in values.items() if name in trained},
        {name: value for name, value in values.items() if name not in trained},
    )


def computed_weights(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the module computes with, in place of the parameters that they are made of.

    A parameter ``weight_orig`` under a mask of :mod:`torch.nn.utils.prune` becomes ``weight``, the masked one. The
    originals of a parametrization of :mod:`torch.nn.utils.parametrize` become the one tensor that it makes of them, as
    in evaluation, so that neither random numbers nor power iterations are used up. All others stay as they are.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=6)
        >>> weights = computed_weights(layer, dict(layer.named_parameters()))
        >>> sorted(weights), int((weights["weight"] == 0).sum())
        (['bias', 'weight'], 6)
    """
    return _values(_groups(module, parameters))


def masked_attributes(module: nn.Module) -> list[Tensor]:
    """The plain attributes in which :mod:`torch.nn.utils.prune` keeps masked weights: tensors with a history.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=6)
        >>> masked_attributes(layer)[0] is layer.weight
        True
    """
    found = []
    for layer in module.modules():
        for name in (key.removesuffix("_orig") for key in layer._parameters if key.endswith("_orig")):
            weight = vars(layer).get(name)
            if isinstance(weight, Tensor) and f"{name}_mask" in layer._buffers:
                found.append(weight)
    return found


class _Maker(NamedTuple):
    """What makes one weight of one or more parameters: a mask, or a parametrization of a layer."""

    layer: nn.Module
    name: str
    mask: Tensor | None = None

    def weight(self, sources: list[Tensor]) -> Tensor:
        """The weight that the layer computes with."""
        if self.mask is not None:
            return sources[0].detach() * self.mask
        with _in_evaluation(self.layer.get_submodule(f"parametrizations.{self.name}")):
            weight: Tensor = getattr(self.layer, self.name)
        return weight.detach()


_Groups = dict[str, tuple["_Maker | None", list[Tensor]]]


def _groups(module: nn.Module, parameters: Mapping[str, Tensor]) -> _Groups:
    """By the name of each weight: what makes it, if anything does, and the parameters that it is made of."""
    makers = _makers(module)
    groups: _Groups = {}
    for name, parameter in parameters.items():
        maker = makers.get(id(parameter))
        if maker is not None:
            name = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name).removesuffix("_orig")
        groups.setdefault(name, (maker, []))[1].append(parameter)
    return groups


def _makers(module: nn.Module) -> dict[int, _Maker]:
    """What makes a weight of each parameter under a mask or a parametrization, by the id of the parameter."""
    makers: dict[int, _Maker] = {}
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            mask = layer._buffers.get(f"{name.removesuffix('_orig')}_mask") if name.endswith("_orig") else None
            if parameter is not None and mask is not None and not is_sharded(parameter):
                makers[id(parameter)] = _Maker(layer, name, mask)
        if parametrize.is_parametrized(layer):
            for name, parametrization in layer.get_submodule("parametrizations").named_children():
                for original in parametrization.parameters(recurse=False):
                    makers[id(original)] = _Maker(layer, name)
    return makers


@torch.no_grad()
def _values(groups: _Groups) -> dict[str, Tensor]:
    return {
        name: sources[0].detach() if maker is None else maker.weight(sources)
        for name, (maker, sources) in groups.items()
    }


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
