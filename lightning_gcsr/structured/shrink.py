"""Make use of structured zeros: remove the units that do nothing, and leave a smaller, faster module."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_gcsr.sparsity.text_table import plain_table
from lightning_gcsr.structured.attention import reduced_attention, restore_attention
from lightning_gcsr.structured.output_tree import OutputsDifferError, largest_difference
from lightning_gcsr.structured.removal import cut, find_removable, fold
from lightning_gcsr.structured.tracing import run_module, trace_units
from lightning_gcsr.structured.unit_report import left_alone, unit_counts
from lightning_gcsr.validation import argument_error

__all__ = ["ShrinkReport", "UnitCount", "check_module", "copy_of", "shrink_units"]

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class UnitCount(NamedTuple):
    """A number before and after: of units, parameters or floating-point operations."""

    before: int
    after: int


@dataclass(frozen=True, repr=False)
class ShrinkReport:
    """What :func:`~lightning_gcsr.shrink_units` did; printed, it is a table."""

    units: Mapping[str, UnitCount]
    """By name, the outputs of each layer whose units can go, and the heads of each attention."""
    parameters: UnitCount
    """The numbers of parameters."""
    flops: UnitCount
    """Floating-point operations for the example input, those of matrix products, convolutions and attention."""
    difference: float
    """The largest difference of an output for the example input."""
    left_alone: Mapping[str, str]
    """The layers whose units had to stay, or that were not shrunk as far as their zeros go, and why."""
    kept: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By name of a parameter or buffer that lost entries, the indices that are left, for each dimension."""

    def __repr__(self) -> str:
        counts = {f"units of {name}": count for name, count in self.units.items()}
        counts |= {"parameters": self.parameters, "operations for the example": self.flops}
        rows = [(title, f"{before:,d}", f"{after:,d}") for title, (before, after) in counts.items()]
        lines = [plain_table(("", "before", "after"), rows, left=[""])]
        lines.append(f"The outputs for the example differ by at most {self.difference:.1e}.")
        lines += ["Left alone:"] * bool(self.left_alone)
        lines += [f"  {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def shrink_units(module: AnyModule, example_input: Any) -> tuple[AnyModule, ShrinkReport]:
    """A smaller copy of a module without the units that do nothing, with the same outputs in eval mode.

    A *unit* can only be removed from all tensors together: an output of a ``Linear`` with the inputs that read it; a
    channel in all layers that share it through additions, concatenations and norms; a hidden unit of an MLP block; a
    head of ``nn.MultiheadAttention``; a group of a grouped or depthwise convolution. A unit is removed if all layers
    that read it have zero weights for it, or if all layers that make it have zero weights, so that it is a constant.
    The constant, passed through norms and activations, is added to the bias of the next layer, which gets a bias if it
    has none. One removal may make another possible, so this is repeated until nothing changes. The inputs and the
    outputs of the module keep their sizes, and each layer keeps at least one unit.

    **How units are found.** A copy runs once on ``example_input``, and each operation shows which units it couples
    (:func:`~lightning_gcsr.structured.coupled_groups.coupled_groups` lists them). This works for any ``forward``.
    Units that an unknown operation uses, or that ``LayerNorm`` or softmax combine, are kept. The report names these
    layers and the reason. If ``forward`` has branches, only that of the example is seen.

    The outputs of both modules for ``example_input`` are compared, in any container.

    The result is for inference. In training mode, dropout and batch statistics would treat a unit differently from the
    constant that replaces it. Dtypes, devices, ``requires_grad``, training flags, hooks and buffers are kept; gradients
    and the Trainer of a LightningModule are not. The ``state_dict`` does not fit a module of the old sizes: save the
    module as a whole, or build one with the sizes in the report.

    Args:
        module: The module. Not sharded, not on the meta device, not TorchScript.
        example_input: An input, or a tuple of positional arguments, on the module's device.

    Returns:
        The smaller module, and the report. An attention that lost heads is a
        :class:`~lightning_gcsr.structured.attention.ReducedMultiheadAttention`.

    Raises:
        TypeError: If ``module`` is not a module, or TorchScript.
        ValueError: If a parameter has no shape or no values yet, if the module cannot be copied or fails on
            ``example_input``, if its outputs hold no tensors, or if they differ.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = net[0].weight.data[2:].zero_()
        >>> inputs = torch.randn(5, 4)
        >>> smaller, report = shrink_units(net, inputs)
        >>> smaller
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=3, bias=True)
        )
        >>> torch.allclose(smaller(inputs), net(inputs), atol=1e-6), report.parameters
        (True, UnitCount(before=67, after=19))
    """
    check_module(module)
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    original = copy_of(module)
    before, flops = _run(original, arguments)
    largest_difference(before, before)  # which must have something to compare
    problem: Exception
    for care in range(3):
        smaller = copy_of(module)
        try:
            shrunk = _shrink(smaller, arguments, care)
            after, flops_after = _run(smaller, arguments)
            difference = _difference(before, after, original, smaller, arguments)
        except Exception as error:  # whatever the layers of others make of the sizes
            problem = error
            continue
        counts = UnitCount(_parameters(original), _parameters(smaller)), UnitCount(flops, flops_after)
        kept = {name: tuple(dims) for name, dims in shrunk.kept.items() if _lost(original, name, dims)}
        return smaller, ShrinkReport(shrunk.units(smaller), *counts, difference, shrunk.left_alone, kept)
    if isinstance(problem, OutputsDifferError):
        raise ValueError(f"The outputs of the smaller module for `example_input` {problem}. {_ADVICE}") from problem
    raise ValueError(f"The smaller module fails on `example_input` ({problem}). {_ADVICE}") from problem


_ADVICE = (
    "Its code depends on the sizes of its layers in a way that was not seen. Pass the part of the module that does not,"
    " such as its encoder."
)


_STUCK = (
    "{} of its units are constant, but stay: no bias of a next layer can take the constants up, since zero padding or"
    " averages over it change them at the borders, they are not finite, or no layer with a bias reads them"
)
_LAST = "one of its units stays, though none does anything: a layer needs one"


def check_module(module: object) -> None:
    """Raise unless this is a module with values, of Python.

    Raises:
        TypeError: If it is not a module, or TorchScript.
        ValueError: If a parameter has no shape or no values yet.
    """
    if not isinstance(module, nn.Module):
        raise argument_error("module", module, "must be a module", "Pass the model itself.", TypeError)
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            where = f"its submodule {name!r} is TorchScript" if name else "it is TorchScript"
            raise TypeError(f"`module` must be a module of Python, and {where}. Shrink the module before scripting it.")
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"The parameter {name!r} has no {'values' if parameter.is_meta else 'shape'} yet.")


