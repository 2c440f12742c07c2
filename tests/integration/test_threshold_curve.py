"""The curve of a metric against the zeroing threshold, and that everything else stays as it was."""

from __future__ import annotations

import copy
import itertools
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_gcsr import Sparsity, ThresholdCurve, module_bytes, prune_small, threshold_curve
from tests.integration.models import ValidatedRegression, loader, make_trainer, momentum, same, samples, weights_of


def curve_of(trainer: Trainer, model: LightningModule, data: Any = None, **kwargs: Any) -> ThresholdCurve:
    data = loader() if data is None else data
    return threshold_curve(trainer, model, data, metric="validation_loss", progress=False, **kwargs)


def loss_at(model: ValidatedRegression, threshold: float) -> float:
    """The slow way, on all data at once."""
    model = copy.deepcopy(model)
    prune_small(model, threshold)
    with torch.no_grad():
        return float(model.loss(samples(16)[:]))


def random_states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


# -- the curve -------------------------------------------------------------------------------------------------------


def test_each_row_is_what_pruning_by_hand_gives(tmp_path: Path) -> None:
    model = ValidatedRegression()
    curve = curve_of(make_trainer(tmp_path), model, thresholds=[0.5, 0.2, 0.5, 10.0])
    assert [row["threshold"] for row in curve.table] == [0.0, 0.2, 0.5, 10.0]
    for row in curve.table:
        pruned = copy.deepcopy(model)
        zeros = prune_small(pruned, row["threshold"])
        assert row["validation_loss"] == pytest.approx(loss_at(model, row["threshold"]), rel=1e-5)
        assert row["zeros"] == zeros
        assert row["sparsity"] == zeros / 40
        assert row["compression"] == (40 / (40 - zeros) if zeros < 40 else float("inf"))
        assert row["stored_bytes"] == module_bytes(pruned)[1]
    assert curve.table[-1]["zeros"] == 40


def test_masked_and_frozen_weights_count_as_everywhere_else(tmp_path: Path) -> None:
    """Of a pruned layer the weights that compute, and of a network with a frozen part those that train."""
    model = ValidatedRegression()
    prune.l1_unstructured(model.net[0], "weight", amount=10)
    model.net[2].requires_grad_(False)
    [row] = curve_of(make_trainer(tmp_path), model, thresholds=[0.0]).table
    assert (row["zeros"], row["sparsity"]) == (10, 10 / 32)
    assert row["sparsity"] == float(Sparsity()(model))


def test_the_default_thresholds_cover_all_shares_of_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ValidatedRegression(net=nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 1)))
    with torch.no_grad():
        model.net[0].weight[:250] = 0  # a fifth of all weights
    curve = curve_of(make_trainer(tmp_path), model, thresholds=12)
    sparsities = [point.sparsity for point in curve.points]
    assert len(curve.points) == 12
    assert curve.points[0].threshold == 0
    assert sparsities[0] == 0.2
    assert sparsities[1] == pytest.approx(0.2 + 0.8 * 0.01, abs=1e-3)
    assert sparsities[-1] == pytest.approx(0.2 + 0.8 * 0.999, abs=1e-3)
    assert sparsities == sorted(sparsities)
    assert max(b - a for a, b in itertools.pairwise(sparsities)) < 0.25


def test_a_model_without_a_weight_left_has_one_row(tmp_path: Path) -> None:
    model = ValidatedRegression()
    prune_small(model, 1e9)
    curve = curve_of(make_trainer(tmp_path), model)
    assert [point.sparsity for point in curve.points] == [1.0]
    assert curve.suggestion == 0.0
    curve.plot()


def test_only_the_chosen_parameters_are_pruned(tmp_path: Path) -> None:
    model = ValidatedRegression()
    curve = curve_of(make_trainer(tmp_path), model, thresholds=[1e9], include=[r"net\.2\.weight"])
    assert [(point.weights, point.zeros) for point in curve.points] == [(8, 0), (8, 8)]


def near_zeros() -> ValidatedRegression:
    """A model of which half of the weights are nearly zero, and which is best without them."""
    model = ValidatedRegression()
    with torch.no_grad():
        for weight in (model.net[0].weight, model.net[2].weight):
            weight.flatten()[::2] *= 1e-6
    return model


def test_the_suggestion_is_the_largest_threshold_within_the_drop(tmp_path: Path) -> None:
    model = near_zeros()
    thresholds = [1e-4, 1e-3, 0.3, 0.6, 10.0]
    losses = {threshold: loss_at(model, threshold) for threshold in [0.0, *thresholds]}
    for drop in (1e-4, 0.05, 0.3, 100.0):
        curve = curve_of(make_trainer(tmp_path), model, thresholds=thresholds, max_metric_drop=drop)
        assert curve.suggestion == max(t for t, loss in losses.items() if loss <= losses[0.0] + drop)
        assert curve.suggestion >= 1e-3
    assert curve.largest_threshold(0.05) == max(t for t, loss in losses.items() if loss <= losses[0.0] + 0.05)


