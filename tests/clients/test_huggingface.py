"""The examples for a Hugging Face Trainer and for Accelerate: sparse, and resumed as if never stopped."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the other packages
]


def test_accelerate_loop_reaches_the_target_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra `clients` is not installed")
    main = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))["main"]
    whole = main(str(tmp_path / "whole"))
    main(str(tmp_path / "parts"), epochs=10)
    resumed = main(str(tmp_path / "parts"), done=10)
    zeros = sum(int((p == 0).sum()) for p in whole.parameters() if p.dim() > 1)
    assert zeros / (16 * 64 + 64 * 4) == pytest.approx(0.8, abs=0.02)
    assert sum(int((p == 0).sum()) for p in resumed.parameters() if p.dim() > 1) == pytest.approx(zeros, abs=26)
