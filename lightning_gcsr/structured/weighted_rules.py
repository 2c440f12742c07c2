"""What linear layers and convolutions do to units: they read some, and make others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gcsr.structured.traced_tensors import Reading, Trace, all_constant, even, everywhere, vector_operand
from lightning_gcsr.structured.unit_labels import INPUT, varying_dims

__all__ = ["WEIGHTED_RULES"]


def _inputs_of(trace: Trace, tensor: Tensor, dim: int, what: str) -> Optional[Tensor]:
    """The labels along the dimension that a layer reads; they may differ along no other one."""
    found = [array for array in trace.of(tensor).labels if dim in varying_dims(array)]
    if not found:
        return None
    if len(varying_dims(found[0])) > 1:
        first = found[0]
        for other in varying_dims(first):
            first = first if other == dim else first.narrow(other, 0, 1)
        trace.units.couple(found[0], first, f"{what}{trace.place} mixes its units")
        return first.flatten()
    return found[0].flatten()


def _read(
    trace: Trace,
    inputs: Optional[Tensor],
    tensor: Tensor,
    dim: int,
    weight: Tensor,
    axis: int,
    bias: Optional[Tensor],
    uneven: bool,
) -> None:
    """Couple what a layer reads with the indices of its weight, and write down which of them it can do without."""
    found = [array for array in trace.of(weight).labels if varying_dims(array) == [axis]]
    columns = found[0].flatten() if found else None
    if inputs is None or columns is None:
        if inputs is not None:
            trace.units.pin(inputs, f"the weight that reads it{trace.place} cannot be followed")
        if columns is not None:
            trace.units.pin(columns, INPUT)
        return
    trace.units.couple(inputs, columns, INPUT)
    others = [d for d in range(tensor.dim()) if d != dim]
    constant = everywhere(trace.of(tensor).constant, others).flatten().expand(len(inputs)).clone()
    proven = constant.clone()
    unread = (weight == 0).movedim(axis, 0).flatten(1).all(1).cpu() & all_constant(trace, weight)
    values = torch.zeros(len(inputs), dtype=torch.float64)
    if bool(constant.any()) and tensor.is_floating_point() and tensor.numel():
        low, high = tensor.amin(others).cpu(), tensor.amax(others).cpu()
        zero = (low == 0) & (high == 0)
        # Zeros move in at the borders of a convolution, where a value was: its bias cannot make up for that.
        constant &= zero if uneven else even(tensor, others).flatten() & low.isfinite() & high.isfinite()
        values = torch.where(constant, (low.double() + high.double()) / 2, 0.0)
    else:
        constant = torch.zeros_like(constant)
    finite = weight.isfinite().movedim(axis, 0).flatten(1).all(1).cpu()
    dead = constant & (values == 0) & finite
    trace.readings.append(Reading(columns, unread | dead, constant & finite, values, proven, weight, bias))


def _linear(trace: Trace, func: Any, input: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    out: Tensor = func(input, weight, bias)
    last = input.dim() - 1
    _read(trace, _inputs_of(trace, input, last, "linear"), input, last, weight, weight.dim() - 1, bias, uneven=False)
    kept = [array for array in trace.of(input).labels if last not in varying_dims(array)]
    rows = [array.flatten() for array in trace.of(weight).labels if varying_dims(array) == [0] and weight.dim() == 2]
    shape = [len(weight)] if weight.dim() == 2 else []
    parts: list[tuple[Sequence[int], Sequence[Tensor]]] = [([*input.shape[:-1], 1], kept), (shape, rows)]
    parts += vector_operand(trace, bias, out.dim(), out.dim() - 1) if bias is not None and bias.dim() else []
    if weight.dim() == 1:
        parts[0] = (input.shape[:-1], [array.squeeze(last) for array in kept])
    constant = torch.zeros([1] * out.dim(), dtype=torch.bool)
    if all_constant(trace, weight, bias) and weight.dim() == 2:
        varies = ~trace.of(input).constant.expand([*trace.of(input).constant.shape[:-1], len(weight[0])])
        constant = (varies.float() @ (weight != 0).float().cpu().T) == 0
    trace.note(out, trace.combine(out.shape, parts, "linear"), constant)
    return out


def _convolution(
    trace: Trace, func: Any, input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, *more: Any, **kwargs: Any
) -> Tensor:
    out: Tensor = func(input, weight, bias, *more, **kwargs)
    transposed = func in _TRANSPOSED
    settings = {"padding": 0, "groups": 1, **dict(zip(_SETTINGS[transposed], more, strict=False)), **kwargs}
    padding, groups = settings["padding"], settings["groups"]
    dims = weight.dim() - 2
    channels = input.dim() - dims - 1
    for array in trace.of(input).labels:
        if max(varying_dims(array)) > channels:
            trace.units.pin(array, f"a convolution{trace.place} works along its units")
    for array in trace.of(weight).labels:
        if varying_dims(array)[0] > 1:
            trace.units.pin(array, "it is the size of a kernel")
    inputs = _inputs_of(trace, input, channels, "a convolution")
    reads, makes = (0, 1) if transposed else (1, 0)
    if groups == 1:
        is_padded = padding if isinstance(padding, str) else any([padding] if isinstance(padding, int) else padding)
        uneven = transposed or bool(is_padded and is_padded != "valid" and weight[0, 0].numel() * bool(is_padded) > 0)
        _read(trace, inputs, input, channels, weight, reads, bias, uneven)
        rows = trace.units.along(weight, makes) if id(weight) in trace.units.tensors else _along(trace, weight, makes)
    else:
        trace.pin_groups([input, weight], "a convolution")
        rows = _grouped(trace, inputs, weight, groups, transposed)
    shape = [out.shape[channels] if dim == channels else 1 for dim in range(out.dim())]
    batch = [array for array in trace.of(input).labels if max(varying_dims(array)) < channels]
    parts: list[tuple[Sequence[int], Sequence[Tensor]]]
    parts = [
        ([*input.shape[:channels], *[1] * (dims + 1)], batch),
        (shape, [] if rows is None else [rows.reshape(shape)]),
    ]
    parts += vector_operand(trace, bias, out.dim(), channels)
    constant = torch.zeros([1] * out.dim(), dtype=torch.bool)
    if all_constant(trace, weight, bias):
        constant = _constant_channels(trace.of(input).constant, input, channels, weight, groups, transposed).reshape(
            shape
        )
    trace.note(out, trace.combine(out.shape, parts, "a convolution"), constant)
    return out


def _along(trace: Trace, weight: Tensor, axis: int) -> Optional[Tensor]:
    found = [array for array in trace.of(weight).labels if varying_dims(array) == [axis]]
    return found[0].flatten() if found else None


def _grouped(trace: Trace, inputs: Optional[Tensor], weight: Tensor, groups: int, transposed: bool) -> Optional[Tensor]:
    """A group of a convolution goes as a whole: what it reads, its weights, and what it gives."""
    within = _along(trace, weight, 1)
    if within is not None:
        trace.units.pin(within, f"all groups of a convolution{trace.place} have the same size")
    rows = _along(trace, weight, 0)
    if rows is None:
        return None
    by_group = rows.reshape(groups, -1)
    trace.units.couple(by_group, by_group[:, :1], "")
    if inputs is None:
        trace.units.pin(rows, INPUT)
    else:
        trace.units.couple(inputs.reshape(groups, -1), by_group[:, :1], INPUT)
    return by_group[:, 0].repeat_interleave(weight.shape[1]) if transposed else rows


def _constant_channels(
    constant: Tensor, input: Tensor, channels: int, weight: Tensor, groups: int, transposed: bool
) -> Tensor:
    """Which output channels depend on no input."""
    others = [dim for dim in range(input.dim()) if dim != channels]
    varies = ~everywhere(constant, others).flatten().expand(input.shape[channels])
    used = (weight != 0).flatten(2).any(2).float().cpu()
    if transposed:  # (inputs, outputs of a group)
        used = used.reshape(groups, -1, used.shape[1]).transpose(1, 2)
    else:
        used = used.reshape(groups, -1, used.shape[1])
    return (used @ varies.float().reshape(groups, -1, 1)).flatten() == 0


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_SETTINGS = (
    ("stride", "padding", "dilation", "groups"),
    ("stride", "padding", "output_padding", "groups", "dilation"),
)
"""What follows the bias in a call: of a convolution, and of a transposed one."""


WEIGHTED_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys(_CONVOLUTIONS + _TRANSPOSED, _convolution),
}
