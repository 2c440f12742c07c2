"""The numbers of one step, collected chunk by chunk, from which decisions and the report are made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.coherence import GradientStatistics
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.members import Member
from lightning_gcsr.core.numerics import accumulation_dtype
from lightning_gcsr.core.sharding import whole_sums
from lightning_gcsr.core.step import statistics

__all__ = ["CollectedStatistics"]


class CollectedStatistics:
    """Sums over each tensor, taken in chunk by chunk; a tensor may be in several chunks.

    Args:
        members: The n parameters that take part.
        sharded: Whether some are spread over processes, so that sums must be added up over these.
        replication: What sums over the local part of each count for, see ``sharding.replication_factors``.
    """

    def __init__(self, members: Sequence[Member], sharded: bool, replication: Sequence[float]) -> None:
        self.members, self.sharded, self.replication = members, sharded, replication
        self._device = members[0].parameter.device
        self._positions: list[int] = []
        self._sums: list[list[Tensor]] = [[] for _ in GradientStatistics._fields]
        self._open: dict[int, list[Tensor]] = {}

    def add(self, positions: Sequence[int], chunk: Chunk, measured: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Take in what was measured of a chunk.

        Args:
            positions: Where the chunk's members stand among all.
            chunk: The chunk.
            measured: Gradient, companion, penalty gradient, and this step's gradient.
        """
        apart = {id(values): chunk.apart(values) for values in measured}
        gradients, companions, penalty_gradients, loss_gradients = (apart[id(values)] for values in measured)
        rows = statistics(gradients, companions, penalty_gradients, loss_gradients, chunk.relative)
        self._positions += positions
        for column, numbers in zip(self._sums, rows, strict=True):
            column.extend(numbers)

    def count_elements(self, positions: Sequence[int], chunk: Chunk, gate: Tensor) -> None:
        """Count the weights of a chunk that are open."""
        for position, part in zip(positions, chunk.apart(gate), strict=True):
            self._open.setdefault(position, []).append(part.sum())

    def statistics(self) -> GradientStatistics:
        """The sums over each tensor, over all processes."""
        return GradientStatistics(*self._over_processes(self._added_up()))

    def _over_processes(self, numbers: Tensor) -> Tensor:
        return whole_sums(numbers, self.replication) if self.sharded else numbers

    def _added_up(self) -> Tensor:
        """The sums of each tensor from those of its slices, shape (5, n)."""
        dtype = accumulation_dtype(self._device)
        numbers = torch.stack([number.to(self._device, dtype) for column in self._sums for number in column])
        numbers = numbers.view(len(self._sums), -1)
        count = len(self.members)
        if self._positions == list(range(count)):
            return numbers
        # The slices of one tensor follow each other.
        lengths = [len(list(group)) for _, group in itertools.groupby(self._positions)]
        parts = torch.split(numbers, lengths, dim=1)
        of_member = {i: part.sum(1) for i, part in zip(dict.fromkeys(self._positions), parts, strict=True)}
        return torch.stack([of_member[position] for position in range(count)], dim=1)

    def report(
        self, strength: float, squares: Tensor, measured: bool, opened: Tensor | None, sums: GradientStatistics | None
    ) -> GateReport:
        """What the step measured and decided.

        Args:
            strength: The strength of this step.
            squares: ⟨g,g⟩ of each tensor.
            measured: Whether there is a gate.
            opened: Whether each tensor is open, where one decision covers a tensor or more.
            sums: The sums, where they are known already.
        """
        if sums is None:
            together = torch.cat([self._added_up(), self._open_weights(squares)])
            *columns, injected = self._over_processes(together).unbind()
            sums = GradientStatistics(*columns)
        if opened is not None:
            sizes = [member.size * (strength > 0) for member in self.members]
            injected = torch.stack([is_open * size for is_open, size in zip(opened, sizes, strict=True)]).to(squares)
        return GateReport(
            names=tuple(member.name for member in self.members),
            sizes=tuple(member.size for member in self.members),
            statistics=sums._replace(loss_gradient_square=squares),
            injected_weights=injected,
            current_strength=strength,
            measured=measured,
        )

    def _open_weights(self, like: Tensor) -> Tensor:
        """The number of open weights of each tensor, as far as this process holds it, shape (1, n)."""
        counts = [self._open.get(position, []) for position in range(len(self.members))]
        return torch.stack([sum((c.to(like) for c in parts), torch.zeros_like(like[0])) for parts in counts]).unsqueeze(
            0
        )
