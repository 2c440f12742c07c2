"""Which entries of a module's tensors belong to one unit: every index of every dimension gets a number, a label.

Labels that must be removed together are *coupled*; labels that must stay are *pinned*, with the reason. Both are
collected while the module runs on an example, and resolved afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor, nn

__all__ = ["LabelledTensor", "ResolvedUnits", "UnitLabels", "varying_dims"]

OUTPUT = "it gives the outputs of the module"
INPUT = "it reads the inputs of the module"


def varying_dims(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ; labels have size 1 along all others."""
    return [dim for dim, size in enumerate(labels.shape) if size > 1]


@dataclass
class LabelledTensor:
    """A parameter or buffer, the names it goes by, and the labels along each of its dimensions."""

    tensor: Tensor
    names: list[str]
    labels: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, and not a buffer."""
        return isinstance(self.tensor, nn.Parameter)


@dataclass
class ResolvedUnits:
    """The units that the couplings make, by the smallest of their labels."""

    root: Tensor
    """For each label, the unit to which it belongs."""
    pinned: Tensor
    """For each label, whether its unit must stay."""
    reasons: dict[int, list[str]]
    """Why, by unit."""


class UnitLabels:
    """The labels of a module's tensors, and what couples and pins them."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: dict[int, LabelledTensor] = {}
        self.fragile: list[Tensor] = []
        """Labels whose positions were cut up or regrouped, as code with fixed sizes may do."""
        self.regrouped: list[Tensor] = []
        """Labels of tensors that were given another shape."""
        self._count = 0
        self._edges: list[tuple[Tensor, Tensor]] = []
        self._pins: list[tuple[Tensor, str]] = []
        self._arrays: dict[bytes, Tensor] = {}
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            if id(tensor) in self.tensors:
                self.tensors[id(tensor)].names.append(name)
            else:
                self.tensors[id(tensor)] = self._label(LabelledTensor(tensor, [name]))
        self._pin_shared_memory()

    def _label(self, labelled: LabelledTensor) -> LabelledTensor:
        for dim, size in enumerate(labelled.tensor.shape):
            if size > 1:
                labelled.labels[dim] = torch.arange(self._count, self._count + size)
                self._count += size
        return labelled

    def _pin_shared_memory(self) -> None:
        addresses: dict[int, list[LabelledTensor]] = {}
        for labelled in self.tensors.values():
            if address := labelled.tensor.untyped_storage().data_ptr():
                addresses.setdefault(address, []).append(labelled)
        for sharers in addresses.values():
            if len(sharers) > 1:
                for labelled in sharers:
                    others = [other.names[0] for other in sharers if other is not labelled]
                    for labels in labelled.labels.values():
                        self.pin(labels, f"its memory is shared with {others[0]!r}; make it one parameter")

    def of(self, tensor: Tensor) -> list[Tensor]:
        """The labels of a parameter or buffer, each shaped to broadcast against it."""
        labelled = self.tensors[id(tensor)]
        return [
            labels.reshape([-1 if dim == d else 1 for d in range(tensor.dim())])
            for dim, labels in labelled.labels.items()
        ]

    def along(self, tensor: Optional[Tensor], dim: int) -> Optional[Tensor]:
        """The labels of a parameter or buffer along one dimension; ``None`` where it has one index only."""
        labelled = None if tensor is None else self.tensors.get(id(tensor))
        return None if labelled is None else labelled.labels.get(dim)

    def couple(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Couple labels position by position; one without a partner (−1) is pinned with the reason."""
        first, second = (labels.flatten() for labels in torch.broadcast_tensors(first, second))
        both = (first >= 0) & (second >= 0)
        self._edges.append((first[both], second[both]))
        self.pin(first[second < 0], reason)
        self.pin(second[first < 0], reason)

    def pin(self, labels: Tensor, reason: str) -> None:
        """Let units stay."""
        if labels.numel() and (labels := labels[labels >= 0]).numel():
            self._pins.append((labels.unique(), reason))

    def note_array(self, labels: Tensor) -> None:
        """Note labels that differ along several dimensions of a tensor, of which whole slices have to go."""
        if len(varying_dims(labels)) > 1:
            array = labels.squeeze().contiguous()
            self._arrays.setdefault(bytes(str(array.shape), "ascii") + array.numpy().tobytes(), array)

    def pin_fragile(self, all_views: bool) -> None:
        """Let all units stay whose positions were cut up or regrouped, or whose tensors were given another shape."""
        for labels in self.fragile + (self.regrouped if all_views else []):
            self.pin(labels, "its units are cut up or regrouped by sizes that the code fixes")

    def resolve(self) -> ResolvedUnits:
        """The units that the couplings make, and which of them must stay."""
        parent = _components(self._count, self._edges)
        for array in self._arrays.values():
            if bool((array < 0).any()):
                self.pin(array, "it shares a tensor with values that are no units")
                continue
            self._edges.append(_slices(array, parent))
            parent = _components(self._count, [(torch.arange(self._count), parent), self._edges[-1]])
        reasons: dict[int, list[str]] = {}
        pinned = torch.zeros(self._count, dtype=torch.bool)
        for labels, reason in self._pins:
            roots = parent[labels].unique()
            pinned[roots] = True
            for root in roots.tolist():
                if reason not in (known := reasons.setdefault(root, [])):
                    known.append(reason)
        return ResolvedUnits(parent, pinned[parent], reasons)


def _slices(array: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    """Couplings that leave whole slices along one dimension, the one that leaves the most units."""
    roots = parent[array]
    best: Optional[tuple[int, tuple[Tensor, Tensor]]] = None
    for dim in range(roots.dim()):
        rows = roots.movedim(dim, 0).flatten(1)
        edges = rows[:, :1].expand_as(rows).flatten(), rows.flatten()
        values, index = torch.unique(torch.cat(edges), return_inverse=True)
        merged = _components(len(values), [(index[: len(edges[0])], index[len(edges[0]) :])])
        count = len(merged.unique())
        if best is None or count > best[0]:
            best = count, edges
    assert best is not None  # there are at least two dimensions
    return best[1]


def _components(count: int, edges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """For each node of a graph the smallest node that it is connected with."""
    parent = torch.arange(count)
    if not edges:
        return parent
    first, second = (torch.cat(ends) for ends in zip(*edges, strict=True))
    while True:
        low, high = torch.minimum(parent[first], parent[second]), torch.maximum(parent[first], parent[second])
        if bool((low == high).all()):
            return parent
        parent.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(parent, grand := parent[parent]):
            parent = grand
