"""Pruning by magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import nn

from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.core.sharding import local_part
from lightning_gcsr.sparsity.counting import zero_counts
from lightning_gcsr.storage.tensor_memory import distinct_tensors
from lightning_gcsr.validation import check_finite_number

__all__ = ["prune_small"]


@torch.no_grad()
def prune_small(
    module: nn.Module,
    threshold: float,
    include: Optional[Sequence[str]] = None,
    exclude: Optional[Sequence[str]] = None,
) -> int:
    r"""Set weights with \|w\| ≤ ``threshold`` to zero, in place.

    By default these are the weights that penalties reach: parameters with two or more dimensions outside norm layers. A
    complex weight is judged by its absolute value; tied weights count once; NaN stays NaN, and −0.0 becomes 0.0.
    :func:`~lightning_gcsr.threshold_curve` finds a threshold that costs nothing.

    Synchronizes with the host. If parameters are sharded over processes (``DTensor``), all processes must call this
    function.

    Args:
        module: The module.
        threshold: The magnitude up to which a weight is set to zero, ≥ 0.
        include: Regular expressions of the parameters to prune, instead of the weights.
        exclude: Regular expressions of parameters to leave out.

    Returns:
        The number of weights that became zero.

    Raises:
        ValueError: If ``threshold`` is negative or not finite, or a pattern matches nothing.
        TypeError: If an argument has the wrong type.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.001, -0.2, 0.0]]))
        >>> prune_small(layer, 0.01)
        1
        >>> layer.weight.data
        tensor([[ 0.0000, -0.2000,  0.0000]])
    """
    check_finite_number("threshold", threshold, minimum=0.0)
    parameters = list(distinct_tensors(select_parameters(module, include, exclude).items()).values())
    counts = zero_counts(parameters, threshold)
    for parameter in parameters:
        weight = local_part(parameter.detach())
        weight.masked_fill_(weight.abs() <= float(threshold), 0)
    return sum(int(near - zeros) for zeros, near in counts)
