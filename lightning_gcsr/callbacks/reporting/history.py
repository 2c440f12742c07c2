"""Values of layers over the steps of a training, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["History"]


class _Column(NamedTuple):
    number: int
    """How many columns were recorded before it."""
    step: int
    values: Mapping[str, float]


class History:
    """A table of layers × steps. When it is full, every second column goes, and half as many are kept from then on.

    The last column is always there. Columns are in the order of their steps: one of a step that is not after those
    before it takes their place, so that a training that goes on from a checkpoint leaves nothing twice.

    Args:
        limit: The number of columns that are kept, at least 2.

    Example:
        >>> history = History(limit=4)
        >>> for step in range(11):
        ...     history.record(step, {"layer": step / 10})
        >>> history.steps
        [0, 4, 8, 10]
        >>> history.record(4, {"layer": 0.5, "new layer": 1.0})
        >>> history.steps, history.table().tolist()
        ([0, 4], [[0.0, 0.5], [nan, 1.0]])
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self._every = 1
        self._columns: list[_Column] = []

    @property
    def steps(self) -> list[int]:
        """The step of each column."""
        return [column.step for column in self._columns]

    @property
    def names(self) -> list[str]:
        """The layers, in the order in which they came."""
        return list(dict.fromkeys(name for column in self._columns for name in column.values))

    def table(self) -> Tensor:
        """The values, shape (layers, steps), NaN where there is none."""
        rows = [[column.values.get(name, math.nan) for column in self._columns] for name in self.names]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self._columns))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add a column."""
        while self._columns and self._columns[-1].step >= step:
            self._columns.pop()
        number = self._columns[-1].number + 1 if self._columns else 0
        if self._columns and self._columns[-1].number % self._every:
            self._columns.pop()  # it was there only because it was the last
        self._columns.append(_Column(number, step, dict(values)))
        while len(self._columns) > self.limit:
            self._every *= 2
            *others, last = self._columns
            self._columns = [column for column in others if column.number % self._every == 0] + [last]

    def state_dict(self) -> dict[str, Any]:
        """Primitives and tensors, which a checkpoint gives back when it is loaded weights-only."""
        return {
            "every": self._every,
            "numbers": [column.number for column in self._columns],
            "steps": self.steps,
            "names": self.names,
            "table": self.table(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self._every = state["every"]
        columns = zip(state["numbers"], state["steps"], state["table"].T.tolist(), strict=True)
        self._columns = [
            _Column(number, step, {n: v for n, v in zip(state["names"], values, strict=True) if not math.isnan(v)})
            for number, step, values in columns
        ]
