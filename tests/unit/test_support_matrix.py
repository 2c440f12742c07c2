"""The support matrix of the documentation says nothing that a test does not show."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
MATRIX = TESTS.parent / "docs" / "support.md"


def test_every_test_that_the_matrix_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", MATRIX.read_text()))
    existing = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in TESTS.rglob("test_*.py")), re.M))
    assert named
    assert named <= existing


def test_every_cell_that_says_tested_names_a_test() -> None:
    for line in MATRIX.read_text().splitlines():
        for cell in line.split("|"):
            if cell.strip().startswith("tested"):
                assert re.search(r"`test_\w+`", cell), cell
