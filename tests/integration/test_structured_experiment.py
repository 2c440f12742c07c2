"""The example that compares ways to smaller networks: one row for each training, made once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "structured_experiment.py"


def write_image_folder(root: Path) -> None:
    """Noise of ten colours: 10 images of each to train on, 4 to test on."""
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for label in range(10):
            folder = root / "cifar10" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(20 * label, 20 * label + 60, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def run_example(root: Path) -> str:
    options = {
        "out": root / "rows.csv",
        "data_root": root,
        "networks": "[vision_transformer]",
        "methods": "[coupled_groups, small_from_the_start]",
        "levels": "[30]",
        "epochs": "{vision_transformer: 10}",
        "train_images": 80,
        "fine_tuning": 0.25,
        "delay": 0.2,
    }
    words = [word for name, value in options.items() if name != "out" for word in (f"--{name}", str(value))]
    command = [sys.executable, str(EXAMPLE), str(options["out"]), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_each_training_adds_one_row(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    first = run_example(tmp_path)
    rows = pd.read_csv(tmp_path / "rows.csv").set_index("method")
    assert list(rows.index) == ["coupled_groups", "small_from_the_start"]
    assert (rows.mflop < 0.9 * rows.mflop_dense).all()
    assert rows.parameters.nunique() == 1, "both have the shape that coupled groups left"
    assert run_example(tmp_path).splitlines() == first.splitlines()[-4:], "only the table: no row is made twice"
