"""The sums of one step, collected chunk by chunk, from which decisions and the report are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.members import Member
from lightning_gcsr.core.numerics import accumulation_dtype, inner_products
from lightning_gcsr.core.sharding import whole_sums

__all__ = ["CollectedSums"]


class CollectedSums:
    """Sums over each tensor, taken in chunk by chunk; a tensor may be in several chunks that follow each other.

    Args:
        members: The n parameters that take part, in the order of the chunks.
        replication: What sums over the local part of each count for, see ``sharding.replication_factors``.
        sharded: Whether some are spread over processes, so that sums must be added up over these.
    """

    def __init__(self, members: Sequence[Member], replication: Sequence[float], sharded: bool) -> None:
        self._device, self._replication, self._sharded = members[0].parameter.device, replication, sharded
        self._slices: Counter[str] = Counter()
        self._columns: list[list[Tensor]] = [[] for _ in range(6)]

    def add(
        self,
        chunk: Chunk,
        gradient: Tensor,
        compared: Tensor,
        penalty_gradient: Tensor,
        loss_gradient: Tensor,
        gate: Tensor | None,
    ) -> None:
        """Take in what was measured of a chunk.

        Args:
            chunk: The chunk.
            gradient: What coherence is measured on: this step's gradient or its average.
            compared: Its companion b.
            penalty_gradient: The penalty gradient r, without strength.
            loss_gradient: This step's gradient.
            gate: The gates of the weights, where each has its own.
        """
        apart = {id(v): chunk.apart(v) for v in (gradient, compared, penalty_gradient, loss_gradient)}
        g, b, r = (apart[id(v)] for v in (gradient, compared, penalty_gradient))
        # r counts with the strength of its tensor over that of the model.
        relative, squares = chunk.relative, inner_products(g, g)
        penalty_squares = [square * relative**2 for square in inner_products(r, r)]
        own = compared is penalty_gradient
        sums = [
            squares,
            [product * relative if own else product for product in inner_products(g, b)],
            penalty_squares if own else inner_products(b, b),
            penalty_squares,
            squares if loss_gradient is gradient else inner_products(*[apart[id(loss_gradient)]] * 2),
            [] if gate is None else [part.sum() for part in chunk.apart(gate)],
        ]
        self._slices.update(member.name for member in chunk.members)
        for column, numbers in zip(self._columns, sums, strict=True):
            column.extend(numbers)

    def sums(self) -> list[Tensor]:
        """The fields of ``GradientStatistics`` and, where weights have gates, the number of open ones; each (n,).

        Over all processes, which takes one collective where parameters are sharded.
        """
        dtype, columns = accumulation_dtype(self._device), [column for column in self._columns if column]
        numbers = [number for column in columns for number in column]
        if len({(number.dtype, number.device) for number in numbers}) > 1:
            numbers = [number.to(self._device, dtype) for number in numbers]
        table = torch.stack(numbers).to(self._device, dtype).view(len(columns), -1)  # converted at once where possible
        if table.shape[1] > len(self._slices):
            of_members = torch.split(table, list(self._slices.values()), dim=1)
            table = torch.stack([part.sum(1) for part in of_members], dim=1)
        return list((whole_sums(table, self._replication) if self._sharded else table).unbind())
