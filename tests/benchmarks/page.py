"""Put what a benchmark has printed into the page on the cost, in the place of what it printed last time.

    python tests/benchmarks/scaling.py --figure docs/images/scaling.png > scaling.txt
    python tests/benchmarks/page.py scaling scaling.txt

The page marks the place of each benchmark with comments; the text between them is replaced, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

PAGE = Path(__file__).parents[2] / "docs" / "cost.md"


def main(script: Literal["training", "cost", "operations", "scaling"], output: Path, page: Path = PAGE) -> None:
    """Replace the output of one benchmark in the page.

    Args:
        script: The benchmark.
        output: The file with what it has printed.
        page: The page.
    """
    begin, end = f"<!-- printed by tests/benchmarks/{script}.py -->", "<!-- end of what it printed -->"
    before, rest = page.read_text().split(begin, maxsplit=1)
    after = rest.split(end, maxsplit=1)[1]
    page.write_text(f"{before}{begin}\n\n{output.read_text().strip()}\n\n{end}{after}")


if __name__ == "__main__":
    auto_cli(main)
