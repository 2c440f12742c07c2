"""The tutorials show what their words say."""

import os
import re
import subprocess
import sys
from pathlib import Path

TUTORIALS = Path(__file__).parents[2] / "examples" / "tutorials"


def test_sparse_fine_tuning_survives_where_plain_l1_kills_the_backbone(tmp_path: Path) -> None:
    script = TUTORIALS / "plot_sparse_finetuning.py"
    environment = os.environ | {"MPLBACKEND": "Agg"}
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(no penalty|plain|gradient-coherent) +accuracy ([\d.]+)%, zeros ([\d.]+)%", run.stdout, re.M)
    found = {method: (float(accuracy), float(zeros)) for method, accuracy, zeros in rows}
    assert found["no penalty"][0] > 95
    assert found["plain"][0] < 30
    assert found["plain"][1] == 100
    assert found["gradient-coherent"][0] > 90
    assert 98 < found["gradient-coherent"][1] < 100
    assert list(tmp_path.iterdir()) == []
