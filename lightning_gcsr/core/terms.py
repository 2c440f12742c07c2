"""A term: what one regularized parameter contributes to one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gcsr.core.optimizers import stepped_parameters
from lightning_gcsr.core.sharding import is_sharded, local_part, shares, whole_gradient

__all__ = ["Term", "collect_terms"]


@dataclass
class Term:
    """One parameter in one step: of a sparse gradient the rows that it touches, of a sharded one what lies here."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor
    """The gradient as the optimizer will see it, with loss scale; a change in place reaches the optimizer."""
    rows: Tensor | None
    """The touched rows of a sparse gradient, shape (k,); ``None`` for a dense one."""
    relative: float
    """What the strength is multiplied by for this parameter."""
    group: dict[str, Any]
    loss_scale: float | Tensor
    share: float = 1.0
    """What sums over the local part of a sharded parameter count, see ``distributed.shares``."""

    @property
    def size(self) -> int:
        """The number of weights that take part, over all processes."""
        return self.parameter.numel() if self.rows is None else self.gradient.numel()

    @property
    def is_scaled(self) -> bool:
        """Whether there is a loss scale on the gradient."""
        return isinstance(self.loss_scale, Tensor) or self.loss_scale != 1

    @property
    def weight(self) -> Tensor:
        """The weights that take part; of a dense gradient the parameter itself, of a sparse one a copy of its rows."""
        weight = local_part(self.parameter.detach())
        return weight if self.rows is None else weight.index_select(0, self.rows)


def collect_terms(
    optimizer: Optimizer, names: Mapping[int, str], relative: Mapping[str, float], loss_scale: float | Tensor
) -> list[Term]:
    """The terms of all regularized parameters that the optimizer steps and that have a gradient.

    A sparse gradient is coalesced first: its values may be summands, and sums and signs need the totals.

    Raises:
        ValueError: If a sparse gradient is not one of rows.
    """
    terms = []
    for name, parameter, group in stepped_parameters(optimizer, names):
        if parameter.grad is None:
            continue
        rows, gradient = None, parameter.grad
        if gradient.is_sparse:
            if gradient.sparse_dim() != 1:
                raise ValueError(
                    f"The gradient of {name!r} is sparse in {gradient.sparse_dim()} dimensions; only sparse rows are"
                    " supported, as an Embedding has. `exclude` the parameter, or make its gradient dense."
                )
            parameter.grad = gradient.coalesce()
            rows, gradient = parameter.grad.indices()[0], parameter.grad.values()
        elif is_sharded(parameter):
            parameter.grad = whole_gradient(parameter)
            gradient = local_part(parameter.grad)  # may be empty, but all processes must list the same terms
        term = Term(name, parameter, gradient, rows, relative[name], group, loss_scale)
        if term.size > 0:
            terms.append(term)
    for term, share in zip(terms, shares(term.parameter for term in terms), strict=True):
        term.share = share
    return terms
