"""Forecasting libraries that bring a Trainer and modules of their own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gcsr import CompressedCheckpoint, CompressionMonitor, Gate, GradientCoherentRegularization, Schedule
from lightning_gcsr.core.penalties import L1

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def zeros_of(module: torch.nn.Module, names: Any) -> float:
    """The fraction of zeros in these parameters."""
    weights = [parameter for name, parameter in module.named_parameters() if name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.slow  # darts takes many seconds to import
@pytest.mark.filterwarnings("ignore")  # its own
def test_darts_trains_saves_and_loads_as_its_documentation_says(tmp_path: Path) -> None:
    """Its Trainer is of ``pytorch_lightning``, and its saved models hold the callbacks."""
    darts = pytest.importorskip("darts", reason="darts is not installed")
    models = pytest.importorskip("darts.models", reason="darts is not installed")
    serialization = pytest.importorskip("darts.utils.serialization", reason="this darts loads without asking")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    series = darts.TimeSeries.from_values(np.sin(np.arange(200) / 5).astype("float32"))
    callbacks = [GradientCoherentRegularization("l1", target_sparsity=0.8), CompressionMonitor(verbose=False)]
    kwargs = QUIET | {"callbacks": callbacks}
    model = models.NLinearModel(
        24, 6, n_epochs=10, batch_size=16, random_state=0, optimizer_kwargs={"lr": 5e-3}, pl_trainer_kwargs=kwargs
    )
    model.fit(series)
    assert zeros_of(model.model, callbacks[0].regularizer.parameters) == pytest.approx(0.8, abs=0.02)
    model.save(str(tmp_path / "model.pt"))
    expected = model.predict(6).values()

    trusted = models.NLinearModel.load(str(tmp_path / "model.pt"), trusted=True)
    np.testing.assert_array_equal(trusted.predict(6).values(), expected)
    safe = [GradientCoherentRegularization, CompressionMonitor, L1, Gate, Schedule]
    with serialization.safe_globals(safe):
        loaded = models.NLinearModel.load(str(tmp_path / "model.pt"))
    np.testing.assert_array_equal(loaded.predict(6).values(), expected)

    loaded.fit(series, epochs=10)
    again = next(c for c in loaded.trainer_params["callbacks"] if isinstance(c, GradientCoherentRegularization))
    assert zeros_of(loaded.model, again.regularizer.parameters) == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_temporal_fusion_transformer_of_pytorch_forecasting(tmp_path: Path) -> None:
    """It keeps losses, which are modules, in its hyperparameters, and makes its own optimizer."""
    forecasting = pytest.importorskip("pytorch_forecasting", reason="pytorch-forecasting is not installed")
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times = np.arange(120)
    table = pandas.DataFrame({"time": times, "group": "a", "value": np.sin(times / 4).astype("float32")})
    data = forecasting.TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=12,
        max_prediction_length=3,
        time_varying_unknown_reals=["value"],
    )
    torch.manual_seed(0)
    model = forecasting.TemporalFusionTransformer.from_dataset(
        data, hidden_size=8, attention_head_size=2, hidden_continuous_size=4, learning_rate=0.01, optimizer="adam"
    )
    unused = ["static_context_variable_selection"]  # there are no static variables
    regularization = GradientCoherentRegularization("l1", target_sparsity=0.7, exclude=unused)
    compressed = CompressedCheckpoint()
    checkpoint = ModelCheckpoint(tmp_path)
    callbacks = [regularization, CompressionMonitor(verbose=False), compressed, checkpoint]
    trainer = Trainer(max_epochs=15, default_root_dir=tmp_path, callbacks=callbacks, **QUIET)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=16, num_workers=0))
    assert zeros_of(model, regularization.regularizer.parameters) == pytest.approx(0.7, abs=0.02)
    assert Path(compressed.path).exists()
