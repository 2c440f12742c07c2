"""Structured zeros made use of: the units that are zero are taken out, and a smaller, faster module is left."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from lightning_gcsr.structured.chains import Link, Obstacles, is_chain, links, members
from lightning_gcsr.structured.units import remove_units
from lightning_gcsr.validation import argument_error

__all__ = ["ShrinkReport", "UnitCount", "shrink_units"]

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class UnitCount(NamedTuple):
    """The outputs of a ``Linear`` or the output channels of a convolution."""

    before: int
    after: int


@dataclass(frozen=True)
class ShrinkReport:
    """What :func:`~lightning_gcsr.shrink_units` did."""

    units: Mapping[str, UnitCount]
    """By name, of each layer whose units can go; the outputs of a chain cannot."""
    parameters: UnitCount
    """The numbers of parameters."""
    flops: Optional[UnitCount]
    """Floating-point operations for the example input, those of matrix products and convolutions; else ``None``."""
    difference: Optional[float]
    """The largest difference of an output for the example input; else ``None``."""
    left_alone: Mapping[str, str]
    """The layers that could not be followed, or not shrunk as far as their zeros go, and why."""


def shrink_units(module: AnyModule, example_input: Any = None) -> tuple[AnyModule, ShrinkReport]:
    """A smaller module without the units that are zero, with the same outputs in eval mode. The original stays.

    Units are outputs of ``Linear`` and output channels of ``Conv1d/2d/3d``; :class:`~lightning_gcsr.GroupLasso` with
    ``dim=0`` sets all weights of one to zero, with ``dim=1`` all that read one. A unit whose weights are zero gives its
    bias for every input: what batch norm (with its running statistics), activation and pooling make of that is added
    to the bias of the next layer, which gets one if it has none. A unit that no weight of the next layer reads goes as
    well. One may free another, so this is repeated until nothing changes. The inputs and the outputs of a chain keep
    their number, and each layer keeps at least one unit. (torch-pruning 1.6.1 removes units, too, but not at the same
    outputs: the bias of one that goes is lost.)

    **What is followed.** Each ``nn.Sequential`` in the module, with those inside it: ``Linear``, ``Conv1d/2d/3d`` with
    one group, ``BatchNorm1d/2d/3d``, element-wise activations, max, average and adaptive pooling, dropout,
    ``nn.Flatten()`` and ``Identity``. Everything else between weighted layers keeps its interface and is named in the
    report with the reason: other layers, residual blocks, subclasses, parametrized (weight norm, spectral norm) or tied
    weights, layers with hooks. So is a constant other than zero before a convolution that pads with zeros.

    **What is taken for granted.** Inputs have a batch dimension; those of a ``Linear`` that norm or PReLU with several
    slopes follows have two dimensions. A ``Sequential`` is called as a whole: if the module calls its layers one by
    one, pass one that is. ``example_input`` puts all of this to the test.

    The result is for inference. In training mode dropout and the statistics of batch norm treat a unit unlike the
    constant it is replaced by. Dtypes, devices, ``requires_grad``, training flags and buffers are kept; gradients,
    optimizers and the Trainer of a LightningModule are not. Its ``state_dict`` fits no module of the old sizes: save
    the module as a whole, or build one by the sizes in the report.

    Args:
        module: The module, itself a ``Sequential`` or with some in it. Not sharded, not on the meta device.
        example_input: An input, or a tuple of positional arguments, on the module's device. With it the outputs of both
            are compared, and floating-point operations are counted.

    Returns:
        The smaller module, and the report.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If a parameter has no shape or no values yet, or if the outputs for ``example_input`` differ.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = net[0].weight.data[2:].zero_()
        >>> smaller, report = shrink_units(net)
        >>> smaller
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=3, bias=True)
        )
        >>> images = torch.randn(5, 4)
        >>> torch.allclose(smaller(images), net(images), atol=1e-6), report.parameters
        (True, UnitCount(before=67, after=19))
    """
    if not isinstance(module, nn.Module):
        raise argument_error("module", module, "must be a module", "Pass the model itself.", TypeError)
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"The parameter {name!r} has no {'values' if parameter.is_meta else 'shape'} yet.")
    smaller = copy.deepcopy(module, dict(_not_to_copy(module)))
    left_alone: dict[str, str] = {}
    found = list(_links(smaller, "", Obstacles(smaller), left_alone, set()))
    names = {link.producer_name: link.producer for link in found}
    sizes = {name: len(layer.weight) for name, layer in names.items()}
    parameters = _parameters(smaller)
    before = None if example_input is None else _run(smaller, example_input)
    removed = True
    while removed:
        notes: dict[str, str] = {}  # of the last round, after which nothing changes
        removed = sum([remove_units(link, notes) for link in found]) > 0
    for name, note in notes.items():
        left_alone[name] = f"{left_alone[name]}; {note}" if name in left_alone else note
    flops = difference = None
    if before is not None:
        try:
            after = _run(smaller, example_input)
        except Exception as error:  # whatever the layers of others make of the sizes
            raise ValueError(f"The smaller module fails on `example_input` ({error}). {_ADVICE}") from error
        flops = UnitCount(before.flops, after.flops)
        difference = _checked_difference(before.outputs, after.outputs)
    units = {name: UnitCount(sizes[name], len(layer.weight)) for name, layer in names.items()}
    report = ShrinkReport(units, UnitCount(parameters, _parameters(smaller)), flops, difference, left_alone)
    return smaller, report


_ADVICE = (
    "It does more with the layers of an `nn.Sequential` than to call them one after the other, or its inputs have no"
    " batch dimension. Pass a `Sequential` that is called as a whole."
)


def _not_to_copy(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """What the copy gets instead: no Trainer, which holds the data, and of computed tensors the values."""
    for part in module.modules():
        for name, value in vars(part).items():
            if name == "_trainer":
                yield id(value), None
            elif isinstance(value, Tensor) and not value.is_leaf:  # weight norm computes it anew; it cannot be copied
                yield id(value), value.detach().clone()


def _links(
    module: nn.Module, name: str, obstacles: Obstacles, left_alone: dict[str, str], seen: set[int], named: bool = False
) -> Iterator[Link]:
    """The links of every chain in a module; weights that are in none are named, unless the module has been."""
    if id(module) in seen:
        return
    seen.add(id(module))
    prefix = f"{name}." if name else ""
    if is_chain(module):
        parts = list(members(module, prefix))
        yield from links(parts, obstacles, left_alone)
        named = True
    else:
        parts = [(f"{prefix}{child_name}", child) for child_name, child in module.named_children()]
        if not named and any(True for _ in module.parameters(recurse=False)):
            left_alone[name] = "it is not in an nn.Sequential"
    for part_name, part in parts:
        yield from _links(part, part_name, obstacles, left_alone, seen, named)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Run(NamedTuple):
    outputs: list[Tensor]
    flops: int


@torch.no_grad()
def _run(module: nn.Module, example_input: Any) -> _Run:
    """The outputs in eval mode, and what they take; the training flags are as before."""
    modes = [(part, part.training) for part in module.modules()]
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    module.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            outputs = list(_tensors(module(*arguments)))
    finally:
        for part, training in modes:
            part.training = training
    return _Run([output.clone() for output in outputs], counter.get_total_flops())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _checked_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference; an error where it is more than rounding."""
    if [output.shape for output in before] != [output.shape for output in after]:
        raise ValueError(f"The outputs of the smaller module for `example_input` have other shapes. {_ADVICE}")
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        if old.numel() and (old.is_floating_point() or old.is_complex()):
            differences = torch.where((old == new) | (old.isnan() & new.isnan()), 0.0, (old - new).abs())
            difference = float(differences.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
            close = 0.03 if old.dtype in (torch.float16, torch.bfloat16) else 1e-3
            if difference > close * torch.nan_to_num(old.abs(), posinf=0).max().item():
                raise ValueError(
                    f"The outputs of the smaller module for `example_input` differ by {difference:.3g}. {_ADVICE}"
                )
            largest = max(largest, difference)
    return largest
