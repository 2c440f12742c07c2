"""Group lasso over what can be removed together: the weights of a group lie in several tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gcsr.core.group_blocks import GroupBlocks
from lightning_gcsr.core.group_slices import CoupledGroup
from lightning_gcsr.core.numerics import accumulation_dtype, wide
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.validation import argument_error, check_integer

__all__ = ["CoupledGroupLasso"]


@dataclass(frozen=True)
class _Layout:
    """Where the weights of the groups are in tensors that lie end to end.

    A *run* is a stretch of weights of one group: a row, if the groups are rows.
    """

    group_of_run: Tensor
    lengths: Tensor
    """Of the runs."""
    order: Tensor
    """The runs sorted by their group."""
    runs_of_group: Tensor
    """How many there are."""
    sizes: Tensor
    """The number of weights of each group."""
    factors: Tensor
    """What the norm of each group is multiplied by in the penalty, c_g."""
    tensors: tuple[tuple[int, int, int], ...]
    """For each tensor the number of its runs and their length, and its number of weights."""
    blocks: Optional[GroupBlocks]
    """Which groups become zero together; ``None`` where each does so alone."""

    def sums(self, values: Tensor) -> Tensor:
        """Numbers for each weight, added up over each group; always in the same order, so that all processes agree."""
        runs = torch.segment_reduce(values.reshape(-1), "sum", lengths=self.lengths, unsafe=True)
        groups: Tensor = torch.segment_reduce(runs[self.order], "sum", lengths=self.runs_of_group, unsafe=True)
        return groups[:-1]

    def spread(self, of_groups: Tensor, outside: float, like: Tensor) -> Tensor:
        """The number of its group for each weight, and ``outside`` for weights of no group; shaped like a tensor."""
        of_runs = torch.cat([of_groups, of_groups.new_full((1,), outside)])[self.group_of_run]
        size = like.numel()
        if like.device.type != "cpu":
            return torch.repeat_interleave(of_runs, self.lengths, output_size=size).view_as(like)
        result = of_runs.new_empty(size)
        start = run = 0
        for runs, length, weights in self.tensors:  # seven times as fast as `repeat_interleave`
            part = result[start : start + weights].view(runs, length)
            part.copy_(of_runs[run : run + runs, None].expand(runs, length))
            start, run = start + weights, run + runs
        return result.view_as(like)


class CoupledGroupLasso(Penalty):
    r"""The group lasso Ω(w) = Σ_g c_g ‖w_g‖ over groups that can be removed: whole units become zero, in any graph.

    A group g contains everything that makes one unit: a channel, in all layers that share it through additions,
    concatenations and norms; a hidden unit; a head of attention. w_g are its rows of weights, biases and norm entries.
    Gradient c_g · w_g/‖w_g‖ (0 for a zero group); proximal map: the block soft threshold,
    w_g · max(0, 1 − step·c_g/‖w_g‖). A group is zero in all of its tensors or in none, and
    :func:`~lightning_gcsr.shrink_units` removes one that is zero.

    With n_g weights in r_g rows, c_g = √(r_g · m), where m is the mean of n_g/r_g over all groups; c_g = √n_g if all
    rows are equally long. Initializations give a row about the same norm whatever its length, so with √n_g everywhere
    the layers with long rows, the deepest ones of a convolutional network, would lose their units first.

    A gate of scope ``"element"`` makes one decision for each group, by the sum over its weights, and
    ``target_sparsity`` is the fraction of zero groups at the end. ``include`` and ``exclude`` choose groups: a group
    takes part if all of its weights of layers do. Its biases and norms need not be named.

    With a ``block_size``, groups of a layer become zero together: Ω(w) = Σ_b c_b ‖w_b‖ over blocks b, with ‖w_b‖ and
    c_b the Euclidean norms of the ‖w_g‖ and the c_g of the block. The groups of each layer are sorted by their norm,
    and neighbours in this order form a block. Where the width is a multiple, no other way to form blocks has a smaller
    penalty. The proximal map sorts by ‖w_g‖ − step·c_g, and shrinks all groups of a block by one factor; where groups
    have steps of their own, that of the block follows from all of them.

    :class:`~lightning_gcsr.GradientCoherentRegularization` finds the groups itself, by running the module on
    ``example_input`` or on the module's ``example_input_array``. Otherwise use :func:`~lightning_gcsr.coupled_groups`.
    Weights may not be sharded; DDP is supported.

    Args:
        groups: The groups; ``None`` lets the callback find them.
        example_input: An input of the module, or a tuple of positional arguments, to find the groups with.
        block_size: How many units of a layer become zero together. Kernels compute channels in blocks, 8 at a time on
            most CPUs, and a width that is no multiple is often as slow as the next multiple. A head of attention of at
            least this width is a block of its own. Of a layer whose width is no multiple, the weakest units form a
            smaller block, so that a multiple is left as soon as one block is zero. Units form a block only with others
            of the same layers.

    Raises:
        ValueError: If ``groups`` is empty, or if ``block_size`` is less than 1.
        TypeError: If ``block_size`` is not an integer.

    Example:
        >>> from torch import nn
        >>> from lightning_gcsr import CoherentRegularizer, coupled_groups
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
        >>> penalty = CoupledGroupLasso(coupled_groups(net, torch.randn(1, 3)))
        >>> list(CoherentRegularizer(net, penalty, strength=0.1).parameters)
        ['0.weight', '0.bias']
    """

    coupled = True

    def __init__(
        self,
        groups: Optional[Sequence[CoupledGroup]] = None,
        *,
        example_input: Any = None,
        block_size: int = 1,
    ) -> None:
        if groups is not None and not groups:
            advice = "Each unit of the module must stay, as `shrink_units` says, or has frozen parameters."
            raise argument_error("groups", groups, "must not be empty", advice)
        check_integer("block_size", block_size, minimum=1)
        self.block_size = block_size
        self.groups: Optional[tuple[CoupledGroup, ...]] = None
        self.example_input = example_input
        self._blocks: Optional[GroupBlocks] = None
        self._layout: Optional[_Layout] = None
        if groups is not None:
            self._take(groups)

    @override
    def __repr__(self) -> str:
        parts = [] if self.groups is None else [f"<{len(self.groups)} groups>"]
        parts += [f"block_size={self.block_size}"] if self.block_size > 1 else []
        return f"CoupledGroupLasso({', '.join(parts)})"

    def over(self, groups: Sequence[CoupledGroup]) -> CoupledGroupLasso:
        """This penalty on these groups: a copy of the same class, in which what a subclass keeps is kept."""
        found = copy.copy(self)
        found._take(groups)
        return found

    def _take(self, groups: Sequence[CoupledGroup]) -> None:
        self.groups = tuple(groups)
        self._blocks = None if self.block_size == 1 else GroupBlocks.of(self.groups, self.block_size)

    @property
    @override
    def at_once(self) -> int:
        return 1 if self._blocks is None else self._blocks.largest

    def laid_out(self, tensors: Mapping[str, Tensor]) -> CoupledGroupLasso:
        """This penalty as one of a single tensor, in which these tensors lie end to end.

        Args:
            tensors: The tensors by name, in the order in which they lie; all that make a group are among them.
        """
        groups = self.groups or ()
        indices: dict[str, tuple[int, Tensor]] = {}
        for number, group in enumerate(groups):
            for part in group.slices:
                if part.role == "makes":
                    self._check_slice(part.name, part.dim, max(part.indices), tensors)
                    if part.name not in indices:
                        size = tensors[part.name].shape[part.dim]
                        indices[part.name] = part.dim, torch.full((size,), len(groups))
                    if indices[part.name][0] == part.dim:
                        indices[part.name][1][list(part.indices)] = number
        rows = torch.tensor([_rows(group, tensors) for group in groups])
        runs, lengths, of_tensors = [], [], []
        for name, tensor in tensors.items():
            dim, numbers = indices.get(name, (0, torch.full((1,), len(groups))))
            shape = tensor.shape if name in indices else (1, tensor.numel())
            runs.append(numbers.repeat(math.prod(shape[:dim])))
            length = math.prod(shape[dim + 1 :])
            lengths.append(torch.full_like(runs[-1], length))
            of_tensors.append((len(runs[-1]), length, tensor.numel()))
        found = copy.copy(self)
        device = next(iter(tensors.values())).device
        blocks = None if self._blocks is None else self._blocks.to(device)
        found._layout = _laid_out(torch.cat(runs), torch.cat(lengths), rows, tuple(of_tensors), blocks, device)
        return found

    @staticmethod
    def _check_slice(name: str, dim: int, index: int, tensors: Mapping[str, Tensor]) -> None:
        if name not in tensors:
            raise ValueError(
                f"The tensor {name!r} makes units of coupled groups and is not among those that are regularized. Leave"
                " out whole groups instead of some of their tensors."
            )
        shape = tuple(tensors[name].shape)
        if len(shape) <= dim or shape[dim] <= index:
            raise ValueError(
                f"{name!r} must have the shape that the groups were made for, got {shape}. Call `coupled_groups` again,"
                " on the module as it is now."
            )

    @property
    def _at(self) -> _Layout:
        if self._layout is None:
            raise ValueError(
                "The groups of CoupledGroupLasso lie in several tensors. Lay these out first, with `laid_out`."
            )
        return self._layout

    def _norms(self, weight: Tensor) -> Tensor:
        return self._at.sums(wide(weight).abs().square()).sqrt()

    def _over_blocks(self, distance: Tensor, *numbers: Tensor) -> Sequence[Tensor]:
        """:meth:`GroupBlocks.norms`; the numbers themselves where each group is a block alone."""
        blocks = self._at.blocks
        return numbers if blocks is None else blocks.norms(distance, *numbers)

    @override
    def value(self, weight: Tensor) -> Tensor:
        norms, factors = self._norms(weight), self._at.factors.to(weight.dtype.to_real())
        norms, factors, roots = self._over_blocks(norms, norms, factors, torch.ones_like(norms))
        return (norms * factors / roots.square()).sum()  # each block counts once, whatever the number of its groups

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        norms = self._norms(weight)
        norms, factors = self._over_blocks(norms, norms, self._at.factors.to(norms))
        divisors = torch.where(norms > 0, norms / factors, torch.inf)
        return weight / self._at.spread(divisors, torch.inf, weight)

    @override
    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        norms = self._norms(weight)
        thresholds = self._thresholds(step, norms)
        norms, thresholds = self._over_blocks(norms - thresholds, norms, thresholds)
        excess = norms - thresholds
        factors = torch.where(excess > 0, excess / norms, 0.0).to(weight.dtype.to_real())
        return (weight * self._at.spread(factors, 1.0, weight)).add_(0.0)  # which makes −0 a 0

    def _thresholds(self, step: float | Tensor, norms: Tensor) -> Tensor:
        """step·c_g. Where the weights of a group have steps of their own, the group has their mean."""
        if isinstance(step, Tensor):
            step = step.to(norms) if step.dim() == 0 else self._at.sums(step.to(norms)) / self._at.sizes
        return step * self._at.factors.to(norms)

    @override
    def unshrunk(self, weight: Tensor, step: Tensor, latent: Tensor) -> Tensor:
        before, norms = self._norms(latent), self._norms(weight)
        thresholds = self._thresholds(step, norms)
        replaced = ~self.units(self.prox(wide(latent), step).to(latent.dtype) == weight.to(latent.dtype))
        # In the blocks in which the weights were left, since those of the replaced weights may differ.
        norms, thresholds, follow = self._over_blocks(before - thresholds, norms, thresholds, replaced.to(norms))
        factors = torch.where(norms > 0, 1 + thresholds / norms, 1.0).to(weight.dtype.to_real())
        follows = weight * self._at.spread(factors, 1.0, weight)
        return torch.where(self._at.spread(follow, 0.0, weight) > 0, follows.to(latent.dtype), latent)

    @override
    def group_mean(self, values: Tensor) -> Tensor:
        return self._at.spread(self._at.sums(values) / self._at.sizes.to(values), 0.0, values)

    @override
    def signed(self, gradient: Tensor, compared: Tensor) -> Tensor:
        products = (gradient * compared.conj()).real if gradient.is_complex() else gradient * compared
        return self._at.spread(self._at.sums(products), -1.0, products)

    @override
    def units(self, holds: Tensor) -> Tensor:
        return self._at.sums(holds.float()) == self._at.sizes

    @override
    def whole_units(self, holds: Tensor) -> Tensor:
        return self._at.spread(self.units(holds).float(), 0.0, holds).bool()


def _rows(group: CoupledGroup, tensors: Mapping[str, Tensor]) -> int:
    """The number of rows of weights that make a group; its biases and entries of norms do not count."""
    return sum(len(part.indices) for part in group.slices if part.role == "makes" and tensors[part.name].dim() > 1)


def _laid_out(
    runs: Tensor,
    lengths: Tensor,
    rows: Tensor,
    tensors: tuple[tuple[int, int, int], ...],
    blocks: Optional[GroupBlocks],
    device: torch.device,
) -> _Layout:
    groups = len(rows)
    order = torch.argsort(runs, stable=True)
    sizes = torch.zeros(groups + 1, dtype=torch.long).index_add_(0, runs, lengths)[:-1]
    counts = torch.bincount(runs, minlength=groups + 1)
    rows = rows.clamp(min=1).double()
    factors = (rows * (sizes / rows).mean()).sqrt()
    factors = factors.to(device, accumulation_dtype(device))
    runs, lengths, order, counts, sizes = (part.to(device) for part in (runs, lengths, order, counts, sizes))
    return _Layout(runs, lengths, order, counts, sizes, factors, tensors, blocks)
