"""The recipe for a GPU, end to end on a toy: its methods on slim networks and few images that are made up."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from names import NETWORKS
from PIL import Image

from .conftest import STUDY

SLIM = {"vgg_16": "vgg_16_slim", "vgg_16_bn": "vgg_16_bn_slim", "alexnet": "alexnet_slim"}


def write_images(folder: Path) -> None:
    """Ten classes of 32×32 pixels, each of a colour of its own."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 200, (10, 3))
    for part, count in (("train", 12), ("test", 2)):
        for label, colour in enumerate(colours):
            (folder / part / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = (colour + random.integers(0, 50, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{number}.png")


def as_toy(content: dict[str, object]) -> dict[str, object]:
    """The study on one data set, one epoch and slim networks, each method once."""
    toy = {"data": "folder:toy", "epochs": 1, "batch_size": 32, "lr_warmup": 1}
    problems = [problem for problem in content["problems"] if problem["data"] == "cifar10"]  # type: ignore[attr-defined]
    content["problems"] = [problem | toy | {"network": SLIM[problem["network"]]} for problem in problems]
    content["methods"] = [
        {name: value[0] if isinstance(value, list) else value for name, value in method.items()}
        for method in content["methods"]  # type: ignore[attr-defined]
    ]
    for method in content["methods"]:
        if "prunings" in method:  # each pruning of a deep network takes a third of a second
            method["prunings"] = 4
    content["headline"] = content["headline"][:3]  # type: ignore[index]
    return content


@pytest.mark.slow
def test_every_method_of_the_recipe_trains_and_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path / "toy")
    content = as_toy(yaml.safe_load((STUDY / "gpu.yaml").read_text()))
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(content))
    options = ["--data_root", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "2", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(STUDY / "run.py"), str(tmp_path / "gpu.yaml"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = pd.read_csv(tmp_path / "out" / "gpu" / "runs.csv")
    assert set(runs["problem"]) == {f"{NETWORKS[network]} on toy, SGD" for network in SLIM.values()}
    assert runs["test_loss"].notna().all()
    pruned = runs[runs["method"].isin(["pat_top_k", "magnitude_pruning"])]
    assert (1 - pruned["nonzeros"] / pruned["weights"]).tolist() == pytest.approx([0.9] * len(pruned), abs=2e-3)
    assert list((tmp_path / "out" / "gpu").glob("*.png"))
