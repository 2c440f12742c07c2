"""Real MLflow on a folder, and real Weights & Biases offline: each gets what it can take."""

import json
import re

import pytest
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from lightning_gcsr import CompressionMonitor

from .models import Regression, fit, loader, make_trainer
from .test_logging import KEYS, regularization

IMAGES = ("layers/sparsity", "layers/gcsr/injected", "layers/weights")
SCALARS = {f"gcsr/{key}" for key in KEYS} | {
    "sparsity/model",
    "sparsity/parameter/net.0.weight",
    "compression/stored_ratio",
}


def train(tmp_path, logger, strength=0.05, **kwargs):
    callbacks = [regularization(strength=strength), CompressionMonitor(images_every_n_steps=2)]
    return fit(tmp_path, Regression(), callbacks, logger=logger, **kwargs)


# -- MLflow --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_logger(tmp_path, monkeypatch):
    """A logger that keeps everything in a folder."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.chdir(tmp_path)
    return MLFlowLogger(tracking_uri=f"file:{tmp_path}/store")


def artifacts(logger, path=""):
    """The paths of all artifacts of the run."""
    for file in logger.experiment.list_artifacts(logger.run_id, path):
        yield from artifacts(logger, file.path) if file.is_dir else [file.path]


def test_mlflow_gets_scalars_images_text_and_settings(tmp_path, mlflow_logger):
    train(tmp_path, mlflow_logger)
    client, run = mlflow_logger.experiment, mlflow_logger.experiment.get_run(mlflow_logger.run_id)
    assert set(run.data.metrics) >= SCALARS
    assert [m.step for m in client.get_metric_history(run.info.run_id, "sparsity/model")] == [0, 1, 2, 3]
    assert run.data.params["gcsr/strength"] == "0.05"
    assert run.data.params["gcsr/penalty"] == "l1"
    found = list(artifacts(mlflow_logger))
    assert "summary.md" in found
    (tmp_path / "copies").mkdir()
    with open(client.download_artifacts(run.info.run_id, "summary.md", str(tmp_path / "copies"))) as file:
        assert "| net.0.weight | 8×4 | 32 | 0.00% | dense | 128 | 100.0% |" in file.read().splitlines()
    for key in IMAGES:
        pattern = f"images/{key.replace('/', '.')}.step.([0-9]+).*[.]png"  # MLflow puts signs of its own in between
        assert sorted(int(match[1]) for path in found if (match := re.match(pattern, path))) == [1, 3], found
    assert {path.name for path in tmp_path.iterdir()} == {"store", "copies"}


def test_mlflow_run_that_goes_on_with_another_strength(tmp_path, mlflow_logger):
    """MLflow refuses to change a parameter."""
    train(tmp_path, mlflow_logger)
    again = MLFlowLogger(tracking_uri=f"file:{tmp_path}/store", run_id=mlflow_logger.run_id)
    train(tmp_path, again, strength=0.1)
    assert again.experiment.get_run(again.run_id).data.params["gcsr/strength"] == "0.05"


# -- Weights & Biases ----------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    """A logger that keeps everything in a folder and does not look for a server."""
    for name, folder in (("DIR", "dir"), ("CACHE_DIR", "cache"), ("CONFIG_DIR", "config"), ("DATA_DIR", "data")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # which old versions read when they are imported
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.chdir(tmp_path)
    yield WandbLogger(project="test", offline=True, save_dir=str(tmp_path / "dir"))
    wandb.finish()
    wandb.teardown()


def test_wandb_gets_scalars_images_a_table_and_settings(tmp_path, wandb_logger):
    trainer = make_trainer(
        tmp_path, [regularization(), CompressionMonitor(images_every_n_steps=2)], logger=wandb_logger
    )
    trainer.fit(Regression(), loader())
    run = wandb_logger.experiment
    assert run.config["gcsr/strength"] == 0.05
    assert set(run.summary.keys()) >= SCALARS | {"summary"}  # old versions list no images here
    files = [path for path in (tmp_path / "dir").rglob("media/**/*") if path.is_file()]
    for key in IMAGES:
        # Images of steps 1 and 3; the folder is named for the part of the key before the last.
        assert len([path for path in files if f"images/{key}" in str(path) and path.suffix == ".png"]) == 2, files
    [table] = [path for path in files if path.name.startswith("summary") and path.name.endswith(".table.json")]
    content = json.loads(table.read_text())
    assert content["columns"][0] == "layer"
    assert content["data"][0][0] == "net.0.weight"
