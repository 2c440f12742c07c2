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
from timing import machine, median_times

from lightning_gcsr.core.chunk_layout import CPU_SIZE


def main(chunks: int = 40, repeats: int = 15) -> None:
    """Print the tables.

    Args:
        chunks: How many chunks of weights each operation goes over.
        repeats: The number of rounds.
    """
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    numbers, others = torch.randn(chunks, CPU_SIZE), torch.randn(chunks, CPU_SIZE)
    result, flags = torch.empty(CPU_SIZE), torch.empty(CPU_SIZE, dtype=torch.bool)
    gate = torch.rand(CPU_SIZE) > 0.5
    weights = gate.float()

    def over_chunks(operation: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[], object]:
        return lambda: [operation(x, y) for x, y in zip(numbers, others, strict=True)]

    times = median_times(
        {
            "compare in place, into numbers": over_chunks(lambda x, y: result.copy_(x).ge_(0)),
            "compare into booleans": over_chunks(lambda x, y: torch.ge(result.copy_(x), 0, out=flags)),
            "choose by lerp": over_chunks(lambda x, y: torch.lerp(x, y, weights, out=result)),
            "choose by torch.where": over_chunks(lambda x, y: torch.where(gate, y, x, out=result)),
            "inner product by mul and sum": over_chunks(lambda x, y: torch.mul(x, y, out=result).sum()),
            "inner product by dot": over_chunks(torch.dot),
        },
        repeats,
        cpu,
    )
    per_weight = 1e9 / numbers.numel()
    frame = pd.DataFrame({"operation": times.keys(), "ns for each weight": [t * per_weight for t in times.values()]})
    equal = torch.full((CPU_SIZE,), 0.1)
    exact = float(equal[0]) ** 2 * CPU_SIZE
    print(f"On a {machine(cpu)}, torch {torch.__version__}, in chunks of {CPU_SIZE:,}.\n")
    print(frame.to_markdown(index=False, floatfmt=".2f"))
    print("\nRelative error of the inner product of equal numbers:")
    print(f"by mul and sum {abs(float((equal * equal).sum()) / exact - 1):.0e},", end=" ")
    print(f"by dot {abs(float(torch.dot(equal, equal)) / exact - 1):.0e}")


if __name__ == "__main__":
    auto_cli(main)
