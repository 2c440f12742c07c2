"""How often a step goes over the weights, and how many bytes of tensors its operations read and write.

    python tests/benchmarks/traffic.py
    python tests/benchmarks/traffic.py --update proximal

Nothing is timed: every operation is counted as torch dispatches it, on one tensor, so that the numbers are the same on
every machine. An operation in place reads and writes its tensor. On a CPU most of these bytes come from the cache,
because a chunk of the weights fits it; what a CPU copies within an operation on tensors of several dtypes is not
counted. The least is what a step moves however it is written: each number that outlives it is read at most once and
written at most once before the optimizer's step, and likewise after it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Optional, get_args

import pandas as pd
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from contestants import STRENGTH, optimizer_of
from timing import Benchmark

from lightning_gcsr import CoherentRegularizer, Schedule

OPTIMIZER = "the optimizer's step"
OVERWRITING = {"copy_", "_foreach_copy_", "zero_", "fill_"}
"""Operations that do not read what they write to."""


class Traffic(TorchDispatchMode):
    """Counts what operations do; views and what was made within are told from tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()
        """By operation, the numbers in the largest tensor of each call."""
        self.bytes: Counter[str] = Counter()
        """By operation, the bytes of the tensors that it reads and writes."""
        self._made: set[int] = set()
        self._read: dict[tuple[int, int], int] = {}
        self._written: dict[tuple[int, int], int] = {}

    @property
    def least(self) -> int:
        """The bytes of what outlives the step, each read once where it was read and written once where it changed."""
        return sum(self._read.values()) + sum(self._written.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema, name = func._schema, func._schema.name.removeprefix("aten::")
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return result  # a view
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        changed = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        overwrites = name in OVERWRITING or "out" in changed
        read = tensors(v for k, v in given.items() if k not in changed or not overwrites)
        written = tensors(v for k, v in given.items() if k in changed) or tensors([result])
        if not changed:
            self._made |= {tensor.untyped_storage().data_ptr() for tensor in written}
        self.numbers[name] += max((tensor.numel() for tensor in (*read, *written)), default=0)
        self.bytes[name] += sum(tensor.nbytes for tensor in (*read, *written))
        self._note(self._read, [t for t in read if place(t) not in self._written])
        self._note(self._written, written)
        return result

    def _note(self, where: dict[tuple[int, int], int], touched: Iterable[Tensor]) -> None:
        known = (t for t in touched if t.untyped_storage().data_ptr() not in self._made)
        where |= {place(tensor): tensor.nbytes for tensor in known}


def place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies in memory."""
    return tensor.data_ptr(), tensor.nbytes


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among these values and in lists of them."""
    flat = [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
    return [value for value in flat if isinstance(value, Tensor)]


def counted(call: Callable[[], object]) -> Traffic:
    """What one call does."""
    with Traffic() as traffic:
        call()
    return traffic


def count(size: int, **setting: Any) -> dict[str, Traffic]:
    """What the optimizer does in its third step, and the regularizer before and after it."""
    module = nn.ParameterList([nn.Parameter(torch.randn(size, size))])
    module[0].grad = torch.randn(size, size)
    optimizer = optimizer_of(module, "SGD")
    regularizer = CoherentRegularizer(module, strength=STRENGTH, schedule=Schedule(warmup=0), include=["."], **setting)
    for _ in range(3):
        found = {
            "before": counted(lambda: regularizer.before_step(optimizer, report=False)),
            OPTIMIZER: counted(optimizer.step),
            "after": counted(lambda: regularizer.after_step(optimizer)),
        }
    return found


Update = Literal["dual_averaging", "proximal", "gradient"]
COLUMNS = ["passes over the weights", "bytes for each weight", "the least"]


def numbers(traffic: Iterable[Traffic], weights: int) -> list[float]:
    """A row of the table."""
    columns = [(sum(t.numbers.values()), sum(t.bytes.values()), t.least) for t in traffic]
    return [sum(column) / weights for column in zip(*columns, strict=True)]


def benchmark(size: int = 2000) -> Benchmark:
    """The optimizer beside what the regularizer does before and after its step, with the default gate."""
    rows: dict[str, list[float]] = {}
    for update in get_args(Update):
        found = count(size, update=update)
        rows["SGD with momentum"] = numbers([found.pop(OPTIMIZER)], size**2)
        rows[update.replace("_", " ")] = numbers(found.values(), size**2)
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
    text = f"One tensor of {size**2:,} weights in float32, torch {torch.__version__}.\n\n"
    ratios = {f"traffic: {name}": row[1] / rows["SGD with momentum"][1] for name, row in rows.items()}
    return Benchmark(text + frame.to_markdown(floatfmt=".0f"), ratios)


def operations(update: Update, size: int) -> str:
    """The table of all operations that go over the weights."""
    rows = [
        [what, name, traffic.numbers[name] / size**2, moved / size**2]
        for what, traffic in count(size, update=update).items()
        for name, moved in traffic.bytes.most_common()
        if moved >= size**2 / 100
    ]
    return str(pd.DataFrame(rows, columns=["when", "operation", *COLUMNS[:2]]).to_markdown(index=False, floatfmt=".0f"))


def main(size: int = 2000, update: Optional[Update] = None) -> None:
    """Print the table, or the operations of one update.

    Args:
        size: The root of the number of weights.
        update: Whose operations are printed.
    """
    print(benchmark(size).text if update is None else operations(update, size))


if __name__ == "__main__":
    auto_cli(main)
