"""State dicts in which tensors may be sharded: taken apart, gathered, and spread as other parameters are.

A state dict holds numbers, and mappings from the names of parameters to what is known of each. Of a sharded parameter
that is a ``DTensor`` placed as the parameter is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_gcsr.core.sharding import is_sharded, spread_like, whole_tensor

__all__ = ["gather_state", "join_states", "split_state", "spread_state"]


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The state without its sharded tensors, and these.

    Example:
        >>> split_state({"steps": {"weight": 3}})
        ({'steps': {'weight': 3}}, {})
    """
    rest, sharded = dict(state), {}
    for what, values in state.items():
        if isinstance(values, Mapping) and any(map(_is_sharded, values.values())):
            sharded[what] = {name: value for name, value in values.items() if _is_sharded(value)}
            rest[what] = {name: value for name, value in values.items() if not _is_sharded(value)}
    return rest, sharded


def join_states(state: Mapping[str, Any], sharded: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What :func:`split_state` took apart."""
    return dict(state) | {what: {**state.get(what, {}), **values} for what, values in sharded.items()}


def gather_state(state: Mapping[str, Any], keeps: bool = True) -> dict[str, Any]:
    """The state with whole tensors, on the CPU, in place of sharded ones. All processes must call this.

    Args:
        state: The state.
        keeps: Whether this process wants the whole tensors; where it does not, they are left out.
    """
    rest, sharded = split_state(state)
    whole: dict[str, dict[str, Tensor]] = {what: {} for what in sharded}
    for what, values in sharded.items():
        for name, value in values.items():
            tensor = whole_tensor(value)
            if keeps:
                whole[what][name] = tensor.cpu()
    return join_states(rest, whole)


def spread_state(state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What is known of these parameters, spread over processes as they are; all processes must call this.

    A tensor whose shape is no longer that of its parameter is left out.

    Example:
        >>> import torch
        >>> state = {"averages": {"weight": torch.ones(2), "gone": torch.ones(2)}, "counts": {"weight": 3}, "began": 1}
        >>> spread_state(state, {"weight": torch.zeros(2)})
        {'averages': {'weight': tensor([1., 1.])}, 'counts': {'weight': 3}}
    """
    return {
        what: {
            name: spread_like(value, parameters[name]) if isinstance(value, Tensor) else value
            for name, value in values.items()
            if name in parameters and not (isinstance(value, Tensor) and value.shape != parameters[name].shape)
        }
        for what, values in state.items()
        if isinstance(values, Mapping)
    }


def _is_sharded(value: object) -> bool:
    return isinstance(value, Tensor) and is_sharded(value)
