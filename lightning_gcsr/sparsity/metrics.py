"""Sparsity and compression ratio as torchmetrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Union

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.sparsity.computed_weights import counted_weights
from lightning_gcsr.sparsity.counting import zero_counts
from lightning_gcsr.storage.tensor_memory import distinct_tensors
from lightning_gcsr.validation import argument_error, check_finite_number

__all__ = ["CompressionRatio", "Sparsity"]

Weights = Union[nn.Module, Tensor, Iterable[Tensor]]


def _tensors(weights: Weights) -> list[Tensor]:
    if isinstance(weights, nn.Module):
        tensors = list(counted_weights(weights, select_parameters(weights)).trained.values())
    elif isinstance(weights, Tensor):
        tensors = [weights]
    else:
        tensors = list(weights) if isinstance(weights, Iterable) else [weights]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise argument_error("weights", weights, "must be a module, a tensor or an iterable of tensors", kind=TypeError)
    return list(distinct_tensors((str(i), tensor) for i, tensor in enumerate(tensors)).values())


class _ZeroCount(Metric):
    """Counts weights and the zeros among them; a subclass computes its value from the two numbers."""

    full_state_update = False
    is_differentiable = False
    zeros: Tensor
    total: Tensor

    def __init__(self, zero_threshold: float = 0.0, **kwargs: Any) -> None:
        check_finite_number("zero_threshold", zero_threshold, minimum=0.0)
        super().__init__(**kwargs)
        self.zero_threshold = zero_threshold
        self.add_state("zeros", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, weights: Weights) -> None:
        """Add the weights of a module, a tensor or several tensors to the count.

        Args:
            weights: For a module, the weights that are regularized by default are counted: trained parameters with two
                or more dimensions outside norm layers; frozen ones only if nothing is trained. Masks of
                :mod:`torch.nn.utils.prune` and parametrizations are applied. To count all parameters, pass
                ``module.parameters()``.
        """
        tensors = _tensors(weights)
        for tensor, (_, zeros) in zip(tensors, zero_counts(tensors, self.zero_threshold), strict=True):
            self.zeros += zeros.to(self.zeros.device)
            self.total += tensor.numel()


class Sparsity(_ZeroCount):
    r"""The share of weights with \|w\| ≤ ``zero_threshold``, in [0, 1]; 0 if nothing was counted.

    Several updates add up, and so do the counts of all processes. Tied weights count once within one update.

    Args:
        zero_threshold: The magnitude up to which a weight counts as zero.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``zero_threshold`` is negative or not finite.

    Example:
        >>> import torch
        >>> sparsity = Sparsity()
        >>> sparsity.update(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        >>> sparsity.compute()
        tensor(0.7500)
    """

    @override
    def compute(self) -> Tensor:
        return self.zeros / self.total.clamp_min(1)


class CompressionRatio(_ZeroCount):
    r"""Weights ÷ weights with \|w\| > ``zero_threshold``: at least 1, and infinite if all are zero.

    The ratio counts weights, not bytes; for the bytes see :func:`~lightning_gcsr.module_bytes`.

    Args:
        zero_threshold: The magnitude up to which a weight counts as zero.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``zero_threshold`` is negative or not finite.

    Example:
        >>> import torch
        >>> ratio = CompressionRatio()
        >>> ratio.update([torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(4)])
        >>> ratio.compute()
        tensor(8.)
    """

    higher_is_better = True

    @override
    def compute(self) -> Tensor:
        # Nothing counted is not compressed: 0/0 must read 1, and n/0 infinity.
        return torch.where(self.total == 0, 1.0, self.total / (self.total - self.zeros))
