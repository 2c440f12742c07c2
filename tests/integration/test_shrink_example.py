"""The examples that shrink a network do what they say: LeNet-5 on few made-up images, a ResNet-20 untrained."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[2] / "examples" / "shrink_units.py"


def write_images(folder: Path, prefix: str, count: int) -> None:
    """Images in the format of MNIST: a bright square, whose place is the class, on noise."""
    random = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.uint8) % 10
    images = random.integers(0, 50, (count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[7 * row : 7 * row + 7, 7 * column : 7 * column + 7] = 255
    header = np.array([0x803, count, 28, 28], ">i4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())


def test_example_shrinks_the_network_and_compares(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_images(raw, "train", 800)
    write_images(raw, "t10k", 300)
    options = ["--train_images", "640", "--epochs", "8", "--target_sparsity", "0.7"]
    command = [sys.executable, str(EXAMPLE), "--data_root", str(tmp_path / "data"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    units = [int(after) for _, after in re.findall(r"(\d+) → (\d+)", done.stdout)]
    assert len(units) == 3
    assert sum(units) < 300
    accuracies = re.findall(r"test accuracy in % +│ ([\d.]+) +│ ([\d.]+)", done.stdout)
    assert float(accuracies[0][0]) > 50
    assert accuracies[0][0] == accuracies[0][1]
    assert float(re.findall(r"parameters .* │ ([\d.]+)×", done.stdout)[0]) > 2


def test_speed_of_given_widths_is_printed_without_a_training(tmp_path: Path) -> None:
    options = ["--widths", "[8, 8, 8, 16, 16, 16, 32, 32, 24]", "--batches", "[1, 2]", "--repeats", "2"]
    command = [sys.executable, str(EXAMPLE.with_name("structured_speed.py")), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "51% fewer operations"
    assert [line.split()[0] for line in lines] == ["1", "2"]
    for line in lines:
        dense, less, ratio = (float(number) for number in re.findall(r"(\d+\.\d+)", line))
        assert abs(ratio - dense / less) < 0.1 * ratio
