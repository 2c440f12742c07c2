"""Each example of a hand-over runs, and what is handed over has the outputs of the shrunk network."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "handover"
BOTH = ["ResNet-20", "ViT"]


def skip_without(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("torch_export", BOTH),
        ("torch_script", BOTH),
        ("onnx_file", BOTH),
        ("torch_compile", ["ResNet-20"]),
        ("int8", ["ViT"]),
        ("safetensors_file", BOTH),
    ],
)
def test_what_is_handed_over_has_the_same_outputs(script: str, names: list[str], tmp_path: Path) -> None:
    skip_without("torchvision")
    if script == "onnx_file":
        skip_without("onnx", "onnxscript", "onnxruntime")
    if script == "torch_compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    command = [sys.executable, str(FOLDER / f"{script}.py")]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"^(\S+), .*: ([\d.]+) ms dense, ([\d.]+) ms shrunk, ([\d.]+) ms handed over; outputs differ by (\S+)$",
        done.stdout,
        re.MULTILINE,
    )
    assert [name for name, *_ in found] == names
    assert max(float(difference) for *_, difference in found) < (0.05 if script == "int8" else 1e-4)
