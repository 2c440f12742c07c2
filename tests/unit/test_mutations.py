"""The faults of ``tests/mutations.py``: that each can still be made. Whether the tests notice them takes minutes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_mutation_finds_its_text_once_and_its_tests() -> None:
    spec = importlib.util.spec_from_file_location("mutations", TESTS / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    mutations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutations)
    core = TESTS.parent / "lightning_gcsr" / "core"
    wrong = [
        mutation.what
        for mutation in mutations.MUTATIONS
        if (core / f"{mutation.module}.py").read_text(encoding="utf-8").count(mutation.text) != 1
        or not all((TESTS / "unit" / f"test_{name}.py").exists() for name in mutation.tests.split())
    ]
    assert not wrong, f"let these mutations follow the code: {wrong}"
