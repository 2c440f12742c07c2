"""What norms do to units: they couple them with vectors of one value a unit, or hold fast those they average over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Optional

from torch import Tensor
from torch.nn import functional as F

from lightning_gcsr.structured.traced_tensors import Trace, all_constant, everywhere, vector_operand
from lightning_gcsr.structured.unit_labels import varying_dims

__all__ = ["NORM_RULES"]


def _normalized(
    trace: Trace, out: Tensor, input: Tensor, vectors: Sequence[Optional[Tensor]], constant: Tensor, what: str
) -> Tensor:
    """A norm over channels: its vectors have one value a channel."""
    parts: list[tuple[Sequence[int], Sequence[Tensor]]] = [(input.shape, list(trace.of(input).labels))]
    for vector in vectors:
        parts += vector_operand(trace, vector, input.dim(), 1)
    labels = trace.combine(out.shape, parts, what)
    trace.note(out, labels, constant & all_constant(trace, *vectors))
    return out


def _by_channel(
    trace: Trace,
    func: Any,
    input: Tensor,
    running_mean: Optional[Tensor] = None,
    running_var: Optional[Tensor] = None,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    *more: Any,
    **kwargs: Any,
) -> Tensor:
    """Batch norm and instance norm: each channel has statistics of its own, running ones or those of the input."""
    vectors = [running_mean, running_var, weight, bias]
    out = func(input, *vectors, *more, **kwargs)
    arguments = inspect.signature(func).bind(input, *vectors, *more, **kwargs)
    arguments.apply_defaults()
    of_input = arguments.args[5]  # `training` of one, `use_input_stats` of the other
    dims = [0] * (func is F.batch_norm) + list(range(2, input.dim())) if of_input else []
    return _normalized(trace, out, input, vectors, everywhere(trace.of(input).constant, dims), func.__name__)


def _group_norm(
    trace: Trace,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    out = func(input, num_groups, weight, bias, eps)
    trace.pin_groups([input], "group_norm")
    for array in trace.of(input).labels:
        dims = varying_dims(array)
        if weight is None or id(weight) not in trace.units.tensors or any(dim > 1 for dim in dims):
            trace.units.pin(
                array, f"group_norm{trace.place} takes its statistics over its units, and has no weights by name"
            )
        elif dims == [1]:
            by_group = array.reshape(num_groups, -1)
            trace.units.couple(by_group, by_group[:, :1], "")
    by_group = everywhere(trace.of(input).constant, range(2, input.dim()))
    by_group = by_group.expand([len(by_group), input.shape[1], *by_group.shape[2:]])
    by_group = by_group.reshape(len(by_group), num_groups, -1).all(2)
    constant = by_group.repeat_interleave(input.shape[1] // num_groups, 1)
    constant = constant.reshape([*constant.shape, *[1] * (input.dim() - 2)])
    return _normalized(trace, out, input, [weight, bias], constant, "group_norm")


def _over_all(
    trace: Trace, func: Any, input: Tensor, normalized_shape: Sequence[int], *more: Any, **kwargs: Any
) -> Tensor:
    """A norm whose statistics are those of the last dimensions, as ``layer_norm`` and ``rms_norm``: its units stay."""
    out: Tensor = func(input, normalized_shape, *more, **kwargs)
    name, vectors = func.__name__, [value for value in (*more, *kwargs.values()) if isinstance(value, Tensor)]
    dims = range(input.dim() - len(normalized_shape), input.dim())
    for array in trace.of(input).labels:
        if set(varying_dims(array)) & set(dims):
            trace.units.pin(array, f"{name}{trace.place} takes its statistics over all of its units")
    parts = [(tensor.shape, list(trace.of(tensor).labels)) for tensor in (input, *vectors)]
    constant = everywhere(trace.of(input).constant, list(dims)) & all_constant(trace, *vectors)
    trace.note(out, trace.combine(out.shape, parts, name), constant)
    return out


NORM_RULES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _by_channel,
    F.instance_norm: _by_channel,
    F.group_norm: _group_norm,
    F.layer_norm: _over_all,
    F.rms_norm: _over_all,
}
