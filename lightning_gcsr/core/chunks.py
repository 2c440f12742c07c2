"""Chunks: the weights of a step in portions of a convenient size, however they are spread over tensors.

What costs time is the number of calls into torch, and on a CPU every pass over memory that is not in the cache. So a
large tensor is cut up, and small tensors are handled together, by torch's multi-tensor operations on a CPU and
laid end to end in one buffer elsewhere. What a step knows of its weights from earlier steps, such as a running average,
lies in the same portions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gcsr.core.numerics import host_number, wide
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.sharding import local_part

__all__ = ["Chunk", "Member", "cut", "gradients_of", "kept_of", "put_kept"]

CPU_SIZE = 1 << 18
"""The number of weights in a chunk on a CPU: half a dozen such tensors fit its cache."""
SIZE_ELSEWHERE = 1 << 24
"""On a GPU, where there should be few calls: a buffer of such a chunk takes 64 MB."""


@dataclass
class Member:
    """One regularized parameter that takes part in a step."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any]
    """Its parameter group in the optimizer."""
    relative: float
    """What the strength is multiplied by for this parameter."""

    @property
    def gradient(self) -> Tensor:
        """What this process holds of the gradient; of a sparse one the values of the touched rows."""
        gradient = self.parameter.grad
        assert gradient is not None
        return gradient.values() if gradient.is_sparse else local_part(gradient)

    @property
    def size(self) -> int:
        """The number of weights that take part, over all processes."""
        return self.parameter.numel() if self.rows is None else self.gradient.numel()

    @property
    def rows(self) -> Tensor | None:
        """The rows that a sparse gradient touches; ``None`` for a dense one."""
        gradient = self.parameter.grad
        return gradient.indices()[0] if gradient is not None and gradient.is_sparse else None


