"""Blocks: the weights of a step in portions that stay in the processor's cache, however they are spread over tensors.

What is done with a weight takes a dozen elementwise operations. Over whole tensors each of them would fetch everything
from memory again, and over a thousand small ones the calls would take longer than the work. So a large tensor is cut
up, and small ones of one shape are laid side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_gcsr.core.gradient_average import GradientMemory, remember
from lightning_gcsr.core.optimizers import proximal_step_size
from lightning_gcsr.core.penalties import Penalty, wide
from lightning_gcsr.core.terms import Term

__all__ = ["Block", "Portion", "blocks_of"]

SIZE = 1 << 18
"""The number of weights in a block on a CPU: half a dozen such tensors fit its cache, and calls cost little."""
SIZE_ELSEWHERE = 1 << 22
"""On a GPU, where there should be few calls, which still take little memory."""


class Block:
    """A run of weights that is treated at once: a part of one tensor, or several small tensors of one shape.

    Args:
        positions: Where the tensors stand in the list of the step's terms.
        term: The first of these terms; strength, parameter group, loss scale, dtype and device are those of all.
        gradients: What of their gradients is in this block, views.
        weights: What of their weights, views.
        memories: What of that which is remembered of their gradients, views; empty where nothing is.
    """

    def __init__(
        self,
        positions: Sequence[int],
        term: Term,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        memories: Sequence[Tensor] = (),
    ) -> None:
        self.positions = positions
        self.term = term
        self.gradients = gradients
        self.weights = weights
        self.memories = memories

    @property
    def rows(self) -> int:
        """The number of tensors that have a part in this block; numbers of several are laid out in a row for each."""
        return len(self.positions)

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Of values for all terms of the step, 0-dim tensors, those for this block, so that they broadcast to it."""
        if self.rows == 1:
            return values[self.positions[0]]
        return torch.stack([values[position] for position in self.positions]).unsqueeze(1)

    def inject(self, penalty_gradient: Tensor, factor: Tensor, strength: float) -> None:
        """Add λ·factor·r to the gradients, in place; the factor holds gate and loss scale."""
        strength *= self.term.relative
        [first, *others] = self.gradients
        if not others and first.dtype == penalty_gradient.dtype == factor.dtype:
            first.addcmul_(penalty_gradient, factor, value=strength)
            return
        torch._foreach_add_(list(self.gradients), _apart(penalty_gradient * factor, self.gradients), alpha=strength)

    def shrink(self, penalty: Penalty, gate: Tensor, strength: float) -> None:
        """Replace the weights by their proximal map where the gate, 0 or 1 in any dtype, is open."""
        term = self.term
        weights = self.weights if term.rows is None else [term.weight]  # what a sparse gradient touches is a copy
        weight = wide(_together(weights))
        shrunk = penalty.prox(weight, proximal_step_size(term.group, strength * term.relative))
        # Between a and b, with a weight of 0 or 1, lerp gives one of the two in every bit; torch.where takes
        # several times as long on a CPU.
        if weight is self.weights[0]:
            weight.lerp_(shrunk, gate.to(weight.dtype))
            return
        result = torch.lerp(weight, shrunk, gate.to(weight.dtype))
        if term.rows is None:
            torch._foreach_copy_(list(weights), _apart(result, weights))
        else:
            term.parameter.detach().index_copy_(0, term.rows, result.to(term.parameter.dtype))


class Portion:
    """The numbers of a block as they are now, made when they are asked for, in a precision fit for sums."""

    def __init__(self, block: Block, penalty: Penalty) -> None:
        self.block = block
        self._penalty = penalty

    @cached_property
    def loss_gradient(self) -> Tensor:
        """This step's gradient g, without loss scale."""
        gradient = wide(_together(self.block.gradients))
        term = self.block.term
        return gradient / term.loss_scale if term.is_scaled else gradient

    @cached_property
    def penalty_gradient(self) -> Tensor:
        """The gradient r of the penalty at the weights, not to be changed, and not times the relative strength."""
        return self._penalty.gradient(wide(_together(self.block.weights)))

    @cached_property
    def memory(self) -> Tensor:
        """What is remembered of the gradients."""
        return _together(self.block.memories)

    def remember(self, share: Tensor) -> None:
        """Take this step's gradient into the memory, where it counts so much: a share in the memory's dtype."""
        remember(self.memory, self.loss_gradient, share)
        if self.block.rows > 1:
            torch._foreach_copy_(list(self.block.memories), _apart(self.memory, self.block.memories))


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """The only tensor itself, or of several of one shape a copy with a row for each."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).flatten(1)


def _apart(tensor: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The other way round: the rows, in the shape of the tensors that they were made of."""
    return [tensor] if len(like) == 1 else list(tensor.view(len(like), *like[0].shape).unbind())


def blocks_of(terms: Sequence[Term], penalty: Penalty, memory: GradientMemory | None) -> list[Block]:
    """The blocks that all the terms of a step consist of.

    Args:
        terms: The terms.
        penalty: The penalty, which says how weights can be cut and joined.
        memory: What remembers their gradients, if anything does.
    """
    blocks: list[Block] = []
    alike: dict[object, list[tuple[int, list[Tensor]]]] = {}
    for position, term in enumerate(terms):
        tensors = [term.gradient, term.weight]
        if memory is not None:
            tensors.append(memory.recall(term.name, wide(term.gradient)))
        size, limit = term.gradient.numel(), _limit(term)
        if 2 * size <= limit and term.rows is None and penalty.elementwise:
            gradient, weight = tensors[:2]
            key = (gradient.shape, id(term.group), term.relative, gradient.dtype, weight.dtype, gradient.device)
            alike.setdefault(key, []).append((position, tensors))
            continue
        flat = _flattened(tensors) if penalty.elementwise and term.rows is None else None
        if flat is None and (
            size <= limit or term.rows is not None or not penalty.splits_along(0, term.gradient.dim())
        ):
            blocks.append(Block([position], term, *([tensor] for tensor in tensors)))
            continue
        tensors = flat or tensors
        at_once = max(1, limit * len(tensors[0]) // size)
        for parts in zip(*(torch.split(tensor, at_once) for tensor in tensors), strict=True):
            blocks.append(Block([position], term, *([part] for part in parts)))
    for members in alike.values():
        first = terms[members[0][0]]
        at_once = max(1, _limit(first) // max(1, first.gradient.numel()))
        for start in range(0, len(members), at_once):
            positions, tensors_of = zip(*members[start : start + at_once], strict=True)
            blocks.append(Block(positions, first, *zip(*tensors_of, strict=True)))
    return blocks


def _limit(term: Term) -> int:
    return SIZE if term.gradient.device.type == "cpu" else SIZE_ELSEWHERE


def _flattened(tensors: list[Tensor]) -> list[Tensor] | None:
    """The tensors as vectors over the same memory, if their numbers lie there without gaps and in one order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1) for tensor in tensors]
    if all(tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors):
        return [tensor.permute(0, 2, 3, 1).view(-1) for tensor in tensors]
    return None
