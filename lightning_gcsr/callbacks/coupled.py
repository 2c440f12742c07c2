"""The groups of a penalty over coupled groups, found in the module of a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_gcsr._lightning import LightningModule, Trainer, misconfiguration
from lightning_gcsr.core.coupled_penalty import CoupledGroupLasso
from lightning_gcsr.core.coupled_selection import check_whole
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.structured.coupled_groups import coupled_groups
from lightning_gcsr.validation import listed

__all__ = ["with_groups"]

_ADVICE = (
    "Pass the groups of a part of the module:"
    " CoupledGroupLasso(coupled_groups(module.part, example_input, prefix='part.'))."
)


def with_groups(penalty: Penalty, trainer: Trainer, module: LightningModule) -> Penalty:
    """The penalty; one over coupled groups with the groups of this module.

    Raises:
        MisconfigurationException: If there is no example input, if the weights are sharded, or if the module cannot be
            followed or has no units that can be removed.
    """
    if not isinstance(penalty, CoupledGroupLasso) or penalty.groups is not None:
        return penalty
    try:
        check_whole(penalty, module.named_parameters())
    except ValueError as error:
        raise misconfiguration(trainer, str(error)) from error
    example = penalty.example_input
    if example is None:
        example = module.example_input_array
    if example is None:
        raise misconfiguration(
            trainer,
            f"{penalty!r} needs an example input to find its groups by. Set `example_input_array` of the"
            " LightningModule, or write CoupledGroupLasso(example_input=...).",
        )
    try:
        found = coupled_groups(module, _arguments(module, example))
    except ValueError as error:
        raise misconfiguration(trainer, f"{penalty!r} cannot follow the module. {error} {_ADVICE}") from error
    if not found:
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        stay = f" Units with frozen parameters stay; frozen are {listed(frozen)}." if frozen else ""
        raise misconfiguration(
            trainer, f"{penalty!r} found no unit that can be removed; `shrink_units` says why.{stay} {_ADVICE}"
        )
    return penalty.over(found)


def _arguments(module: LightningModule, example: Any) -> Any:
    """The example as positional arguments, on the module's device."""

    def moved(part: Any) -> Any:
        return part.to(module.device) if isinstance(part, Tensor) else part

    example = tree_map(moved, example)
    if isinstance(example, Mapping):  # which Lightning passes by name
        return inspect.signature(module.forward).bind(**example).args
    return tuple(example) if isinstance(example, list) else example
