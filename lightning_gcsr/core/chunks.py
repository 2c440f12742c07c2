"""Chunks: the weights of a step in portions of a convenient size, however they are spread over tensors.

What costs time is the number of calls into torch, and on a CPU every pass over memory that is not in the cache. So a
large tensor is cut up, and small tensors are laid end to end in a buffer; either way a chunk is one tensor for all that
is done with it. What a step knows of its weights from earlier steps, such as a running average, lies in the same
portions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_gcsr.core.members import Member
from lightning_gcsr.core.numerics import host_number, wide

__all__ = ["Chunk", "Scratch", "kept_of", "put_kept"]


class Scratch:
    """Buffers that all chunks of a step use in turn."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.fresh: Chunk | None = None
        """The chunk whose gradients lie in the buffer as they are now."""

    def buffer(self, purpose: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of at least this size; two that are in use at one time need two purposes."""
        key = (purpose, device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer


@dataclass
class Chunk:
    """Weights that are treated at once: several whole tensors, or one tensor or a slice of it."""

    members: list[Member]
    """The parameters, which have always had a gradient in the same steps."""
    scratch: Scratch
    span: tuple[int, int] | None = None
    """First index and number of indices along dimension 0 of the only tensor, where it is cut up."""
    flat: bool = False
    """Whether the span is one of the flattened tensor."""
    strength: float = 0.0
    """λ of this step for these weights."""
    count: int | Tensor = 0
    """The number of finite gradients so far, on the device."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What is kept from step to step: ``average``, ``latent``, ``threshold``, ``gate``."""
    mean_square: Tensor | None = None
    """The running mean square of each tensor's loss gradient, shape (number of tensors,)."""
    opened: Tensor | None = None
    """Until the step is over, whether each tensor is open, where one decision covers a tensor or more."""
    versions: list[int] = field(default_factory=list)
    """The versions of the weights as they were left, by which a replacement is noticed."""
    _views: dict[str, tuple[Tensor, Tensor, list[Tensor]]] = field(default_factory=dict)
    """By purpose numbers that lie end to end, those of them that are of this chunk, and views of these."""

    def __post_init__(self) -> None:
        first = self.members[0]
        self.device = first.parameter.device
        """Where the weights are."""
        self.joined = len(self.members) > 1
        """Whether several tensors are laid end to end."""
        self.relative = first.relative
        """What the strength is multiplied by, alike for all members."""
        self.sizes = [member.weight.numel() for member in self.members]
        """The number of weights of each tensor that lie here; of a tensor that is cut up those of the whole."""
        dtype = first.parameter.dtype.to_real()
        self.real_dtype = torch.float32 if dtype.itemsize < 4 else dtype
        """The real dtype, of at least 32 bits, that belongs to the weights."""
        self._parameters: list[Tensor] = [member.parameter for member in self.members]

    @property
    def group(self) -> dict[str, Any]:
        """The optimizer's parameter group, alike for all members."""
        return self.members[0].group

    @property
    def rows(self) -> Tensor | None:
        """The rows that a sparse gradient touches, which is never joined; ``None`` for a dense one."""
        return None if self.joined else self.members[0].rows

    def _weights(self) -> list[Tensor]:
        if self.members[0].sharded:
            return [member.weight for member in self.members]
        return self._parameters

    def _gradients(self) -> list[Tensor]:
        if self.joined and not self.members[0].sharded:
            return [parameter.grad for parameter in self._parameters]  # type: ignore[misc]
        return [member.gradient for member in self.members]

    def _slice(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor that is in this chunk: a view."""
        if self.span is None:
            return tensor
        return (tensor.view(-1) if self.flat else tensor).narrow(0, *self.span)

    # -- reading and writing what the optimizer sees -----------------------------------------------------------------

    def gradient(self) -> Tensor:
        """The gradients as the optimizer will see them, with loss scale, in a precision fit for sums.

        They are a copy where tensors are joined and where they have 16 bits, else a view.
        """
        if self.scratch.fresh is self:
            self.scratch.fresh = None
            return self._views["gradient"][1]
        return self._read(self._gradients(), "gradient")

    def weight(self) -> Tensor:
        """The weights that take part, likewise; of a sparse gradient a copy of the touched rows."""
        if (rows := self.rows) is not None:
            return wide(self.members[0].weight.index_select(0, rows))
        return self.whole_weight()

    def whole_weight(self) -> Tensor:
        """The weights, likewise; of a sparse gradient all rows."""
        return self._read(self._weights(), "weight")

    def put_gradient(self, gradient: Tensor) -> None:
        """Put back what :meth:`gradient` gave, changed in place."""
        if self.joined:
            torch._foreach_copy_(self._gradients(), self._views["gradient"][2])
        elif gradient.dtype != self.members[0].gradient.dtype:
            self._slice(self.members[0].gradient).copy_(gradient)

    def put_weight(self, weight: Tensor) -> None:
        """Put back what :meth:`weight` gave, changed in place."""
        if self.joined or self.rows is not None or weight.dtype != self.members[0].parameter.dtype:
            self._write(weight, "weight")

    def put_kept_weight(self, what: str) -> None:
        """Put what is kept under this name into the weights that take part."""
        self._write(self.of_rows(self.kept[what]), what)

    def _write(self, weight: Tensor, purpose: str) -> None:
        member = self.members[0]
        if self.joined:
            torch._foreach_copy_(self._weights(), self._parts(purpose, weight)[1])
        elif (rows := self.rows) is not None:
            member.weight.index_copy_(0, rows, weight.to(member.parameter.dtype))
        else:
            self._slice(member.weight).copy_(weight)

    def _read(self, tensors: list[Tensor], purpose: str) -> Tensor:
        if not self.joined:
            return wide(self._slice(tensors[0]))
        dtype = torch.float32 if tensors[0].element_size() < 4 else tensors[0].dtype
        buffer, views = self._parts(purpose, self._buffer(purpose, dtype))
        torch._foreach_copy_(views, tensors)
        return buffer

    def _buffer(self, purpose: str, dtype: torch.dtype) -> Tensor:
        return self.scratch.buffer(purpose, sum(self.sizes), dtype, self.device)

    def _parts(self, purpose: str, values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of numbers that lie end to end those of this chunk, and views of them in the shapes of its tensors."""
        known = self._views.get(purpose)
        if known is None or (values is not known[0] and values is not known[1]):
            used = values[: sum(self.sizes)]
            parts = zip(used.split(self.sizes), self._weights(), strict=True)  # type: ignore[no-untyped-call]
            known = self._views[purpose] = (values, used, [part.view(weight.shape) for part, weight in parts])
        return known[1:]

    # -- what is kept from step to step ------------------------------------------------------------------------------

    def keep(self, what: str, dtype: torch.dtype) -> Tensor:
        """What is kept under this name, made at its first use as zeros; of a sparse gradient for all rows."""
        kept = self.kept.get(what)
        if kept is None or kept.dtype != dtype:
            like = self._slice(self.members[0].weight)
            if kept is not None:
                self.kept[what] = kept.to(dtype)
            elif self.joined:
                self.kept[what] = torch.zeros(sum(self.sizes), dtype=dtype, device=self.device)
            else:
                self.kept[what] = torch.zeros_like(like, dtype=dtype)
        return self.kept[what]

    def of_rows(self, kept: Tensor) -> Tensor:
        """What is kept of the weights that take part: of a sparse gradient the touched rows, a copy."""
        rows = self.rows
        return kept if rows is None else kept.index_select(0, rows)

    def put_rows(self, kept: Tensor, values: Tensor) -> None:
        """Put back what :meth:`of_rows` gave."""
        if (rows := self.rows) is not None:
            kept.index_copy_(0, rows, values)

    def apart(self, values: Tensor) -> Sequence[Tensor]:
        """Numbers of this chunk, a tensor for each of its tensors."""
        return values.split(self.sizes) if self.joined else [values]  # type: ignore[no-untyped-call]

    def spread(self, values: float | Tensor, purpose: str = "spread") -> float | Tensor:
        """One number for each tensor, shape (number of tensors,), so that they broadcast to the chunk.

        One number for all needs no spreading, and is a plain number on a CPU.

        Args:
            values: The numbers.
            purpose: What they are for; the next call for the same purpose may overwrite the result.
        """
        if not isinstance(values, Tensor):
            return values
        if values.dim() == 0 or not self.joined:
            return host_number((values if values.dim() == 0 else values[0]).to(self.device))
        values = values.to(self.device, self.real_dtype)
        if self.device.type != "cpu":
            return torch.repeat_interleave(values, self.sizes_tensor, output_size=sum(self.sizes))
        spread, views = self._parts(purpose, self._buffer(purpose, self.real_dtype))
        torch._foreach_copy_(views, values.unbind())
        return spread

    @cached_property
    def sizes_tensor(self) -> Tensor:
        """:attr:`sizes` on the device, shape (number of tensors,)."""
        return torch.tensor(self.sizes, device=self.device)

    @cached_property
    def whole_sizes(self) -> int | Tensor:
        """The number of weights of each tensor, of which this chunk or this process may hold a part."""
        sizes = [max(1, member.parameter.numel()) for member in self.members]
        return torch.tensor(sizes, device=self.device) if self.joined else sizes[0]

    def index(self, name: str) -> int:
        """Where the parameter of this name stands among the members."""
        return [member.name for member in self.members].index(name)

    def weight_versions(self) -> list[int]:
        """By which it is seen whether somebody has changed the weights."""
        return [weight._version for weight in self._weights()]

    def broken_up(self) -> list[Chunk]:
        """A chunk for each tensor, with what was kept of it."""
        result = []
        for i, member in enumerate(self.members):
            alone = Chunk([member], self.scratch, count=self.count, versions=self.versions[i : i + 1])
            alone.mean_square = None if self.mean_square is None else self.mean_square[i : i + 1].clone()
            for what, values in self.kept.items():
                alone.kept[what] = self.apart(values)[i].clone().view(member.weight.shape)
            result.append(alone)
        return result


def kept_of(chunks: Sequence[Chunk], name: str, what: str) -> Tensor:
    """What is kept of one parameter from step to step, in its own shape: a copy.

    Args:
        chunks: The chunks that hold the parameter.
        name: The parameter.
        what: What is kept.
    """
    index = chunks[0].index(name)
    pieces = [chunk.apart(chunk.kept[what])[index] for chunk in chunks]
    return (pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces)).view(chunks[0].members[index].weight.shape)


def put_kept(chunks: Sequence[Chunk], name: str, what: str, value: Tensor) -> None:
    """Put back what :func:`kept_of` gave; not of a tensor whose shape has changed."""
    index = chunks[0].index(name)
    if value.shape == chunks[0].members[index].weight.shape:
        for chunk in chunks:
            target = chunk.apart(chunk.keep(what, value.dtype))[index]
            target.copy_(chunk._slice(value).reshape(target.shape))
