"""What the operations of ATen do to units: elementwise, moved, reduced, pooled, multiplied, or unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gcsr.structured.traced_tensors import Reading, Trace, even, everywhere, padded
from lightning_gcsr.structured.unit_labels import varying_dims

__all__ = ["rule_for"]

Rule = Callable[[Trace, Any, Sequence[Any], dict[str, Any]], Any]

_ELEMENTWISE = {
    *("_to_copy", "clone", "copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "masked_fill"),
    *("_prelu_kernel", "hardswish", "log_sigmoid_forward", "rsub", "fill", "zero", "where", "bitwise_not"),
}
_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like"}
_MOVES = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "unsqueeze"),
    *("squeeze", "slice", "select", "split", "split_with_sizes", "unbind", "chunk", "narrow", "flip", "roll", "repeat"),
    *("index_select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unfold"),
    *("diagonal", "movedim", "swapaxes"),
}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_CUTS = {"slice", "select", "split", "split_with_sizes", "unbind", "chunk", "narrow", "index_select", *_VIEWS}
_REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "softmax", "_softmax"),
    *(
        "log_softmax",
        "_log_softmax",
        "logsumexp",
        "cumsum",
        "cumprod",
        "argmax",
        "argmin",
        "norm",
        "prod",
        "any",
        "all",
    ),
    *("linalg_vector_norm", "sort", "topk", "_safe_softmax"),
}
_POOLS = {"avg_pool", "max_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "upsample"}
_MATMULS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}


def rule_for(func: Any) -> Rule:
    """The rule of an operation."""
    name = _name(func)
    if func._schema.name.startswith("aten::"):
        if name in _MOVES:
            return _move
        if name in _REDUCTIONS:
            return _reduce
        if _pool_dims(name):
            return _pool
        if name in _MATMULS:
            return _matmul
        if name in {"cat", "glu"}:
            return _concatenate if name == "cat" else _glu
        if name in _LIKE or name in _ELEMENTWISE or torch.Tag.pointwise in func.tags:
            return _elementwise
    return _other


def _name(func: Any) -> str:
    name = str(func._schema.name).removeprefix("aten::")
    return name if name.startswith("__") else name.rstrip("_")


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _elementwise(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    operands = _tensors(args, kwargs)
    if name in {"copy", "fill", "zero"} and func._schema.is_mutable:  # the first operand's values are overwritten
        facts = [trace.of(operand) for operand in operands[1:]] or [trace.of(operands[0])]
        constants = [fact.constant for fact in facts] if operands[1:] else [torch.ones(1, dtype=torch.bool)]
    else:
        facts = [trace.of(operand) for operand in operands]
        constants = [fact.constant for fact in facts]
    if name in _LIKE:
        constants = [torch.ones(1, dtype=torch.bool)]
    dims = max((operand.dim() for operand in operands), default=0)
    constant = torch.ones([1] * dims, dtype=torch.bool)
    for part in constants:
        constant = constant & padded(part, dims)
    if name == "mul" and len(operands) == 2:
        for operand in operands:
            if bool((part := trace.of(operand).constant).any()):
                constant = constant | padded(_zero_everywhere(operand, part), dims)
    parts = [(operand.shape, list(trace.of(operand).labels)) for operand in operands]
    out = func(*args, **kwargs)
    if _random(func):
        constant = torch.zeros_like(constant)
    for tensor in _tensors(out):
        if tensor.dim() < dims:  # one that is not for users
            continue
        labels = trace.combine(tensor.shape, parts, name)
        trace.note(tensor, labels, constant)
    if func._schema.is_mutable:
        _taint(trace, operands[0])
    return out


def _zero_everywhere(operand: Tensor, constant: Tensor) -> Tensor:
    """Where constants are zero, as far as all values that share an entry of ``constant`` are."""
    zero = operand == 0
    reduced = [dim for dim, size in enumerate(constant.shape) if size == 1 and zero.shape[dim] > 1]
    return constant & (everywhere(zero, reduced).cpu())


def _taint(trace: Trace, written: Tensor) -> None:
    """What shares memory with a tensor that was written to is constant no more; what overlaps in part has to stay."""
    address = written.untyped_storage().data_ptr()
    for other in list(trace.facts.keys()):
        if other is not written and address and other.untyped_storage().data_ptr() == address:
            facts = trace.facts[other]
            facts.constant = torch.zeros([1] * other.dim(), dtype=torch.bool)
            if other.numel() != written.numel():
                trace.lose([other, written], f"a part of it is written to{trace.place}")


def _move(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    facts = trace.of(source)
    labels = list(facts.labels)
    out = func(*args, **kwargs)
    moved = [_leaves(func(array.expand(source.shape).contiguous(), *args[1:], **kwargs)) for array in labels]
    constants = _leaves(func(facts.constant.expand(source.shape).contiguous(), *args[1:], **kwargs))
    for i, tensor in enumerate(_leaves(out)):
        trace.note(tensor, [arrays[i] for arrays in moved], constants[i])
        regular = (
            _name(func) in {"view", "_unsafe_view", "expand", "reshape"} and tensor.shape[-1:] == source.shape[-1:]
        )
        trace.facts[tensor].sums_to_one = facts.sums_to_one and regular
    if _name(func) in _VIEWS:
        trace.units.regrouped += labels
    if _name(func) in _CUTS:
        for array in labels:
            before = [array.shape[dim] for dim in varying_dims(array)]
            noted = trace.facts.get(_leaves(out)[0])
            if not any([other.shape[dim] for dim in varying_dims(other)] == before for other in noted.labels):
                trace.units.fragile.append(array)
    return out


def _leaves(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def _argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return kwargs.get(name, args[i] if i < len(args) else argument.default_value)
    return None


def _reduce(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    facts = trace.of(source)
    labels = list(facts.labels)
    dims = _argument(func, args, kwargs, "dim")
    dims = list(range(source.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = [dim % max(1, source.dim()) for dim in dims]
    constant = everywhere(facts.constant, dims) if source.dim() else facts.constant
    reason = f"{_name(func).strip('_')}{trace.place} takes all of its units together"
    pins = [(array, reason) for array in labels if set(varying_dims(array)) & set(dims)]
    out = func(*args, **kwargs)
    for tensor in _leaves(out):
        if tensor.dim() == source.dim():
            trace.note(tensor, labels, constant, pins)
            trace.facts[tensor].sums_to_one = _name(func) in {"softmax", "_softmax"} and dims == [source.dim() - 1]
            continue
        kept = [array for array in labels if not set(varying_dims(array)) & set(dims)]
        trace.note(tensor, [array.squeeze(tuple(dims)) for array in kept], constant.squeeze(tuple(dims)), pins)
    return out


def _pool_dims(name: str) -> int:
    if not any(name.startswith(pool) for pool in _POOLS) or "backward" in name:
        return 0
    return next((dims for dims in (1, 2, 3) if f"{dims}d" in name), 0)


def _pool(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    facts = trace.of(source)
    labels = list(facts.labels)
    dims = range(source.dim() - _pool_dims(_name(func)), source.dim())
    for array in labels:
        if set(varying_dims(array)) & set(dims):
            trace.units.pin(array, f"{_name(func)}{trace.place} works along its units")
    out = func(*args, **kwargs)
    for tensor in _leaves(out):
        kept = [array for array in labels if not set(varying_dims(array)) & set(dims)]
        trace.note(tensor, kept, everywhere(facts.constant, list(dims)))
    return out


def _concatenate(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [tensor for tensor in args[0] if tensor.shape != (0,)]
    out = func(*args, **kwargs)
    dim = _argument(func, args, kwargs, "dim") % max(1, out.dim())
    facts = [trace.of(tensor) for tensor in tensors]
    along = [
        [array for array in fact.labels if tensor.shape[dim] > 1 and dim in varying_dims(array)]
        for fact, tensor in zip(facts, tensors, strict=True)
    ]
    others = [[array for array in fact.labels if dim not in varying_dims(array)] for fact in facts]
    shapes = [[1 if d == dim else size for d, size in enumerate(tensor.shape)] for tensor in tensors]
    labels = trace.combine(out.shape, list(zip(shapes, others, strict=True)), "cat")
    if any(along):
        shape = [1] * out.dim()
        for arrays in along:
            for array in arrays:
                shape = [max(a, b) for a, b in zip(shape, array.shape, strict=True)]
        pieces = []
        for arrays, tensor in zip(along, tensors, strict=True):
            shape[dim] = tensor.shape[dim]
            pieces.append(arrays[0].expand(shape) if arrays else torch.full(shape, -1))
        labels.append(torch.cat(pieces, dim))
    constant = torch.cat([fact.constant.expand(tensor.shape) for fact, tensor in zip(facts, tensors, strict=True)], dim)
    trace.note(out, labels, constant)
    return out


def _glu(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The product of one half and the sigmoid of the other, so that a unit of one goes with its partner."""
    source = args[0]
    facts = trace.of(source)
    dim = _argument(func, args, kwargs, "dim") % source.dim()
    out = func(*args, **kwargs)

    def halves(array: Tensor) -> Sequence[Tensor]:
        return array.chunk(2, dim) if array.shape[dim] > 1 else (array, array)

    parts = [(out.shape, [halves(array)[half] for array in facts.labels]) for half in (0, 1)]
    first, second = halves(facts.constant)
    trace.note(out, trace.combine(out.shape, parts, "glu"), first & second)
    return out