def test_without_a_drop_no_loss_is_taken(tmp_path: Path) -> None:
    class Accuracy(ValidatedRegression):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            right = self.net(batch[0]).sign() == batch[1].sign()
            self.log("accuracy", right.float().mean())

    model = Accuracy(net=near_zeros().net)
    trainer, data = make_trainer(tmp_path), loader()
    curve = threshold_curve(trainer, model, data, metric="accuracy", mode="max", progress=False)
    [chosen] = [point for point in curve.points if point.threshold == curve.suggestion]
    assert chosen.sparsity >= 0.45
    assert chosen.metric >= curve.points[0].metric
    assert all(point.metric < curve.points[0].metric for point in curve.points if point.threshold > chosen.threshold)


def test_a_metric_that_is_nan_from_the_start_has_no_suggestion(tmp_path: Path) -> None:
    model = ValidatedRegression()
    model.net[0].weight.data[0, 0] = float("nan")
    curve = curve_of(make_trainer(tmp_path), model, thresholds=[0.1])
    with pytest.raises(ValueError, match=r"'validation_loss' is NaN at threshold 0"):
        _ = curve.suggestion
    curve.plot()


def test_the_figure_shows_metric_and_sparsity_without_pyplot(tmp_path: Path) -> None:
    curve = curve_of(make_trainer(tmp_path), near_zeros(), max_metric_drop=0.1)
    figure = curve.plot()
    figure.savefig(tmp_path / "curve.png")
    above, below = figure.axes
    assert above.get_ylabel() == "validation_loss"
    assert below.get_xscale() == "log"
    assert f"suggested: {curve.suggestion:.3g}" in [text.get_text() for text in below.get_legend().get_texts()]


def test_the_validation_metrics_come_from_a_data_module_too(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def setup(self, stage: str) -> None:
            self.rows = samples(16)

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.rows, batch_size=4)

    data, model = Data(), ValidatedRegression()
    trainer = make_trainer(tmp_path)
    curve = threshold_curve(trainer, model, datamodule=data, metric="validation_loss", thresholds=[1], progress=False)
    assert curve.points[0].metric == pytest.approx(loss_at(model, 0.0), rel=1e-5)
    assert not hasattr(data, "rows")


# -- nothing is touched ----------------------------------------------------------------------------------------------


class Witness(Callback):
    """Counts the validations it is part of."""

    def __init__(self) -> None:
        self.seen = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen += 1


def test_model_trainer_loggers_and_random_state_stay_after_a_training(tmp_path: Path) -> None:
    witness, logger = Witness(), CSVLogger(tmp_path)
    model = ValidatedRegression(make_optimizer=momentum)
    trainer = make_trainer(tmp_path, [witness], logger=logger, max_epochs=2, num_sanity_val_steps=0)
    data = DataLoader(samples(), batch_size=4, generator=torch.Generator().manual_seed(0))
    trainer.fit(model, data, data)
    model.net[0].eval()
    before, handlers = weights_of(model), [signal.getsignal(number) for number in signal.valid_signals()]
    logged, states = Path(logger.log_dir, "metrics.csv").read_text(), random_states()
    metrics, generator = dict(trainer.callback_metrics), data.generator.get_state().tolist()
    objects = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    curve = curve_of(trainer, model, data)
    assert len(curve.points) > 10
    assert same(weights_of(model), before)
    assert [id(tensor) for tensor in model.state_dict(keep_vars=True).values()] == objects
    assert not model.net[0].training
    assert model.trainer is trainer
    assert trainer.callbacks[0] is witness
    assert witness.seen == 2
    assert (trainer.global_step, trainer.current_epoch) == (8, 2)
    assert trainer.callback_metrics == metrics
    assert Path(logger.log_dir, "metrics.csv").read_text() == logged
    assert random_states() == states
    assert data.generator.get_state().tolist() == generator
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert next(iter(trainer.optimizers[0].state)) is model.net[0].weight


@pytest.mark.parametrize("other", [False, True])
def test_a_trainer_that_has_validated_and_another_that_has_trained_are_no_obstacle(tmp_path: Path, other: bool) -> None:
    model, trainer = ValidatedRegression(), make_trainer(tmp_path)
    trainer.validate(model, loader(), verbose=False)
    if other:
        trainer = make_trainer(tmp_path)
    before = weights_of(model)
    curve = curve_of(trainer, model, thresholds=[10.0])
    assert [point.zeros for point in curve.points] == [0, 40]
    assert same(weights_of(model), before)


