"""What is said of the units of a module: how many each layer has, and why those of some layers had to stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_gcsr.structured.attention import ReducedMultiheadAttention
from lightning_gcsr.structured.removal import output_dim
from lightning_gcsr.structured.traced_tensors import Trace
from lightning_gcsr.structured.unit_labels import INPUT, OUTPUT, ResolvedUnits

__all__ = ["left_alone", "unit_counts"]

_WEIGHTS = ("weight", "in_proj_weight", "weight_orig", "original", "original0", "weight_g", "weight_v", "original1")


def left_alone(module: nn.Module, trace: Trace, units: ResolvedUnits) -> tuple[dict[str, str], list[str]]:
    """The layers all of whose units must stay, with the reason, and those some of whose units can go.

    The first and the last layers of a module are not listed for having its inputs and outputs.
    """
    stays: dict[str, str] = {}
    free: list[str] = []
    for labelled in trace.units.tensors.values():
        for full in labelled.names:
            parent, _, leaf = full.rpartition(".")
            owner = module.get_submodule(parent)
            name = parent.partition(".parametrizations.")[0].removeprefix("parametrizations.")
            labels = labelled.labels.get(output_dim(owner))
            if not labelled.is_parameter or labels is None or labelled.tensor.dim() < 2 or leaf not in _WEIGHTS:
                continue
            if not bool(units.pinned[labels].all()):
                free.append(name)
                continue
            reasons = [reason for root in units.root[labels[:1]].tolist() for reason in units.reasons[root]]
            if OUTPUT not in reasons:
                stays.setdefault(name, next((reason for reason in reasons if reason != INPUT), INPUT))
    return stays, free


def unit_counts(module: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The number of outputs of each of these layers, or of its heads."""
    counts: dict[str, int] = {}
    for name in names:
        layer: Any = module.get_submodule(name)
        if isinstance(layer, (ReducedMultiheadAttention, nn.MultiheadAttention)):
            counts[name] = layer.num_heads
        else:
            counts[name] = int(layer.weight.shape[output_dim(layer)])
    return counts
