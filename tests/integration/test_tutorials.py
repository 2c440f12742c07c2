"""The tutorials show what their words say."""

import os
import re
import subprocess
import sys
from pathlib import Path

TUTORIALS = Path(__file__).parents[2] / "examples" / "tutorials"


def output_of(name: str, folder: Path) -> str:
    """What a tutorial prints; it leaves nothing behind."""
    command = [sys.executable, TUTORIALS / f"plot_{name}.py"]
    environment = os.environ | {"MPLBACKEND": "Agg"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert list(folder.iterdir()) == []
    return run.stdout


def test_sparse_fine_tuning_survives_where_plain_l1_kills_the_backbone(tmp_path: Path) -> None:
    output = output_of("sparse_finetuning", tmp_path)
    rows = re.findall(r"^(no penalty|plain|gradient-coherent) +accuracy ([\d.]+)%, sparsity ([\d.]+)%", output, re.M)
    found = {method: (float(accuracy), float(zeros)) for method, accuracy, zeros in rows}
    assert found["no penalty"][0] > 95
    assert found["plain"][0] < 30
    assert found["plain"][1] == 100
    assert found["gradient-coherent"][0] > 90
    assert 98 < found["gradient-coherent"][1] < 100


def test_image_classifier_with_a_tenth_of_its_weights_is_about_as_accurate(tmp_path: Path) -> None:
    accuracies = re.findall(r"accuracy ([\d.]+)%, sparsity", output := output_of("image_classifier", tmp_path))
    assert min(map(float, accuracies)) > 95
    assert "sparsity 90.0%" in output


def test_faster_network_has_the_accuracy_and_a_fraction_of_the_parameters(tmp_path: Path) -> None:
    output = output_of("faster_network", tmp_path)
    rows = re.findall(r"accuracy ([\d.]+)%, ([\d,]+) parameters", output)
    (before, large), (after, small) = ((float(a), int(n.replace(",", ""))) for a, n in rows)
    assert before == after > 85
    assert small < large / 4