def copy_of(module: AnyModule) -> AnyModule:
    """A copy without a Trainer.

    Raises:
        ValueError: If the module cannot be copied.
    """
    try:
        return copy.deepcopy(module, dict(_not_to_copy(module)))
    except Exception as error:
        raise ValueError(
            f"`module` must be one that `copy.deepcopy` can copy, and {type(module).__name__} raises"
            f" {type(error).__name__}: {error}. Take what cannot be copied out of it first."
        ) from error


def _not_to_copy(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """What the copy gets instead: no Trainer, which holds the data, and of computed tensors the values."""
    for part in module.modules():
        for name, value in vars(part).items():
            if name == "_trainer":
                yield id(value), None
            for leaf in tree_leaves(value) if isinstance(value, (Tensor, dict, list, tuple)) else ():
                if isinstance(leaf, Tensor) and not leaf.is_leaf:  # weight norm computes it anew; it cannot be copied
                    yield id(leaf), leaf.detach().clone()


@dataclass
class _Shrunk:
    sizes: dict[str, int]
    left_alone: dict[str, str]
    kept: dict[str, list[Tensor]]

    def units(self, smaller: nn.Module) -> dict[str, UnitCount]:
        after = unit_counts(smaller, self.sizes)
        return {name: UnitCount(size, after[name]) for name, size in self.sizes.items()}


def _shrink(module: nn.Module, arguments: tuple[Any, ...], care: int) -> _Shrunk:
    """Take units out of a module, in place, until none can go."""
    pairs = reduced_attention(module)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    kept = {name: [torch.arange(size) for size in tensor.shape] for name, tensor in tensors}
    sizes: dict[str, int] = {}
    stays: dict[str, str] = {}
    last: list[str] = []
    first = True
    while True:
        trace, _ = trace_units(module, arguments)
        if care:
            trace.units.pin_fragile(all_views=care > 1)
        units = trace.units.resolve()
        if first:
            stays, free = left_alone(module, trace, units)
            sizes, first = unit_counts(module, free), False
        removal = find_removable(module, trace, units)
        last += removal.last
        fold(module, trace, removal)
        if not cut(module, trace, removal, kept):
            break
    notes = {name: _STUCK.format(count) for name, count in removal.stuck.items()} | dict.fromkeys(last, _LAST)
    for name, note in notes.items():
        stays[name] = f"{stays[name]}; {note}" if name in stays else note
    restore_attention(module, pairs)
    return _Shrunk(sizes, stays, kept)


def _lost(original: nn.Module, name: str, dims: list[Tensor]) -> bool:
    try:
        owner = original.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    shape = getattr(owner, name.rpartition(".")[2]).shape
    return any(len(left) < size for left, size in zip(dims, shape, strict=True))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def _run(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """The outputs in eval mode, and the floating-point operations that they take."""
    with FlopCounterMode(display=False) as counter:
        outputs = run_module(module, arguments)
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, outputs), counter.get_total_flops()


def _difference(before: Any, after: Any, original: nn.Module, smaller: nn.Module, arguments: tuple[Any, ...]) -> float:
    """The largest difference; where single precision rounds too much to tell, double precision decides."""
    try:
        return largest_difference(before, after)
    except OutputsDifferError as error:
        widened = [copy.deepcopy(part).double() for part in (original, smaller)]
        wide = tree_map(lambda part: part.double() if _is_single(part) else part, arguments)
        try:
            with torch.no_grad():
                largest_difference(*(run_module(part, wide) for part in widened))
        except ValueError:
            raise error from None
        return largest_difference(before, after, closeness=torch.inf)


def _is_single(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.float32
