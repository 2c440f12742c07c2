"""What PyTorch's functions for layers do to units: those with weights, norms, embedding, attention, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gcsr.structured.norm_rules import NORM_RULES
from lightning_gcsr.structured.traced_tensors import Trace, all_constant, even, everywhere
from lightning_gcsr.structured.unit_labels import varying_dims
from lightning_gcsr.structured.weighted_rules import WEIGHTED_RULES

__all__ = ["LAYER_RULES"]


def _embedding(trace: Trace, func: Any, input: Tensor, weight: Tensor, *more: Any, **kwargs: Any) -> Tensor:
    out: Tensor = func(input, weight, *more, **kwargs)
    for array in trace.of(weight).labels:
        if varying_dims(array) != [1]:
            trace.units.pin(array, "it is looked up by index")
    trace.lose([input], f"embedding{trace.place} looks up by index")
    columns = [
        array.reshape([1] * input.dim() + [-1]) for array in trace.of(weight).labels if varying_dims(array) == [1]
    ]
    same = (weight == weight[:1]).all(0).cpu()
    constant = (trace.of(input).constant.unsqueeze(-1) | same) & all_constant(trace, weight)
    trace.note(out, columns, constant)
    return out


def _attention(
    trace: Trace,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    more = {"enable_gqa": True} if enable_gqa else {}
    out: Tensor = func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
    dims = query.dim()
    if enable_gqa:
        trace.lose([query, key, value], f"attention{trace.place} shares keys between heads")
        trace.note(out, [], torch.zeros([1] * dims, dtype=torch.bool))
        return out
    parts: list[tuple[Sequence[int], Sequence[Tensor]]] = []
    for tensor in (query, key, value):
        left = []
        for array in trace.of(tensor).labels:
            if tensor is not query and dims - 2 in varying_dims(array):
                trace.units.pin(array, f"attention{trace.place} sums over its units")
                continue
            first = array.narrow(dims - 1, 0, 1)
            trace.units.couple(array, first, "")  # all of a head, since its size is in the scale
            left.append(array if tensor is value else first)
        shape = list(tensor.shape) if tensor is value else [*tensor.shape[:-1], 1]
        if tensor is not query:
            shape[-2] = 1
        parts.append((shape, left))
    if attn_mask is not None:
        shape = [*attn_mask.shape[:-1], 1]
        trace.lose([attn_mask], f"attention{trace.place} has a mask of its own")
        parts.append((shape, []))
    # The weights of a query sum to one: what is the same for all keys comes out as it is.
    constant = everywhere(trace.of(value).constant, [dims - 2]) & even(value, [-2])
    trace.note(out, trace.combine(out.shape, parts, "attention"), constant)
    return out


def _pad(
    trace: Trace, func: Any, input: Tensor, pad: Sequence[int], mode: str = "constant", value: Optional[float] = None
) -> Tensor:
    out: Tensor = func(input, pad, mode, value)
    facts = trace.of(input)

    def along(array: Tensor, fill: float) -> Tensor:
        whole = array.expand(input.shape).to(torch.float64)
        return func(whole, pad, mode, fill if mode == "constant" else None)  # type: ignore[no-any-return]

    labels = [along(array, -1.0).long() for array in facts.labels]
    trace.note(out, labels, along(facts.constant, 1.0) > 0)
    return out


LAYER_RULES: dict[Any, Callable[..., Any]] = {
    **WEIGHTED_RULES,
    **NORM_RULES,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
    F.pad: _pad,
}
