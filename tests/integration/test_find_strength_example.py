"""The example that finds a strength for the digits does what it says, on few epochs."""

import re
import subprocess
import sys
from pathlib import Path

from lightning_gcsr import StrengthFinderResult

EXAMPLE = Path(__file__).parents[2] / "examples" / "find_strength.py"


def test_example_finds_a_strength_and_writes_figure_and_result(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--epochs", "3", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "strength.png").read_bytes().startswith(b"\x89PNG")
    result = StrengthFinderResult.load(tmp_path / "out" / "strength.json")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"strength.png", "strength.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    assert f"Suggested strength: {result.suggestion().strength:.3g}, " in done.stdout
    # What the gate buys.
    assert result.tolerance_level.strength > result.plain_tolerance_level.strength
    assert f"with the gate: learned at {result.tolerance_level.strength:.3g}, fails" in done.stdout
    assert f"plain: learned at {result.plain_tolerance_level.strength:.3g}, fails" in done.stdout
    without, with_penalty = map(float, re.findall(r"^Trained with .*: test accuracy (.+) %", done.stdout, re.MULTILINE))
    assert without > 85
    assert with_penalty > without - 5
