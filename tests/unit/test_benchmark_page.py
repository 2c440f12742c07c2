"""The command that measures the cost of a step: where it writes, and what it compares. It is run by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_benchmark_has_one_place_in_the_page() -> None:
    import cost_page

    text = cost_page.PAGE.read_text(encoding="utf-8")
    scripts = cost_page.benchmarks(torch.device("cpu"), quick=True)
    assert text.count("<!-- printed by") == len(scripts)
    for script in scripts:
        text = cost_page.filled(text, script, f"tables of {script}")
    assert text.count("tables of") == len(scripts)
    assert "|" in text  # what is not between the marks is left


def test_ratios_that_grew_beyond_the_margin_are_named_the_worst_first() -> None:
    import cost_page

    before = {"a": 1.0, "b": 2.0, "c": 3.0, "gone": 1.0}
    now = {"a": 1.3, "b": 4.0, "c": 3.1, "new": 9.0}
    assert cost_page.slower(before, now, margin=0.2) == ["b: 2.00 -> 4.00 (+100%)", "a: 1.00 -> 1.30 (+30%)"]


@pytest.mark.parametrize(("update", "bytes_moved"), [("dual_averaging", 102), ("proximal", 62), ("gradient", 68)])
def test_a_step_moves_no_more_bytes_than_the_page_says(update: str, bytes_moved: int) -> None:
    import traffic

    found = traffic.count(300, update=update)
    found.pop(traffic.OPTIMIZER)
    assert traffic.numbers(found.values(), 300**2)[1] < bytes_moved + 0.5