@dataclass
class Chunk:
    """Weights that are treated at once: several whole tensors, or a slice of one tensor.

    Its lists of tensors (gradients, weights, and what is kept of them from step to step) have an entry for each tensor
    on a CPU, and elsewhere one entry in which all tensors lie end to end.
    """

    members: list[Member]
    """The parameters, which have always had a gradient in the same steps."""
    elementwise: bool
    """Whether the weights may be joined and cut at will."""
    span: tuple[int, int] | None = None
    """First index and number of indices along dimension 0 of the only tensor, where it is cut up."""
    flat: bool = False
    """Whether the span is one of the flattened tensor."""
    count: Tensor | None = None
    """The number of finite gradients so far, 0-dim, on the device."""
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    """What is kept from step to step: ``average``, ``latent``, ``threshold``, and until the step is over ``gate``."""
    mean_square: Tensor | None = None
    """The running mean square of each tensor's loss gradient, shape (number of tensors,)."""
    opened: Tensor | None = None
    """Until the step is over, whether each tensor is open, where one decision covers a tensor or more."""
    versions: list[int] = field(default_factory=list)
    """The versions of the weights as they were left, by which a replacement is noticed."""
    _views: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.members[0].parameter.device

    @property
    def real_dtype(self) -> torch.dtype:
        """The real dtype, of at least 32 bits, that belongs to the weights."""
        dtype = self.members[0].parameter.dtype.to_real()
        return torch.float32 if dtype.itemsize < 4 else dtype

    @property
    def joined(self) -> bool:
        """Whether the tensors are laid end to end."""
        return self.device.type != "cpu" and len(self.members) > 1

    def sizes(self) -> list[int]:
        """The number of weights of each tensor in this chunk."""
        return [view.numel() for view in self.whole_weights()]

    def slices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of whole tensors, one a member, the parts that are in this chunk: views."""
        if self.span is None:
            return list(tensors)
        [tensor] = tensors
        return [(tensor.view(-1) if self.flat else tensor).narrow(0, *self.span)]

    def whole_weights(self) -> list[Tensor]:
        """The weights themselves, views; all rows, even of a sparse gradient."""
        return self.slices([local_part(member.parameter.detach()) for member in self.members])

    def weight_versions(self) -> list[int]:
        """By which it is seen whether somebody has changed the weights."""
        return [local_part(member.parameter)._version for member in self.members]

    def weight_views(self) -> list[Tensor]:
        """The weights themselves, views; of a sparse gradient the touched rows, a copy."""
        rows = self.members[0].rows
        if rows is not None:
            return [self.members[0].parameter.detach().index_select(0, rows)]
        return self.whole_weights()

    def gradient_views(self) -> list[Tensor]:
        """The gradients as the optimizer will see them, views: with loss scale."""
        return self.slices([member.gradient for member in self.members])

    def read(self, tensors: list[Tensor], purpose: str) -> list[Tensor]:
        """The numbers of these views in a precision fit for sums; of joined tensors a copy in one buffer.

        Args:
            tensors: Views, one for each member.
            purpose: Two buffers that are in use at one time need two names.
        """
        if not self.joined:
            return [wide(tensor) for tensor in tensors] if tensors[0].element_size() < 4 else tensors
        dtype = torch.float32 if tensors[0].element_size() < 4 else tensors[0].dtype
        buffer = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=self.device)
        torch._foreach_copy_(self.parts(buffer, tensors), tensors)
        return [buffer]

    def write(self, values: list[Tensor], tensors: list[Tensor]) -> None:
        """Put numbers that :meth:`read` gave, and that have changed since, back where they came from."""
        if values is tensors:
            return
        torch._foreach_copy_(tensors, self.parts(values[0], tensors) if self.joined else values)

    def write_weights(self, values: list[Tensor]) -> None:
        """Replace the weights; of a sparse gradient, the touched rows."""
        member = self.members[0]
        if (rows := member.rows) is not None:
            member.parameter.detach().index_copy_(0, rows, values[0].to(member.parameter.dtype))
            return
        self.write(values, self.weight_views())

    @staticmethod
    def parts(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a buffer in which tensors shaped like these lie end to end."""
        parts = buffer.split([tensor.numel() for tensor in like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

    def apart(self, values: list[Tensor]) -> list[Tensor]:
        """An entry for each tensor, where all lie end to end."""
        return list(values[0].split(self.sizes())) if self.joined else values

    def keep(self, what: str, wide_real: bool = False) -> list[Tensor]:
        """What is kept under this name, made at its first use as zeros in the layout of this chunk.

        Args:
            what: The name.
            wide_real: Whether real numbers of at least 32 bits are kept, even of 16-bit or complex weights.
        """
        if what not in self.kept:
            like = self.whole_weights()
            dtype = self.real_dtype if wide_real else like[0].dtype
            if self.joined:
                total = sum(view.numel() for view in like)
                self.kept[what] = [torch.zeros(total, dtype=dtype, device=self.device)]
            else:
                self.kept[what] = [torch.zeros_like(view, dtype=dtype) for view in like]
        return self.kept[what]

    def keep_like(self, values: list[Tensor], what: str) -> list[Tensor]:
        """What is kept under this name, in the precision of these values."""
        if what not in self.kept or self.kept[what][0].dtype != values[0].dtype:
            kept = self.kept.get(what) or [torch.zeros_like(value) for value in values]
            self.kept[what] = [tensor.to(values[0].dtype) for tensor in kept]
        return self.kept[what]

    def of_rows(self, kept: list[Tensor]) -> list[Tensor]:
        """What is kept of the weights that take part: of a sparse gradient the touched rows, a copy."""
        rows = self.members[0].rows
        return kept if rows is None else [kept[0].index_select(0, rows)]

    def put_rows(self, kept: list[Tensor], values: list[Tensor]) -> None:
        """Put back what :meth:`of_rows` gave."""
        rows = self.members[0].rows
        if rows is not None:
            kept[0].index_copy_(0, rows, values[0])

    def numbers(self, values: Tensor) -> list[float] | list[Tensor]:
        """One number for each tensor, shape (number of tensors,), in a form that multi-tensor operations take.

        On a CPU as plain numbers; elsewhere as tensors that broadcast to the entries of this chunk.
        """
        if values.device.type == "cpu" and type(values) is Tensor:
            return [host_number(value) for value in values.unbind()]  # type: ignore[misc]
        values = values.to(self.device, torch.float32)
        if not self.joined:
            return list(values.unbind())
        if "sizes" not in self._views:
            self._views["sizes"] = [torch.tensor(self.sizes(), device=self.device)]
        return [torch.repeat_interleave(values, self._views["sizes"][0], output_size=sum(self.sizes()))]

    def broken_up(self) -> list[Chunk]:
        """A chunk for each tensor, with what was kept of it."""
        result = []
        for i, member in enumerate(self.members):
            alone = Chunk([member], self.elementwise, count=None if self.count is None else self.count.clone())
            alone.mean_square = None if self.mean_square is None else self.mean_square[i : i + 1].clone()
            whole = local_part(member.parameter.detach())
            for what, values in self.kept.items():
                part = self.apart(values)[i]
                alone.kept[what] = [part.clone().view(whole.shape) if self.joined else part]
            result.append(alone)
        return result


def cut(members: Iterable[Member], penalty: Penalty) -> list[Chunk]:
    """The chunks in which these parameters are treated.

    Args:
        members: The parameters, which have a gradient in this step.
        penalty: The penalty, which says whether weights may be joined and cut.
    """
    chunks: list[Chunk] = []
    small: dict[object, list[Member]] = {}
    for member in members:
        weight, gradient = local_part(member.parameter.detach()), member.gradient
        limit = CPU_SIZE if weight.device.type == "cpu" else SIZE_ELSEWHERE
        if member.rows is not None:
            chunks.append(Chunk([member], penalty.elementwise))
        elif penalty.elementwise and 2 * weight.numel() <= limit:
            key = (id(member.group), member.relative, weight.dtype, gradient.dtype, weight.device)
            small.setdefault(key, []).append(member)
        else:
            chunks += _slices(member, weight, gradient, penalty, limit)
    for alike in small.values():
        limit = CPU_SIZE if alike[0].parameter.device.type == "cpu" else SIZE_ELSEWHERE
        chunks.append(Chunk([], True))
        for member in alike:
            if sum(m.gradient.numel() for m in chunks[-1].members) >= limit:
                chunks.append(Chunk([], True))
            chunks[-1].members.append(member)
    return chunks


def _slices(member: Member, weight: Tensor, gradient: Tensor, penalty: Penalty, limit: int) -> list[Chunk]:
    """The chunks of one tensor that is not small."""
    if weight.numel() <= limit or not penalty.splits_along(0, weight.dim()):
        return [Chunk([member], penalty.elementwise)]
    row = weight.numel() // len(weight)
    flat = row > limit and penalty.elementwise and weight.is_contiguous() and gradient.is_contiguous()
    length, at_once = (weight.numel(), limit) if flat else (len(weight), max(1, limit // row))
    return [
        Chunk([member], penalty.elementwise, (start, min(at_once, length - start)), flat)
        for start in range(0, length, at_once)
    ]


def gradients_of(chunk: Chunk, loss_scale: float | Tensor) -> list[Tensor]:
    """The loss gradients of this step, without loss scale, as :meth:`Chunk.read` gives them."""
    gradients = chunk.read(chunk.gradient_views(), "gradient")
    if isinstance(loss_scale, Tensor):
        return list(torch._foreach_div(gradients, loss_scale.to(gradients[0])))
    return list(torch._foreach_div(gradients, loss_scale)) if loss_scale != 1 else gradients


def kept_of(chunks: Sequence[Chunk], name: str, what: str) -> Tensor:
    """What is kept of one parameter from step to step, in its own shape: a copy.

    Args:
        chunks: The chunks that hold the parameter.
        name: The parameter.
        what: What is kept.
    """
    index, whole = _place(chunks[0], name)
    pieces = [chunk.apart(chunk.kept[what])[index] for chunk in chunks]
    return (pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces)).view(whole.shape)


def put_kept(chunks: Sequence[Chunk], name: str, what: str, value: Tensor) -> None:
    """Put back what :func:`kept_of` gave."""
    index, whole = _place(chunks[0], name)
    if value.shape != whole.shape:
        return
    for chunk in chunks:
        real = what == "threshold"
        kept = chunk.keep(what, wide_real=real)
        if kept[0].dtype != value.dtype:
            kept = chunk.kept[what] = [tensor.to(value.dtype) for tensor in kept]
        [part] = chunk.slices([value]) if chunk.span is not None else [value]
        target = chunk.apart(kept)[index]
        target.copy_(part.reshape(target.shape))


def _place(chunk: Chunk, name: str) -> tuple[int, Tensor]:
    index = [member.name for member in chunk.members].index(name)
    return index, local_part(chunk.members[index].parameter.detach())
