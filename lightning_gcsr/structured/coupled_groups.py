"""What can only be removed together: the slices of all tensors that make up one unit of a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gcsr.core.group_slices import CoupledGroup, GroupSlice
from lightning_gcsr.structured.attention import ReducedMultiheadAttention, reduced_attention
from lightning_gcsr.structured.removal import output_dim
from lightning_gcsr.structured.shrink import check_module, copy_of
from lightning_gcsr.structured.tracing import run_module, trace_units
from lightning_gcsr.structured.unit_labels import LabelledTensor, UnitLabels

__all__ = ["coupled_groups"]


def coupled_groups(module: nn.Module, example_input: Any, *, prefix: str = "") -> list[CoupledGroup]:
    """The units of a module that :func:`~lightning_gcsr.shrink_units` could remove if their weights were zero.

    A copy of the module runs once on the example, as in :func:`~lightning_gcsr.shrink_units`. Units that must stay are
    not listed: inputs and outputs, and those that ``LayerNorm`` or an unknown operation takes together. Nor are units
    that a frozen parameter makes.

    Args:
        module: The module. It stays as it is.
        example_input: An input, or a tuple of positional arguments, on the module's device.
        prefix: What the names begin with, such as ``"encoder."`` for a module that is the ``encoder`` of another.

    Returns:
        The groups, in the order of the first parameter that makes them. No index of a dimension is in two of them; an
        entry of a weight may be, as what makes one unit and reads another.

    Raises:
        TypeError: If ``module`` is not a module, or TorchScript.
        ValueError: If a parameter has no shape or no values yet, if the module cannot be copied, or if it fails on
            ``example_input``.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
        >>> for group in coupled_groups(net, torch.randn(1, 3)):
        ...     print(group)
        0.weight[[0]], 0.bias[[0]], 2.weight[:, [0]]
        0.weight[[1]], 0.bias[[1]], 2.weight[:, [1]]
    """
    check_module(module)
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    copied = copy_of(module)
    run_module(copied, arguments)
    reduced_attention(copied)
    trace, _ = trace_units(copied, arguments)
    for names in _sharers(module):
        for labelled in trace.units.tensors.values():
            if set(names) & set(labelled.names):
                for labels in labelled.labels.values():
                    trace.units.pin(labels, "its memory is shared")
    units = trace.units.resolve()
    found: dict[int, list[GroupSlice]] = {}
    for labelled, dim, labels in _labels(trace.units):
        owner = copied.get_submodule(labelled.names[0].rpartition(".")[0])
        makes = labelled.tensor.dim() == 1 or dim == output_dim(owner) or _is_of_others(owner)
        roots = torch.where(units.pinned[labels], -1, units.root[labels])
        for root in roots.unique().tolist():
            indices = tuple((roots == root).nonzero()[:, 0].tolist())
            part = GroupSlice(prefix + labelled.names[0], dim, indices, "makes" if makes else "reads")
            found.setdefault(root, []).append(part)
    frozen = {prefix + name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    groups = [_made(slices) for root, slices in found.items() if root >= 0]
    return [
        CoupledGroup(tuple(slices))
        for slices in groups
        if not any(part.role == "makes" and part.name in frozen for part in slices)
    ]


def _is_of_others(owner: nn.Module) -> bool:
    """Whether code that is not torch's multiplies by its parameters, so that each dimension may be what they make."""
    attention = isinstance(owner, (nn.MultiheadAttention, ReducedMultiheadAttention))
    return not attention and not hasattr(owner, "weight")


def _made(slices: list[GroupSlice]) -> list[GroupSlice]:
    """With something that makes the unit: where code of others multiplies by weights, all of them."""
    if any(part.role == "makes" for part in slices):
        return slices
    return [replace(part, role="makes") for part in slices]


def _labels(units: UnitLabels) -> Iterator[tuple[LabelledTensor, int, Tensor]]:
    for labelled in units.tensors.values():
        if labelled.is_parameter:
            for dim, labels in labelled.labels.items():
                yield labelled, dim, labels


def _sharers(module: nn.Module) -> list[list[str]]:
    """The names of parameters that are not the same, but share their memory."""
    addresses: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters():  # the same ones once
        if address := parameter.untyped_storage().data_ptr():
            addresses.setdefault(address, []).append(name)
    return [names for names in addresses.values() if len(names) > 1]
