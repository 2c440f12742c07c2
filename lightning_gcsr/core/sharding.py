"""Sharded parameters: exact sums over all processes where each of them holds a part of the weights.

FSDP2 and tensor parallelism turn parameters into ``DTensor``s. Everything elementwise is done on the part that a
process holds; only sums need the others, and all sums of a step are added up in one collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_AVAILABLE = dist.is_available()
if _AVAILABLE:
    from torch.distributed.tensor import DTensor, Replicate

__all__ = [
    "is_sharded",
    "local_part",
    "replication_factors",
    "sharded_dims",
    "sharded_like",
    "spread_like",
    "sum_over_processes",
    "sum_over_weights",
    "whole_gradient",
    "whole_sums",
    "whole_tensor",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a ``DTensor``, spread over the processes of a mesh (it may be replicated there).

    Example:
        >>> import torch
        >>> is_sharded(torch.ones(2))
        False
    """
    return _AVAILABLE and isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor: of a plain tensor the tensor itself. A change in place changes it."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def sharded_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which each process holds the part that belongs to its part of the parameter."""
    if not is_sharded(parameter):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor in the shape of the parameter, spread over processes as the parameter is.

    A plain tensor must be the same on all processes. All of them must call this.

    Example:
        >>> import torch
        >>> spread_like(torch.tensor([1.0, 2.0]), torch.zeros(2))
        tensor([1., 2.])
    """
    if not is_sharded(parameter):
        return whole_tensor(tensor)
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    if not is_sharded(tensor) or tensor.device_mesh != mesh:  # type: ignore[attr-defined]
        everywhere = [Replicate()] * mesh.ndim
        tensor = DTensor.from_local(whole_tensor(tensor).to(parameter.device), mesh, everywhere, run_check=False)
    spread: Tensor = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    return spread


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, for which all processes must call this; of a plain tensor the tensor itself."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole


def _cuts(tensor: Tensor) -> list[tuple[Any, int]]:
    """Placement and number of processes along each dimension of the mesh over which the tensor is cut up."""
    if not is_sharded(tensor):
        return []
    placements: Sequence[Any] = tensor.placements  # type: ignore[attr-defined]
    sizes: Sequence[int] = tensor.device_mesh.shape  # type: ignore[attr-defined]
    return [
        (placement, size) for placement, size in zip(placements, sizes, strict=True) if not placement.is_replicate()
    ]


def sharded_dims(tensor: Tensor) -> list[int]:
    """The dimensions of the tensor that are cut up; none for a plain tensor."""
    return [placement.dim for placement, _ in _cuts(tensor)]


def replication_factors(tensors: Iterable[Tensor]) -> list[float]:
    """What the sum over each local part must be multiplied by, so that adding up over all processes gives the whole.

    That is one over the number of processes that hold the same part, on a mesh of any shape; a plain tensor beside
    sharded ones lies on every process. Where no tensor is sharded nothing is added up, and every factor is 1.

    Example:
        >>> import torch
        >>> replication_factors([torch.ones(2), torch.ones(3)])
        [1.0, 1.0]
    """
    tensors = list(tensors)
    if not any(map(is_sharded, tensors)):
        return [1.0] * len(tensors)
    result = []
    for tensor in tensors:
        holders = dist.get_world_size()
        for _, size in _cuts(tensor):
            holders //= size
        result.append(1 / holders)
    return result


def sum_over_processes(sums: Tensor) -> Tensor:
    """Add these numbers up over all processes, in place, in one collective that all of them must call.

    The result is the same on all of them to the last bit, so that decisions which rest on it cannot differ.
    """
    dist.all_reduce(sums)
    return sums


def whole_sums(sums: Tensor, replication: Sequence[float]) -> Tensor:
    """The sums over n whole parameters, shape (..., n), from those over what each process holds; one collective.

    Args:
        sums: The sums over the local parts.
        replication: What each counts for, see :func:`replication_factors`.
    """
    parts = zip(sums.unbind(-1), replication, strict=True)
    return sum_over_processes(torch.stack([part * factor for part, factor in parts], dim=-1))


def whole_gradient(parameter: Tensor) -> Tensor:
    """The gradient of a sharded parameter, placed as the parameter is.

    A replicated parameter that met a sharded input has a gradient of summands, one on each process. What is added to
    such a part is added once for each process, so the summands are added up first.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return gradient


@torch.no_grad()
def sum_over_weights(parameters: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    """A sum over each whole parameter, from what the function gives for the part that lies here; shape (n,).

    Where parameters are sharded, all processes must call this: it adds up.

    Example:
        >>> sum_over_weights({"weight": torch.ones(2, 2)}, torch.sum)
        tensor([4.])
    """
    tensors = list(parameters.values())
    values = [function(local_part(tensor.detach())) for tensor in tensors]
    if not values:
        return torch.zeros(0)
    dtype = values[0].dtype if values[0].is_floating_point() else torch.float64
    parts = zip(values, replication_factors(tensors), strict=True)
    sums = torch.stack([value.to(values[0].device, dtype) * factor for value, factor in parts])
    return sum_over_processes(sums) if any(map(is_sharded, tensors)) else sums
