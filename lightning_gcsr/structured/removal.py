"""Units that can go: which they are, what they leave in the biases, and cutting them out of the tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm

from lightning_gcsr.structured.traced_tensors import Reading, Trace
from lightning_gcsr.structured.unit_labels import LabelledTensor, ResolvedUnits

__all__ = ["GROUPED", "Removal", "cut", "find_removable", "fold", "output_dim"]

GROUPED = (conv._ConvNd, nn.GroupNorm)
"""The layers whose number of groups follows from what is left of them."""

_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Removal:
    """The labels that go, and what is to be said about those that stay."""

    gone: Tensor
    stuck: dict[str, int] = field(default_factory=dict)
    """By the name of a layer, how many of its units are constant and stay."""
    last: list[str] = field(default_factory=list)
    """The names of layers of whose units one stays only because a layer needs one."""


def output_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight that its outputs have."""
    transposed = isinstance(module, conv._ConvTransposeNd) and module.groups == 1
    return 1 if transposed or isinstance(module, nn.Embedding) or _inputs_first(module) else 0


def _inputs_first(layer: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in transformers, ``Conv1D``, whose weight is transposed."""
    return hasattr(layer, "nx") and hasattr(layer, "nf")


def _owners(module: nn.Module, labelled: LabelledTensor) -> list[tuple[str, nn.Module]]:
    parents = [name.rpartition(".")[0] for name in labelled.names]
    return [(parent, module.get_submodule(parent)) for parent in parents]


def _takes_up(module: nn.Module, trace: Trace, reading: Reading) -> Optional[tuple[nn.Module, str]]:
    """The layer, and the name of its bias, that can take up a constant that this reading makes."""
    labelled = trace.units.tensors.get(id(reading.weight if reading.bias is None else reading.bias))
    if reading.weight is None or labelled is None or not labelled.is_parameter or len(labelled.names) > 1:
        return None
    layer, leaf = _owners(module, labelled)[0][1], labelled.names[0].rpartition(".")[2]
    if reading.bias is not None:
        return layer, leaf
    # A layer of another class might not look at the bias that it gets.
    plain = isinstance(layer, _FOLDABLE) and type(layer).forward in {kind.forward for kind in _FOLDABLE}
    return (layer, "bias") if plain and leaf == "weight" else None


def find_removable(module: nn.Module, trace: Trace, units: ResolvedUnits) -> Removal:
    """The units without which nothing changes, except for constants that biases take up."""
    stays = units.pinned.clone()
    stuck = torch.zeros_like(stays)
    read = Counter(id(tensor) for reading in trace.readings for tensor in (reading.weight, reading.bias))
    for reading in trace.readings:
        layer = _takes_up(module, trace, reading)
        once = read[id(reading.weight)] == 1 and (reading.bias is None or read[id(reading.bias)] == 1)
        free = reading.unread | (reading.constant if layer is not None and once else False)
        roots = units.root[reading.labels]
        stays[roots[~free]] = True
        stuck[roots[~free & reading.proven]] = True
        stuck[roots[~free & ~reading.proven]] = False
    removal = Removal(~stays[units.root])
    removal.stuck = _stuck_units(module, trace, units, stuck)
    _keep_one(module, trace, units, removal)
    return removal


def _stuck_units(module: nn.Module, trace: Trace, units: ResolvedUnits, stuck: Tensor) -> dict[str, int]:
    counts: dict[str, int] = {}
    for labelled in trace.units.tensors.values():
        for name, owner in _owners(module, labelled):
            dim = output_dim(owner)
            if labelled.tensor.dim() >= 2 and dim in labelled.labels:
                roots = units.root[labelled.labels[dim]]
                if count := int((stuck[roots] & ~units.pinned[roots]).sum()):
                    counts[name] = count
    return counts


def _keep_one(module: nn.Module, trace: Trace, units: ResolvedUnits, removal: Removal) -> None:
    """Let no dimension of a tensor vanish."""
    again = True
    while again:
        again = False
        for labelled in trace.units.tensors.values():
            for dim, labels in labelled.labels.items():
                if bool(removal.gone[labels].all()):
                    again = True
                    removal.gone &= units.root != units.root[labels[0]]
                    for name, owner in _owners(module, labelled):
                        if labelled.tensor.dim() >= 2 and dim == output_dim(owner):
                            removal.last.append(name)


@torch.no_grad()
def fold(module: nn.Module, trace: Trace, removal: Removal) -> None:
    """Add to biases what the layers made of the constants that go."""
    for reading in trace.readings:
        going = removal.gone[reading.labels] & ~reading.unread
        taker = _takes_up(module, trace, reading) if bool(going.any()) else None
        if taker is None or reading.weight is None:
            continue
        columns = reading.weight.detach().to("cpu", torch.float64)[:, going]
        added = (columns.flatten(2).sum(2) if columns.dim() > 2 else columns) @ reading.values[going]
        if not bool(added.any()):
            continue
        layer, name = taker
        bias = layer._parameters[name]
        like = reading.weight if bias is None else bias
        grows = bool(layer.weight.requires_grad) if bias is None else bias.requires_grad
        total = added if bias is None else bias.detach().to("cpu", torch.float64) + added
        layer._parameters[name] = nn.Parameter(total.to(like.device, like.dtype), requires_grad=grows)


@torch.no_grad()
def cut(module: nn.Module, trace: Trace, removal: Removal, kept: dict[str, list[Tensor]]) -> int:
    """Take units out of all tensors of a module, and say how many indices went.

    Args:
        module: The module, changed in place.
        trace: Its trace.
        removal: What goes.
        kept: By name, for each dimension of a tensor, which of its first indices are left; brought up to date.
    """
    count = 0
    widths = {name: _group_width(part) for name, part in module.named_modules() if hasattr(part, "weight")}
    for labelled in trace.units.tensors.values():
        smaller = _current(module, labelled)
        for dim, labels in labelled.labels.items():
            left = (~removal.gone[labels]).nonzero()[:, 0]
            if len(left) < len(labels):
                count += len(labels) - len(left)
                smaller = smaller.detach().index_select(dim, left.to(smaller.device))
                for name in labelled.names:
                    kept[name][dim] = kept[name][dim][left]
        if smaller.shape != labelled.tensor.shape:
            if labelled.is_parameter:
                smaller = nn.Parameter(smaller, requires_grad=labelled.tensor.requires_grad)
            for name in labelled.names:
                parent, _, leaf = name.rpartition(".")
                owner = module.get_submodule(parent)
                (owner._parameters if labelled.is_parameter else owner._buffers)[leaf] = smaller  # type: ignore[assignment]
    for name, part in module.named_modules():
        _set_sizes(part, widths.get(name))
    return count


def _current(module: nn.Module, labelled: LabelledTensor) -> Tensor:
    """The tensor as it is now: a bias may have taken constants up."""
    parent, _, leaf = labelled.names[0].rpartition(".")
    owner = module.get_submodule(parent)
    tensor = owner._parameters.get(leaf) if labelled.is_parameter else owner._buffers.get(leaf)
    return labelled.tensor if tensor is None else tensor


def _group_width(layer: Any) -> Optional[float]:
    """How many indices of a weight's first dimension make one group."""
    if isinstance(layer, conv._ConvNd):
        return layer.weight.shape[0] / layer.groups
    return layer.weight.shape[0] / layer.num_groups if isinstance(layer, nn.GroupNorm) and layer.affine else None


def _set_sizes(layer: Any, width: Optional[float]) -> None:
    """Bring the sizes that a layer keeps beside its weights up to date."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif _inputs_first(layer):
        layer.nx, layer.nf = layer.weight.shape
    elif isinstance(layer, conv._ConvNd):
        shape = layer.weight.shape
        layer.groups = 1 if layer.groups == 1 else round(shape[0] / width)  # type: ignore[operator]
        sizes = shape[0], shape[1] * layer.groups
        layer.in_channels, layer.out_channels = sizes if layer.transposed else sizes[::-1]
    elif isinstance(layer, (batchnorm._NormBase, instancenorm._InstanceNorm)):
        vector = layer.weight if layer.weight is not None else layer.running_mean
        layer.num_features = layer.num_features if vector is None else len(vector)
    elif isinstance(layer, nn.GroupNorm) and layer.affine:
        layer.num_channels = len(layer.weight)
        layer.num_groups = round(layer.num_channels / width)  # type: ignore[operator]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
