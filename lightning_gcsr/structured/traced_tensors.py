"""What is known of the tensors of a run: which units their positions belong to, and what depends on no input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_gcsr.structured.unit_labels import UnitLabels, varying_dims

__all__ = ["Reading", "TensorFacts", "Trace", "all_constant", "even", "everywhere", "padded", "vector_operand"]


@dataclass
class TensorFacts:
    """What is known of one tensor."""

    labels: list[Tensor]
    """Labels, shaped to broadcast against the tensor; no two of them differ along the same dimension."""
    constant: Tensor
    """Where the values depend on no input, shaped to broadcast against the tensor."""
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    """What must stay once the tensor is used."""
    sums_to_one: bool = False
    """Whether the values along the last dimension sum to one, as those of a softmax."""


@dataclass
class Reading:
    """A sum over units: a layer or a product of matrices that reads them."""

    labels: Tensor
    """The labels of what is read, one for each index that is summed over."""
    unread: Tensor
    """Where the sum does not change when the index is left out."""
    constant: Tensor
    """Where what is read is one number that depends on no input."""
    values: Tensor
    """That number, in double precision."""
    proven: Tensor
    """Where what is read depends on no input, whether or not it is one number."""
    weight: Optional[Tensor] = None
    """The weight of the layer."""
    bias: Optional[Tensor] = None
    """The bias of the layer."""


class Trace:
    """The labels of a module, and the facts about the tensors of one run."""

    def __init__(self, units: UnitLabels) -> None:
        self.units = units
        self.facts: Any = WeakIdKeyDictionary()
        self.readings: list[Reading] = []
        self.used: set[int] = set()
        """The parameters and buffers that the run used, by their ids."""
        self.running: list[str] = []
        """The names of the modules whose forward is running, the innermost last."""
        self.grouped: set[str] = set()
        """The names of the modules whose number of groups can change: a call by other code has its own number."""
        self.paused = False
        """Whether operations are parts of a layer that is followed as a whole."""

    @property
    def place(self) -> str:
        """Where the run is, for a reason."""
        return f" in {self.running[-1]!r}" if self.running and self.running[-1] else ""

    def pin_groups(self, tensors: Sequence[Tensor], what: str) -> None:
        """Let all units of these tensors stay, unless the number of groups belongs to the module that runs."""
        if not self.running or self.running[-1] not in self.grouped:
            self.lose(tensors, f"{what}{self.place} has a number of groups that the code fixes")

    def of(self, tensor: Tensor) -> TensorFacts:
        """What is known of a tensor that is used now."""
        facts: Optional[TensorFacts] = self.facts.get(tensor)
        self.used.add(id(tensor))
        if facts is None:
            return TensorFacts([], torch.zeros([1] * tensor.dim(), dtype=torch.bool))
        for labels, reason in facts.pins:
            self.units.pin(labels, reason)
        facts.pins = []
        return facts

    def note(
        self, tensor: Tensor, labels: Sequence[Tensor], constant: Tensor, pins: Sequence[tuple[Tensor, str]] = ()
    ) -> None:
        """Write down what is known of a new tensor."""
        kept = []
        for array in labels:
            array = compressed(array)
            if not varying_dims(array):
                self.units.pin(array, f"one of its units is picked out{self.place}")
                continue
            self.units.note_array(array)
            kept.append(array)
        self.facts[tensor] = TensorFacts(kept, compressed(constant), list(pins))

    def lose(self, tensors: Sequence[Tensor], reason: str) -> None:
        """Let all units of these tensors stay."""
        for tensor in tensors:
            for labels in self.of(tensor).labels:
                self.units.pin(labels, reason)

    def combine(
        self, shape: Sequence[int], parts: Sequence[tuple[Sequence[int], Sequence[Tensor]]], what: str
    ) -> list[Tensor]:
        """The labels of an elementwise result, with the units that meet in it coupled.

        Args:
            shape: The shape of the result.
            parts: For each operand, its shape and its labels.
            what: The operation, for a reason.
        """
        reason = f"{what}{self.place} combines it with values that are no units"
        found: list[Tensor] = []
        for _, labels in parts:
            for array in labels:
                self._join(found, padded(array, len(shape)), f"{what}{self.place} mixes its units")
        for array in found:
            for part_shape, labels in parts:
                full = [1] * (len(shape) - len(part_shape)) + list(part_shape)
                covered = {dim for other in labels for dim in varying_dims(padded(other, len(shape)))}
                if any(full[dim] > 1 and dim not in covered for dim in varying_dims(array)):
                    self.units.pin(array, reason)
        return found

    def _join(self, found: list[Tensor], array: Tensor, reason: str) -> None:
        dims = set(varying_dims(array))
        for i, other in enumerate(found):
            others = set(varying_dims(other))
            if not dims & others:
                continue
            if dims <= others or others <= dims:
                self.units.couple(array, other, reason)
                if others < dims:
                    found[i] = array
            else:
                self.units.pin(array, reason)
                self.units.pin(other, reason)
            return
        found.append(array)


def padded(array: Tensor, dims: int) -> Tensor:
    """With dimensions of size 1 in front, as broadcasting adds them."""
    return array.reshape([1] * (dims - array.dim()) + list(array.shape)) if array.dim() < dims else array


def compressed(array: Tensor) -> Tensor:
    """With size 1 along each dimension along which nothing differs."""
    for dim in varying_dims(array):
        first = array.narrow(dim, 0, 1)
        if bool((array == first).all()):
            array = first
    return array.clone() if array.numel() < array.untyped_storage().nbytes() // array.element_size() else array


def everywhere(constant: Tensor, dims: Sequence[int]) -> Tensor:
    """Where the values are constant along all of these dimensions, which are kept with size 1."""
    return constant.all(dim=tuple(dims), keepdim=True) if len(dims) else constant


def even(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Where values are the same along all of these dimensions, which are kept with size 1, up to rounding."""
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.zeros([1] * tensor.dim(), dtype=torch.bool)
    low, high = tensor.amin(tuple(dims), keepdim=True), tensor.amax(tuple(dims), keepdim=True)
    # Vectorized code may round its last few entries in another way than the others.
    rounding = _FEW_ULPS * torch.finfo(tensor.dtype).eps * torch.maximum(low.abs(), high.abs())
    return (high - low <= rounding).cpu()


def vector_operand(trace: Trace, vector: Optional[Tensor], dims: int, dim: int) -> list[tuple[list[int], list[Tensor]]]:
    """A vector of one value a unit, as an operand that broadcasts along the units."""
    if vector is None:
        return []
    shape = [len(vector) if d == dim else 1 for d in range(dims)]
    return [(shape, [array.reshape(shape) for array in trace.of(vector).labels])]


def all_constant(trace: Trace, *tensors: Optional[Tensor]) -> bool:
    """Whether no value of these tensors depends on an input."""
    return all(tensor is None or bool(trace.of(tensor).constant.all()) for tensor in tensors)


_FEW_ULPS = 64