def test_no_data_is_copied(tmp_path: Path) -> None:
    class Uncopied(list):
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("the data was copied")

    model, trainer = ValidatedRegression(), make_trainer(tmp_path)
    data = DataLoader(Uncopied(samples(16)), batch_size=4)
    trainer.fit(model, data, data)
    curve_of(trainer, model, data, thresholds=[10.0])
    curve_of(make_trainer(tmp_path), model, data, thresholds=[10.0])


def test_an_average_of_the_weights_does_not_take_the_place_of_the_pruned_ones(tmp_path: Path) -> None:
    model = ValidatedRegression()
    trainer = make_trainer(tmp_path, [EMAWeightAveraging()])
    trainer.fit(model, loader(), loader())
    curve = curve_of(trainer, model, thresholds=[10.0])
    assert curve.points[1].metric == pytest.approx(loss_at(model, 10.0), rel=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_everything_is_as_before(tmp_path: Path, error: type[BaseException]) -> None:
    class Failing(ValidatedRegression):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            torch.rand(1)
            if not self.net[0].weight.any():
                raise error("out of weights")
            super().validation_step(batch, batch_idx)

    model, trainer = Failing(), make_trainer(tmp_path)
    before, states = weights_of(model), random_states()
    with pytest.raises(error):
        curve_of(trainer, model, thresholds=[0.1, 10.0])
    assert same(weights_of(model), before)
    assert random_states() == states
    assert trainer.state.fn is None


def test_a_metric_that_a_callback_logs_is_found_where_the_callback_is_named(tmp_path: Path) -> None:
    class Logging(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.log("norm", sum(weight.norm() for weight in pl_module.parameters()))

    trainer, model = make_trainer(tmp_path), ValidatedRegression()
    curve = threshold_curve(trainer, model, loader(), metric="norm", callbacks=[Logging()], progress=False)
    assert curve.points[-1].metric < curve.points[0].metric


# -- what is wrong is said -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"metric": "val_loss"},
            ValueError,
            r"`metric` must be one of the metrics .*, 'validation_loss', got .*Did you",
        ),
        ({"metric": None}, TypeError, r"`metric` must be a string"),
        ({"mode": "least"}, ValueError, r"`mode` must be one of 'min', 'max'"),
        ({"thresholds": []}, ValueError, r"`thresholds` must have at least one number"),
        ({"thresholds": [0.1, -1.0]}, ValueError, r"`thresholds` must be a finite number of at least 0, got .*-1.0"),
        ({"thresholds": [float("nan")]}, ValueError, r"`thresholds` must be a finite number of at least 0"),
        ({"thresholds": "0.1"}, TypeError, r"`thresholds` must be an integer of at least 2.*Or give a list"),
        ({"thresholds": 0.1}, TypeError, r"`thresholds` must be an integer of at least 2"),
        ({"thresholds": 1}, ValueError, r"`thresholds` must be an integer of at least 2"),
        ({"max_metric_drop": -0.1}, ValueError, r"`max_metric_drop` must be a finite number of at least 0"),
        ({"include": ["encoder"]}, ValueError, r"`include` must match the name of a parameter"),
        ({"dataloaders": None}, MisconfigurationException, r"needs validation data, and there are none"),
    ],
)
def test_a_bad_argument_is_named(
    tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    usual = {"dataloaders": loader(), "metric": "validation_loss", "progress": False}
    with pytest.raises(kind, match=message):
        threshold_curve(make_trainer(tmp_path), ValidatedRegression(), **(usual | arguments))


def test_a_model_that_does_not_validate_or_logs_nothing_is_named(tmp_path: Path) -> None:
    class Silent(ValidatedRegression):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            pass

    class Unvalidated(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

    with pytest.raises(ValueError, match=r"the metrics that the validation logs, which are none"):
        curve_of(make_trainer(tmp_path), Silent())
    with pytest.raises(MisconfigurationException, match=r"Unvalidated has no `validation_step`"):
        curve_of(make_trainer(tmp_path), Unvalidated())


def test_a_strategy_that_starts_processes_anew_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy="ddp_spawn", devices=2)
    with pytest.raises(MisconfigurationException, match=r"`threshold_curve` does not support strategies that start"):
        curve_of(trainer, ValidatedRegression())


def test_a_bar_shows_the_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threshold_curve(make_trainer(tmp_path), ValidatedRegression(), loader(), metric="validation_loss", thresholds=[10])
    assert "2/2" in (shown := capsys.readouterr().err)
    assert "at a sparsity of 100 %" in shown
