"""The examples do what the README says of them."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gcsr import load_compressed

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "digits.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo's default run."""
    output = tmp_path_factory.mktemp("demo") / "digits"
    run = subprocess.run([sys.executable, DIGITS, "--output", output], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"tensorboard --logdir {output / 'version_0'}" in run.stdout.replace("\n", "")
    return output / "version_0"


def read_table(folder: Path) -> dict[str, tuple[float, float, str, int]]:
    """Test accuracy, sparsity, ratio and stored bytes by method."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (folder / "results.md").read_text().splitlines()
    ]
    return {
        method: (float(accuracy.rstrip("%")), float(zeros.rstrip("%")), ratio, int(stored.replace(",", "")))
        for method, accuracy, zeros, ratio, stored, _ in rows[2:]
    }


def test_gradient_coherent_regularization_survives_where_plain_and_delayed_die(demo: Path) -> None:
    table = read_table(demo)
    assert table["no penalty"][0] > 95
    for method in ("plain", "delayed"):
        accuracy, zeros, _, _ = table[method]
        assert accuracy < 40
        assert zeros > 99.9
    accuracy, zeros, ratio, stored = table["gradient-coherent"]
    assert accuracy > 88
    assert zeros > 99
    assert float(ratio.rstrip("×")) > 100
    assert stored < table["no penalty"][3] / 40


def test_demo_ends_with_the_small_model_in_a_small_file(demo: Path) -> None:
    path = demo / "gradient-coherent.safetensors"
    weights = [tensor for tensor in load_compressed(path).values() if tensor.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert round(100 * zeros, 2) == read_table(demo)["gradient-coherent"][1]
    assert read_table(demo)["gradient-coherent"][3] < path.stat().st_size < read_table(demo)["no penalty"][3] / 20


def test_demo_draws_its_figure_and_logs_to_tensorboard(demo: Path) -> None:
    assert (demo / "digits.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(demo / "gradient-coherent")).Reload()
    for key in ("gcsr/coherence", "gcsr/injected", "sparsity/model", "compression/ratio", "compression/stored_ratio"):
        assert len(events.Scalars(key)) > 50, key
    assert events.Scalars("sparsity/model")[-1].value > 0.99 > 0.5 > events.Scalars("sparsity/model")[0].value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "-1"], "strength"),
        (["--penalty", "l3"], "l1"),
        (["--epochs", "0"], "epochs"),
    ],
)
def test_demo_names_a_wrong_option(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(DIGITS), *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(DIGITS), run_name="__main__")
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_plain_loop_ends_sparse_and_accurate(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == ["epoch", "20"]
    accuracy, zeros = float(last[4].rstrip("%")), float(last[6].rstrip("%"))
    assert accuracy > 80
    assert zeros > 85
