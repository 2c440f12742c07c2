"""The examples for several devices and for the command line do what their own words say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
MULTI_DEVICE = EXAMPLES / "multi_device.py"
CLI = EXAMPLES / "cli" / "main.py"
YAML = EXAMPLES / "cli" / "digits.yaml"


def run(folder: Path, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script as a user calls it, from a folder that takes whatever it writes."""
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def warnings_in(stderr: str) -> list[str]:
    """The lines that Python's warnings leave, as Lightning formats them."""
    lines = [line for line in stderr.splitlines() if re.search(r"\.py:\d+: ", line)]
    return [line for line in lines if "GPU available but not used" not in line]


# -- several devices -------------------------------------------------------------------------------------------------


def train_on_devices(folder: Path, devices: int, *arguments: object) -> str:
    """What the example prints at its end."""
    done = run(folder, MULTI_DEVICE, "--accelerator", "cpu", "--devices", devices, "--epochs", 4, *arguments)
    assert done.returncode == 0, done.stderr
    assert warnings_in(done.stderr) == []
    return done.stdout


def figures(output: str) -> tuple[list[str], float]:
    """Accuracy, sparsity and ratio as the table shows them, and the sum of |w|."""
    [row] = [line for line in output.splitlines() if "Strategy " in line]
    [magnitude] = re.findall(r"^Sum of \|w\| over all parameters: (.+)$", output, flags=re.MULTILINE)
    return row.split()[-3:], float(magnitude)


@pytest.mark.distributed
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    one = train_on_devices(tmp_path, 1, "--precision", "64-true")
    two = train_on_devices(
        tmp_path, 2, "--precision", "64-true", "--strategy", "ddp", "--accumulate_grad_batches", 2, "--output", "ddp"
    )
    assert "1 × cpu   SingleDeviceStrategy" in one
    assert "There is one process, so there are no weights to compare with" in one
    assert "2 × cpu   DDPStrategy" in two
    assert "the same 64 images as on one device" in two
    assert "All 2 processes hold the same weights" in two
    (table, magnitude), (table_of_two, magnitude_of_two) = figures(one), figures(two)
    assert table_of_two == table
    assert magnitude_of_two == pytest.approx(magnitude, rel=1e-10)
    accuracy, zeros, _ = table
    assert float(accuracy.rstrip("%")) > 85
    assert float(zeros.rstrip("%")) > 20
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "ddp"}
    assert (tmp_path / "runs" / "multi_device" / "version_0").is_dir()


@pytest.mark.distributed
def test_processes_that_drift_apart_are_found_out(tmp_path: Path) -> None:
    script = tmp_path / "drifting.py"
    script.write_text(
        f"""
import sys

sys.path.insert(0, {str(EXAMPLES)!r})

import jsonargparse
import multi_device


class Drifting(multi_device.DigitsClassifier):
    def on_fit_end(self):
        if self.global_rank == 1:
            self.net[0].weight.data[0, 0] += 1e-6


multi_device.DigitsClassifier = Drifting
jsonargparse.auto_cli(multi_device.main, as_positional=False)
"""
    )
    done = run(tmp_path, script, "--accelerator", "cpu", "--devices", 2, "--epochs", 1)
    assert done.returncode == 1, done.stderr
    assert "error: the 2 processes do not hold the same weights" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hold the same weights" not in done.stdout


def test_devices_that_cannot_share_a_step_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, MULTI_DEVICE, "--accelerator", "cpu", "--devices", 65)
    assert done.returncode == 2
    assert "cannot share the 64 images of a step" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from digits.yaml with the changes that the module's docstring shows."""
    folder = tmp_path_factory.mktemp("cli")
    arguments = [
        *("--trainer.max_epochs", 10),
        *("--trainer.callbacks.strength", 0.02),
        *("--trainer.callbacks.gate.tolerance", 0.2),
        *("--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval", "step"),
    ]
    done = run(folder, CLI, "fit", "--config", YAML, *arguments)
    assert done.returncode == 0, done.stderr
    assert "L1() with strength 0.02" in done.stderr + done.stdout
    assert warnings_in(done.stderr) == []
    assert [path.name for path in folder.iterdir()] == ["runs"]
    return folder / "runs" / "cli" / "version_0"


def test_fit_from_the_configuration_file_ends_sparse_and_accurate(fitted: Path) -> None:
    events = EventAccumulator(str(fitted)).Reload()
    assert events.Scalars("test_accuracy")[-1].value > 0.85
    assert events.Scalars("sparsity/model")[-1].value > 0.8
    assert len(events.Scalars("gcsr/injected")) == 21  # of 210 steps


def test_command_line_overrides_the_configuration_file(fitted: Path) -> None:
    callbacks = yaml.safe_load((fitted / "config.yaml").read_text())["trainer"]["callbacks"]
    by_name = {callback["class_path"].rpartition(".")[2]: callback["init_args"] for callback in callbacks}
    assert by_name["GradientCoherentRegularization"]["strength"] == 0.02
    assert by_name["GradientCoherentRegularization"]["gate"]["tolerance"] == 0.2
    assert by_name["LearningRateMonitor"]["logging_interval"] == "step"
    events = EventAccumulator(str(fitted)).Reload()
    assert [event.value for event in events.Scalars("gcsr/strength")] == pytest.approx(
        [0.02 * min(1.0, (10 * i + 9) / 63) for i in range(21)]  # it rises over the first 0.3 of 210 steps
    )


def test_sparsest_checkpoint_validates_from_the_same_file(tmp_path: Path, fitted: Path) -> None:
    checkpoint = fitted / "checkpoints" / "sparsest.ckpt"
    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    done = run(tmp_path, CLI, "validate", "--config", YAML, "--ckpt_path", checkpoint)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.findall(r"test_accuracy\W+([\d.]+)", done.stdout)[0])
    assert epoch > 5  # the weights collapse only with time
    events = EventAccumulator(str(fitted)).Reload()
    assert accuracy == pytest.approx(events.Scalars("test_accuracy")[epoch].value)


def test_wrong_choice_exits_with_a_message_that_names_the_choices(tmp_path: Path) -> None:
    done = run(tmp_path, CLI, "fit", "--config", YAML, "--trainer.callbacks.gate.scope", "elements")
    assert done.returncode == 2
    assert "'model', 'parameter', 'element'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
