"""Why a step is made of the operations it is made of: the same done in two ways, and what that takes on a CPU.

python tests/benchmarks/operations.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent))
from timing import Benchmark, machine, time_in_turns

from lightning_gcsr.core.chunk_layout import CPU_SIZE


def benchmark(chunks: int = 40, rounds: int = 15) -> Benchmark:
    """The tables; nothing in them depends on this package.

    Args:
        chunks: How many chunks of weights each operation goes over.
        rounds: The number of rounds.
    """
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    numbers, others = torch.randn(chunks, CPU_SIZE), torch.randn(chunks, CPU_SIZE)
    result, flags = torch.empty(CPU_SIZE), torch.empty(CPU_SIZE, dtype=torch.bool)
    gate = torch.rand(CPU_SIZE) > 0.5
    weights = gate.float()

    def over_chunks(operation: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[], object]:
        return lambda: [operation(x, y) for x, y in zip(numbers, others, strict=True)]

    times = time_in_turns(
        {
            "compare in place, into numbers": over_chunks(lambda x, y: result.copy_(x).ge_(0)),
            "compare into booleans": over_chunks(lambda x, y: torch.ge(result.copy_(x), 0, out=flags)),
            "choose by lerp": over_chunks(lambda x, y: torch.lerp(x, y, weights, out=result)),
            "choose by torch.where": over_chunks(lambda x, y: torch.where(gate, y, x, out=result)),
            "inner product by mul and sum": over_chunks(lambda x, y: torch.mul(x, y, out=result).sum()),
            "inner product by dot": over_chunks(torch.dot),
        },
        rounds,
        cpu,
    )
    per_weight = 1e9 / numbers.numel()
    names = list(times.seconds)
    frame = pd.DataFrame({"operation": names, "ns for each weight": [times.median(n) * per_weight for n in names]})
    equal = torch.full((CPU_SIZE,), 0.1)
    exact = float(equal[0]) ** 2 * CPU_SIZE
    by_sum, by_dot = float((equal * equal).sum()), float(torch.dot(equal, equal))
    errors = f"by mul and sum {abs(by_sum / exact - 1):.0e}, by dot {abs(by_dot / exact - 1):.0e}"
    text = [
        f"On a {machine(cpu)}, torch {torch.__version__}, in chunks of {CPU_SIZE:,}.",
        frame.to_markdown(index=False, floatfmt=".2f"),
        f"Relative error of the inner product of equal numbers: {errors}.",
    ]
    return Benchmark("\n\n".join(text), {})


def main(chunks: int = 40, rounds: int = 15) -> None:
    """Print the tables.

    Args:
        chunks: How many chunks of weights each operation goes over.
        rounds: The number of rounds.
    """
    print(benchmark(chunks, rounds).text)


if __name__ == "__main__":
    auto_cli(main)
