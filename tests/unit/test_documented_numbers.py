"""The numbers that the documentation quotes from the study are in the tables of the study."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "results" / "index.md", *sorted((DOCS / "cards").glob("*.md"))]

NUMBER = re.compile(r"\d+\.\d ± \d+\.\d(?: \([\d.,]+×\))?")


def in_the_study() -> set[str]:
    """Every mean with its error, as the pages of the study print it, and with its compression, from their CSV files."""
    found = {number for page in DOCS.glob("results/*/index.md") for number in NUMBER.findall(page.read_text())}
    for path in DOCS.glob("results/*/summary.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                mean, error = float(row["test_accuracy_zeroed"]), float(row["test_accuracy_zeroed_error"])
                compression = float(row["compression"] or "nan")
                rounded = float(f"{compression:.3g}")
                found.add(f"{100 * mean:.1f} ± {100 * error:.1f} ({rounded:,g}×)")
    return found | {number.split(" (")[0] for number in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_numbers_are_those_of_the_study(page: Path) -> None:
    assert set(NUMBER.findall(page.read_text())) <= in_the_study()


def test_there_are_numbers_to_compare() -> None:
    assert sum(len(NUMBER.findall(page.read_text())) for page in PAGES) > 50
