"""Exact counts of the zeros in tensors, and the bytes that the tensors take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gcsr.core.sharding import is_sharded, local_part, replication_factors, sum_over_processes
from lightning_gcsr.sparsity.computed_weights import computed_weights
from lightning_gcsr.storage.encodings import StoredBytes, stored_bytes
from lightning_gcsr.storage.tensor_memory import distinct_tensors
from lightning_gcsr.validation import argument_error, check_finite_number

__all__ = ["TensorCount", "count_tensors", "countable", "module_bytes", "near_and_exact_zeros", "zero_counts"]


@dataclass(frozen=True)
class TensorCount:
    """The counts of one tensor."""

    name: str
    shape: tuple[int, ...]
    value_bytes: int
    zeros: int
    """Entries that are exactly zero."""
    near_zeros: int
    r"""Entries with \|w\| ≤ threshold, the zeros among them."""

    @property
    def entries(self) -> int:
        """The number of entries."""
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> StoredBytes:
        """The bytes in each encoding, once the near zeros are zeros."""
        return stored_bytes(self.shape, self.entries - self.near_zeros, self.value_bytes)

    @property
    def sparsity(self) -> float:
        """The sparsity: near zeros ÷ entries, in [0, 1]; 0 for an empty tensor."""
        return self.near_zeros / max(1, self.entries)


@torch.no_grad()
def count_tensors(tensors: Mapping[str, Tensor], zero_threshold: float = 0.0) -> list[TensorCount]:
    """Count the zeros and near zeros of each tensor; tied tensors once, under the first name.

    A tensor ``NAME_orig`` that comes with a ``NAME_mask``, as in the state dict of a module that
    :mod:`torch.nn.utils.prune` has pruned, is counted as what the module computes with: ``NAME``, their product.

    Synchronizes with the host once for each device. If tensors are sharded over processes (``DTensor``), all processes
    must call this function.

    Args:
        tensors: The tensors by name, on any device, of any dtype. NaN is not zero, −0.0 is.
        zero_threshold: The magnitude up to which an entry counts as near zero.

    Raises:
        TypeError: If ``tensors`` is not a mapping of names to tensors.
        ValueError: If ``zero_threshold`` is negative or not finite.

    Example:
        >>> import torch
        >>> [count] = count_tensors({"weight": torch.tensor([[0.0, 1e-5, 0.7]])}, zero_threshold=1e-3)
        >>> count.zeros, count.near_zeros, count.bytes.best_encoding
        (1, 2, 'bitmask')
    """
    check_finite_number("zero_threshold", zero_threshold, minimum=0.0)
    if isinstance(tensors, nn.Module):
        kind, advice = type(tensors).__name__, "Pass its state_dict(), or give the module to `Sparsity`."
        raise TypeError(f"`tensors` must be a mapping of names to tensors, got a module, {kind}. {advice}")
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        advice = "Pass a state dict, or a dict of tensors."
        raise argument_error("tensors", tensors, "must be a mapping of names to tensors", advice, TypeError)
    distinct = distinct_tensors(_masked(tensors).items())
    counts = _to_host(zero_counts(list(distinct.values()), zero_threshold))
    return [
        TensorCount(name, tuple(tensor.shape), local_part(tensor).element_size(), zeros, near)
        for (name, tensor), (zeros, near) in zip(distinct.items(), counts, strict=True)
    ]


def _masked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with masked ones in place of originals and masks of :mod:`torch.nn.utils.prune`."""
    masks = {name: f"{name.removesuffix('_orig')}_mask" for name in tensors if name.endswith("_orig")}
    masks = {name: mask for name, mask in masks.items() if mask in tensors}
    if not masks:
        return dict(tensors)
    return {
        name.removesuffix("_orig") if name in masks else name: tensor * tensors[masks[name]]
        if name in masks
        else tensor
        for name, tensor in tensors.items()
        if name not in masks.values()
    }


def zero_counts(tensors: Sequence[Tensor], zero_threshold: float = 0.0) -> list[Tensor]:
    """The number of exact zeros and of near zeros of each whole tensor: (2,) integer tensors, on the devices.

    Tensors are counted as they are: of a module, pass the :func:`~lightning_gcsr.sparsity.computed_weights`. If tensors
    are sharded over processes (``DTensor``), all processes must call this function.
    """
    counts = [near_and_exact_zeros(local_part(tensor.detach()), zero_threshold) for tensor in tensors]
    if not any(map(is_sharded, tensors)):
        return counts
    holders = [round(1 / share) for share in replication_factors(tensors)]  # how many processes count the same part
    table = sum_over_processes(torch.stack([count.to(counts[0].device) for count in counts]))
    return [count // number for count, number in zip(table, holders, strict=True)]


def near_and_exact_zeros(tensor: Tensor, zero_threshold: float = 0.0) -> Tensor:
    r"""The number of exact zeros and of entries with \|w\| ≤ threshold: a (2,) integer tensor on the device.

    Example:
        >>> import torch
        >>> near_and_exact_zeros(torch.tensor([0.0, -0.2, 1.0]), 0.5)
        tensor([1, 2])
    """
    zero_threshold = float(zero_threshold)  # an integer would wrap around among unsigned ones
    tensor = countable(tensor)
    zeros = tensor.numel() - torch.count_nonzero(tensor)
    if zero_threshold == 0:
        near = zeros
    elif tensor.is_complex():
        near = torch.count_nonzero(tensor.abs() <= zero_threshold)
    else:  # integers and booleans have no magnitude, or not each of them
        near = torch.count_nonzero((tensor >= -zero_threshold) & (tensor <= zero_threshold))
    return torch.stack([zeros, near])


def countable(tensor: Tensor) -> Tensor:
    """The tensor, or if torch cannot count in its type, one with the same zeros and magnitudes.

    Example:
        >>> import torch
        >>> countable(torch.tensor([0, 7], dtype=torch.uint16))
        tensor([0, 7])
    """
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return tensor.to(torch.int64)  # which keeps zeros zeros, and all numbers that fit
    return tensor.float() if str(tensor.dtype).startswith("torch.float8") else tensor


def _to_host(pairs: list[Tensor]) -> list[list[int]]:
    """The pairs as integers, with one transfer for each device instead of one for each pair."""
    result: list[list[int]] = [[0, 0]] * len(pairs)
    for device in {pair.device for pair in pairs}:
        indices = [i for i, pair in enumerate(pairs) if pair.device == device]
        for i, numbers in zip(indices, torch.stack([pairs[i] for i in indices]).tolist(), strict=True):
            result[i] = numbers
    return result


def module_bytes(module: nn.Module, zero_threshold: float = 0.0) -> tuple[int, int]:
    """The bytes of all weights of a module, biases and norms too: dense, and each in its smallest encoding.

    They are the weights that the module computes with: of a pruned layer the masked ones.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 64)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> module_bytes(layer)
        (16640, 321)
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    counts = count_tensors(computed_weights(module, parameters), zero_threshold)
    return sum(count.bytes.dense for count in counts), sum(count.bytes.best for count in counts)