def _matmul(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = _name(func)
    added = args[0] if name in {"addmm", "baddbmm", "addmv"} else None
    first, second = args[1:3] if added is not None else args[:2]
    facts, others = trace.of(first), trace.of(second)
    inner, outer = first.dim() - 1, max(0, second.dim() - 2)
    # Labels over the sum, next to those of the batch dimensions: a head, which goes as a whole.
    shape_first = [*first.shape[:-1], 1]
    rows = _summed(trace, facts.labels, inner)
    columns = _summed(trace, others.labels, outer)
    _read(trace, (first, facts, inner), (second, others, outer))
    out = func(*args, **kwargs)
    if second.dim() == 1 or first.dim() == 1:
        trace.lose([first, second], f"{name}{trace.place} is not followed")
        trace.note(out, [], torch.zeros([1] * out.dim(), dtype=torch.bool))
        return out
    parts = [(shape_first, rows), ([*second.shape[:-2], 1, second.shape[-1]], columns)]
    constant = _constant_product(first, facts.constant, second, others.constant)
    if facts.sums_to_one:  # what is the same in all summands comes out as it is
        constant = constant | (everywhere(others.constant, [outer]) & even(second, [outer]))
    if added is not None:
        parts.append((added.shape, trace.of(added).labels))
        constant = constant & padded(trace.of(added).constant, out.dim())
    trace.note(out, trace.combine(out.shape, parts, name), constant)
    return out


def _summed(trace: Trace, labels: Sequence[Tensor], dim: int) -> list[Tensor]:
    """The labels that are left when one dimension is summed over, along which those of a batch are coupled."""
    left = []
    for array in labels:
        if dim not in varying_dims(array):
            left.append(array)
        elif len(varying_dims(array)) > 1:
            first = array.narrow(dim, 0, 1)
            trace.units.couple(array, first, f"a product{trace.place} mixes its units")
            left.append(first)
    return left


def _read(trace: Trace, first: tuple[Tensor, Any, int], second: tuple[Tensor, Any, int]) -> None:
    """Couple what is multiplied and summed over, and write down which of it the sum can do without."""
    reason = f"a product{trace.place} combines it with values that are no units"
    ends = []
    for tensor, facts, dim in (first, second):
        alone = [array for array in facts.labels if varying_dims(array) == [dim]]
        zero = (tensor == 0).cpu() & facts.constant
        zero = everywhere(zero, [d for d in range(zero.dim()) if d != dim]).flatten()
        ends.append((alone[0].flatten() if alone else None, zero))
    (labels, zero), (others, zero_too) = ends
    if labels is None and others is None:
        return
    if labels is None or others is None:
        trace.units.pin(labels if labels is not None else others, reason)  # type: ignore[arg-type]  # one is there
        return
    trace.units.couple(labels, others, reason)
    unread = (zero | zero_too).expand(labels.shape)
    never = torch.zeros_like(unread)
    trace.readings.append(Reading(labels, unread, never, torch.zeros(labels.shape, dtype=torch.float64), never))


def _constant_product(first: Tensor, constant: Tensor, second: Tensor, constant_too: Tensor) -> Tensor:
    if not (bool(constant.any()) or bool(constant_too.any())):
        return torch.zeros([1] * first.dim(), dtype=torch.bool)
    if bool(constant.all()) and bool(constant_too.all()):
        return torch.ones([1] * first.dim(), dtype=torch.bool)
    # A summand may depend on an input unless both factors are constant, or one of them is zero.
    free, free_too = ((~part).expand(t.shape).float() for part, t in ((constant, first), (constant_too, second)))
    used = (~(constant & (first == 0).cpu())).float()
    used_too = (~(constant_too & (second == 0).cpu())).float()
    return (free @ used_too + used @ free_too) == 0


def _other(trace: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    operands = _tensors(args, kwargs)
    constant = not _random(func) and all(bool(trace.of(operand).constant.all()) for operand in operands)
    trace.lose(operands, f"{_name(func)}{trace.place} is not followed")
    out = func(*args, **kwargs)
    for tensor in _tensors(out):
        trace.note(tensor, [], torch.full([1] * tensor.dim(), constant))
    return out
