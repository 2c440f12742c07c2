"""The numbers that the README, the results and the cards quote from the studies are those of their reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"
QUOTING = [README, DOCS / "results" / "index.md", *sorted((DOCS / "cards").glob("*.md"))]

NUMBER = re.compile(r"\d+\.\d+ ± \d+\.\d+(?: \([\d.,]+×\))?|[+-]\d+\.\d+ \([^)]+\)")


def of_the_studies() -> set[str]:
    """Every mean with its error, and every lead, as the reports print them."""
    return {number for page in DOCS.glob("results/*/*.md") for number in NUMBER.findall(page.read_text())}


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.stem)
def test_numbers_are_those_of_the_studies(page: Path) -> None:
    assert set(NUMBER.findall(page.read_text())) <= of_the_studies()


def test_there_are_numbers_to_compare() -> None:
    assert len(NUMBER.findall(README.read_text())) > 5


def test_readme_has_the_answer_of_the_comparison_word_for_word() -> None:
    begin, end = (f"<!-- {word} answer of docs/results/comparison/index.md -->" for word in ("the", "end of the"))
    answer = README.read_text().split(begin)[1].split(end)[0]
    page = (DOCS / "results" / "comparison" / "index.md").read_text()
    lines = [line for line in answer.splitlines() if line and not line.startswith("![")]
    assert lines
    assert [line for line in lines if line not in page] == []
