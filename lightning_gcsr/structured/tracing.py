"""A module is run once on an example, and what each operation does to its units is written down.

Two things are known of each tensor of the run: which labels its positions carry, and which of its values depend on no
input. PyTorch's own functions for layers are followed as a whole (:mod:`~lightning_gcsr.structured.layer_rules`), and
everything else by the operations of ATen that it consists of (:mod:`~lightning_gcsr.structured.tensor_rules`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_gcsr.structured.layer_rules import LAYER_RULES
from lightning_gcsr.structured.output_tree import tensors_in
from lightning_gcsr.structured.removal import GROUPED
from lightning_gcsr.structured.tensor_rules import rule_for
from lightning_gcsr.structured.traced_tensors import TensorFacts, Trace
from lightning_gcsr.structured.unit_labels import OUTPUT, UnitLabels

__all__ = ["eval_mode", "layer_by_layer", "run_module", "trace_units"]


class _TensorOperations(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.trace.paused:
            return func(*args, **kwargs)
        return rule_for(func)(self.trace, func, args, kwargs)


class _LayerFunctions(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = LAYER_RULES.get(func)
        if rule is None or self.trace.paused:
            return func(*args, **(kwargs or {}))
        self.trace.paused = True
        try:
            return rule(self.trace, func, *args, **(kwargs or {}))
        finally:
            self.trace.paused = False


@torch.no_grad()
def run_module(module: nn.Module, arguments: Sequence[Any]) -> Any:
    """The outputs of a module in eval mode.

    Raises:
        ValueError: If the module fails; the message names the innermost module that was running.
    """
    names, stack = {id(part): name for name, part in module.named_modules()}, [""]
    try:
        with eval_mode(module), torch.random.fork_rng(devices=[]), _running(names, stack), layer_by_layer():
            return module(*arguments)
    except Exception as error:  # whatever the modules of others raise
        place = f"submodule {stack[-1]!r}" if stack[-1] else type(module).__name__
        kinds = [
            f"a tensor of shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            for part in arguments
        ]
        raise ValueError(
            f"`example_input` must be an input that the module accepts, got {', '.join(kinds) or 'no argument'}, for"
            f" which {place} raises {type(error).__name__}: {error}. Pass what `forward` takes, a tuple if several."
        ) from error


@torch.no_grad()
def trace_units(module: nn.Module, arguments: Sequence[Any]) -> tuple[Trace, Any]:
    """Run a module in eval mode and return what is known of its units, and its outputs."""
    trace = Trace(UnitLabels(module))
    for labelled in trace.units.tensors.values():
        everything = torch.ones([1] * labelled.tensor.dim(), dtype=torch.bool)
        trace.facts[labelled.tensor] = TensorFacts(trace.units.of(labelled.tensor), everything)
    names = {id(part): name for name, part in module.named_modules()}
    trace.grouped = {names[id(part)] for part in module.modules() if isinstance(part, GROUPED)}
    with ExitStack() as stack:
        for context in (eval_mode(module), torch.random.fork_rng(devices=[]), _running(names, trace.running)):
            stack.enter_context(context)
        for mode in (layer_by_layer(), _TensorOperations(trace), _LayerFunctions(trace)):
            stack.enter_context(mode)
        outputs = module(*arguments)
    for output in tensors_in(outputs):
        for labels in trace.of(output).labels:
            trace.units.pin(labels, OUTPUT)
    for labelled in trace.units.tensors.values():
        if id(labelled.tensor) not in trace.used:
            for labels in labelled.labels.values():
                trace.units.pin(labels, "the example input does not reach it")
    return trace, outputs


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """In eval mode, with the flags as they were afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Without kernels for whole transformer layers, whose operations nobody counts and whose rounding differs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _running(names: dict[int, str], stack: list[str]) -> Iterator[None]:
    """Keep the names of the modules whose forward runs."""

    def enter(part: nn.Module, _: Any) -> None:
        stack.append(names.get(id(part), ""))

    def leave(part: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
