"""Units that can go from between two layers: which they are, taking them away, and folding in what they were."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules import conv

from lightning_gcsr.structured.chains import ACTIVATIONS, ADAPTIVE, MAXIMA, NORMS, POOLS, Link, Weighted

__all__ = ["remove_units"]


@torch.no_grad()
def remove_units(link: Link, notes: dict[str, str]) -> int:
    """Remove the units that can go, all but one if need be, and say how many; what must stay is named."""
    constant, even, values = _constants(link)
    columns = _columns(link)
    unread = (columns == 0).flatten(1).all(1)
    # Zeros move in at the borders of the consumer, where a value was: its bias cannot make up for that.
    even &= (values == 0) | (not _pads_zeros(link.consumer))
    finite = values.isfinite() & columns.flatten(1).isfinite().all(1)
    whole = constant.view(-1, link.features).all(1)
    foldable = (constant & even & finite).view(-1, link.features).all(1)
    unread = unread.view(-1, link.features).all(1)
    stuck = int((whole & ~foldable & ~unread).sum())
    if stuck:
        notes[link.producer_name] = (
            f"{stuck} of its units are constant, but stay: the bias of {link.consumer_name!r} cannot take them up, for"
            " zero padding on the way makes them another number at the borders, or they are not finite"
        )
    going = foldable | unread
    if going.all():
        # One that nothing reads is the one to keep: its weights may be anything.
        going[int(unread.nonzero()[0]) if unread.any() else 0] = False
        notes[link.producer_name] = "one of its units stays, though none does anything: a layer needs one"
    if not going.any():
        return 0
    _fold(link, values, (going & foldable).repeat_interleave(link.features))
    _remove(link, going)
    return int(going.sum())


def _columns(link: Link) -> Tensor:
    """What the consumer reads each feature with, features first, in double precision on the CPU."""
    return _wide(link.consumer.weight).transpose(0, 1)


def _constants(link: Link) -> tuple[Tensor, Tensor, Tensor]:
    """For each feature: whether it is known without an input, is the same at all positions, and what it is."""
    weight, bias = link.producer.weight, link.producer.bias
    constant = (weight == 0).flatten(1).all(1).cpu()
    even = torch.ones_like(constant)
    values = _wide(weight.new_zeros(len(weight)) if bias is None else bias)
    layer: Any  # what it has depends on its type
    for _, layer in link.between:
        kind = type(layer)
        if kind is nn.Flatten:
            if len(values) != link.consumer.weight.shape[1]:
                constant, even, values = (t.repeat_interleave(link.features) for t in (constant, even, values))
        elif kind in NORMS:
            values = _normalized(layer, values)
        elif kind is nn.PReLU:
            values = torch.where(values >= 0, values, _wide(layer.weight) * values)
        elif kind in ACTIVATIONS:
            values = copy.deepcopy(layer).eval()(values.clone())  # which may work in place
        elif kind in POOLS:
            even &= (values == 0) | _keeps_constants(layer)
    return constant, even, values


def _fold(link: Link, values: Tensor, going: Tensor) -> None:
    """Add to the consumer's bias what it made of the constant features that go."""
    columns = _columns(link)[going]
    added = values[going] @ (columns.flatten(2).sum(2) if columns.dim() > 2 else columns)
    if not added.any():
        return
    weight, bias = link.consumer.weight, link.consumer.bias
    total = added if bias is None else _wide(bias) + added
    like = weight if bias is None else bias
    link.consumer.bias = nn.Parameter(total.to(like.device, like.dtype), requires_grad=like.requires_grad)


def _remove(link: Link, going: Tensor) -> None:
    units = (~going).nonzero()[:, 0]
    features = (~going.repeat_interleave(link.features)).nonzero()[:, 0]
    _select(link.producer, ("weight", "bias"), units)
    flat = type(link.producer) is nn.Linear
    layer: Any
    for _, layer in link.between:
        flat = flat or type(layer) is nn.Flatten
        kept = features if flat else units
        if type(layer) in NORMS:
            _select(layer, ("weight", "bias", "running_mean", "running_var"), kept)
            layer.num_features = len(kept)
        elif type(layer) is nn.PReLU and layer.num_parameters > 1:
            _select(layer, ("weight",), kept)
            layer.num_parameters = len(kept)
    _select(link.consumer, ("weight",), features, dim=1)
    for layer in (link.producer, link.consumer):
        names = ("out_features", "in_features") if type(layer) is nn.Linear else ("out_channels", "in_channels")
        for name, size in zip(names, layer.weight.shape, strict=False):
            setattr(layer, name, size)


def _wide(tensor: Tensor) -> Tensor:
    """In double precision on the CPU, so that values are rounded once, when they are folded in."""
    return tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def _select(layer: nn.Module, names: Sequence[str], kept: Tensor, dim: int = 0) -> None:
    for name in names:
        tensor: Optional[Tensor] = getattr(layer, name)
        if tensor is None:
            continue
        smaller = tensor.detach().index_select(dim, kept.to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        setattr(layer, name, smaller)


def _normalized(layer: Any, values: Tensor) -> Tensor:
    """What batch normalization makes of values in eval mode."""
    values = (values - _wide(layer.running_mean)) / (_wide(layer.running_var) + layer.eps).sqrt()
    return values * _wide(layer.weight) + _wide(layer.bias) if layer.affine else values


def _pads_zeros(layer: Weighted) -> bool:
    return (
        isinstance(layer, conv._ConvNd)
        and layer.padding_mode == "zeros"
        and any(layer._reversed_padding_repeated_twice)
    )


def _keeps_constants(pool: Any) -> bool:
    """Whether a pool makes of a number that is the same everywhere that number, up to the borders."""
    if type(pool) in ADAPTIVE:
        return True
    padded = any(_tuple(pool.padding))
    if type(pool) in MAXIMA:  # which pads with −∞; a window is never beyond the border as a whole, unless dilated
        return not padded or all(gap == 1 for gap in _tuple(pool.dilation))
    counts_padding = padded and pool.count_include_pad
    return not counts_padding and getattr(pool, "divisor_override", None) is None


def _tuple(size: Union[int, tuple[int, ...]]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)
