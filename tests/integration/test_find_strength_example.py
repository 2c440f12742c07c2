"""The example finds a trade-off for a CNN under AdamW with a one-cycle schedule, on few epochs."""

import re
import subprocess
import sys
from pathlib import Path

from lightning_gcsr import StrengthFinderResult

EXAMPLE = Path(__file__).parents[2] / "examples" / "find_strength.py"


def test_example_finds_a_trade_off_and_writes_figure_and_result(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--epochs", "6", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "target.png").read_bytes().startswith(b"\x89PNG")
    result = StrengthFinderResult.load(tmp_path / "out" / "target.json")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"target.png", "target.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    assert f"val_acc against {result.trials[0].metric:.4g} without a penalty: {result.trade_off}" in done.stdout
    tenth = next(trial for trial in result.trials if trial.target_sparsity == 0.9)
    assert tenth.compression > 9
    assert tenth.metric > result.trials[0].metric - 0.08  # in so few epochs
    suggestion = result.suggestion()
    assert f"Suggested: {suggestion.reason}." in done.stdout
    assert "next: " in suggestion.reason
    without, with_penalty = map(float, re.findall(r"^Trained with .*: test accuracy (.+) %", done.stdout, re.MULTILINE))
    assert without > 90
    assert with_penalty > without - 5
