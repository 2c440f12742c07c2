"""The monitor: right numbers, once a step, fresh where others look at them, and no trace in the training."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization

from .models import (
    ManualRegression,
    MemoryLogger,
    Regression,
    ValidatedRegression,
    fit,
    loader,
    make_trainer,
    mlp,
    momentum,
    same,
    weights_of,
)
from .test_logging import read_csv, read_tensorboard, steps

MODEL_KEYS = {"sparsity/model", "compression/ratio", "compression/stored_ratio"}
KEYS = MODEL_KEYS | {"sparsity/parameter/net.0.weight", "sparsity/parameter/net.2.weight"}


class DiesSlowly(Regression):
    """One more weight of the first layer is zero after each optimizer step."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.net[0].weight.view(-1)[: self.trainer.global_step + 1] = 0.0


class ValidatedDiesSlowly(DiesSlowly, ValidatedRegression):
    """The same with a validation loop."""


def sparse_after(step):
    """Sparsity after the optimizer step of this index: 40 weights, of which step + 1 are zero."""
    return pytest.approx((step + 1) / 40)


def regression_with(*values):
    """A regression whose first layer begins with these weights, and an optimizer that leaves it alone."""
    model = Regression()
    with torch.no_grad():
        model.net[0].weight.view(-1)[: len(values)] = torch.tensor(values)
    model.make_optimizer = lambda parameters: torch.optim.SGD(model.net[2:].parameters(), lr=1e-3)
    return model


def test_documented_keys_reach_both_loggers_at_the_steps_of_the_module_s_own_log(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    fit(tmp_path, Regression(), CompressionMonitor(), loader(count=24), logger=loggers, log_every_n_steps=2)
    for found in (read_csv(loggers[0]), read_tensorboard(loggers[1])):
        assert set(found) - {"loss", "epoch"} == KEYS
        for key in KEYS:
            assert steps(found[key]) == steps(found["loss"]) == [1, 3, 5]


@pytest.mark.parametrize("zero_threshold", [0.0, 0.2])
def test_values_equal_a_count_with_numpy(tmp_path, zero_threshold):
    logger = MemoryLogger()
    model = regression_with(0.0, -0.0, 0.1, -0.2, 1e-30, 0.3)
    callbacks = [CompressionMonitor(zero_threshold)]
    fit(tmp_path, model, callbacks, logger=logger)
    threshold = np.float32(zero_threshold)
    layers = {f"net.{i}.weight": model.net[i].weight.detach().numpy() for i in (0, 2)}
    zeros = {name: int(np.count_nonzero(np.abs(layer) <= threshold)) for name, layer in layers.items()}
    last = {key: value for _, metrics in logger.rows for key, value in metrics.items()}
    assert last["sparsity/model"] == pytest.approx(sum(zeros.values()) / 40)
    assert last["sparsity/parameter/net.0.weight"] == pytest.approx(zeros["net.0.weight"] / 32)
    assert last["sparsity/parameter/net.2.weight"] == pytest.approx(zeros["net.2.weight"] / 8)
    assert last["compression/ratio"] == pytest.approx(40 / (40 - sum(zeros.values())))
    assert zeros["net.0.weight"] >= (2 if zero_threshold == 0 else 5)


def test_stored_ratio_of_an_empty_layer(tmp_path):
    """Dense 4·(32+8+8+1) bytes; the first layer empty is a bitmask of 4 bytes, the rest stays as it is."""
    logger = MemoryLogger()
    model = regression_with(*[0.0] * 32)
    fit(tmp_path, model, CompressionMonitor(), logger=logger)
    assert logger.values("compression/stored_ratio")[-1] == pytest.approx(4 * 49 / (4 + 4 * 17))
    assert logger.values("sparsity/parameter/net.0.weight")[-1] == 1.0


def test_ratio_is_infinite_where_all_weights_are_zero(tmp_path):
    logger = MemoryLogger()
    model = regression_with(*[0.0] * 32)
    fit(tmp_path, model, CompressionMonitor(include=[r"net\.0\.weight"]), logger=logger)
    assert logger.values("compression/ratio")[-1] == float("inf")
    assert logger.values("sparsity/model")[-1] == 1.0


def test_per_parameter_values_can_be_left_out(tmp_path):
    logger = MemoryLogger()
    fit(tmp_path, Regression(), CompressionMonitor(per_parameter=False), logger=logger)
    assert logger.logged - {"loss", "epoch"} == MODEL_KEYS


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ({"include": [r"\.2\."]}, {"net.2.weight", "net.2.bias"}),
        ({"exclude": [r"\.2\."]}, {"net.0.weight"}),
        ({"include": ["net"], "exclude": ["bias", r"\.0\."]}, {"net.2.weight"}),
    ],
)
def test_include_and_exclude_choose_what_is_counted(tmp_path, patterns, names):
    logger = MemoryLogger()
    fit(tmp_path, Regression(), CompressionMonitor(**patterns), logger=logger)
    logged = {key for key in logger.logged if key.startswith("sparsity/")}
    assert logged == {"sparsity/model"} | {f"sparsity/parameter/{name}" for name in names}


def test_pattern_without_a_match_is_refused_with_near_names(tmp_path):
    model = Regression()
    with pytest.raises(ValueError, match=r"`include` must match .*'net\.0\.weight'"):
        fit(tmp_path, model, CompressionMonitor(include=["net.0.wieght"]))
    assert model.training_steps == 0


class TiedRegression(Regression):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 1)))
        self.net[1].weight = self.net[0].weight


def test_tied_weights_count_once(tmp_path):
    logger = MemoryLogger()
    model = TiedRegression()
    with torch.no_grad():
        model.net[2].weight.zero_()
    model.make_optimizer = lambda _: torch.optim.SGD([model.net[2].bias], lr=0.1)
    fit(tmp_path, model, CompressionMonitor(), logger=logger)
    assert logger.values("sparsity/model")[-1] == pytest.approx(4 / 20)
    assert "sparsity/parameter/net.1.weight" not in logger.logged


# -- when ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every_n_steps", [1, 2, 3, 50])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_logs_each_step_once_with_the_value_of_that_step(tmp_path, log_every_n_steps, accumulate):
    """Also for a fit shorter than `log_every_n_steps`, which gets the numbers of its end."""
    logger = MemoryLogger()
    fit(
        tmp_path,
        DiesSlowly(),
        CompressionMonitor(),
        logger=logger,
        max_epochs=2,
        log_every_n_steps=log_every_n_steps,
        accumulate_grad_batches=accumulate,
    )
    per_epoch = -(-4 // accumulate)
    on_cadence = set(range(log_every_n_steps - 1, 2 * per_epoch, log_every_n_steps))
    expected = sorted(on_cadence | {per_epoch - 1, 2 * per_epoch - 1})
    for key in KEYS:
        assert logger.steps(key) == expected
    assert logger.values("sparsity/model") == [sparse_after(step) for step in expected]


def test_manual_optimization_logs_each_batch_once(tmp_path):
    logger = MemoryLogger()
    fit(tmp_path, ManualRegression(every=2), CompressionMonitor(), logger=logger)
    assert logger.steps("sparsity/model") == [0, 1, 2, 3]


class SparsityAtValidation(Callback):
    """What the callbacks' metrics hold at each validation, and what the model has then."""

    def __init__(self) -> None:
        self.seen, self.true = [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(float(trainer.callback_metrics["sparsity/model"]))
            weights = torch.cat([pl_module.net[i].weight.detach().flatten() for i in (0, 2)])
            self.true.append(float((weights == 0).float().mean()))


@pytest.mark.parametrize("val_check_interval", [1.0, 0.5])
@pytest.mark.parametrize("log_every_n_steps", [3, 50])
@pytest.mark.parametrize("monitor_last", [False, True])
def test_values_are_fresh_at_every_validation(tmp_path, val_check_interval, log_every_n_steps, monitor_last):
    at_validation = SparsityAtValidation()
    callbacks = [CompressionMonitor(), at_validation]
    trainer = make_trainer(
        tmp_path,
        reversed(callbacks) if monitor_last else callbacks,
        max_epochs=3,
        val_check_interval=val_check_interval,
        log_every_n_steps=log_every_n_steps,
    )
    trainer.fit(ValidatedDiesSlowly(), loader(), loader(count=4))
    assert len(at_validation.seen) == (3 if val_check_interval == 1.0 else 6)
    assert at_validation.seen == pytest.approx(at_validation.true)
    assert at_validation.seen[0] > 0


def test_early_stopping_monitors_sparsity(tmp_path):
    stopping = EarlyStopping("sparsity/model", mode="max", stopping_threshold=0.19, patience=100)
    trainer = make_trainer(tmp_path, [stopping, CompressionMonitor()], max_epochs=10, log_every_n_steps=50)
    trainer.fit(ValidatedDiesSlowly(), loader(), loader(count=4))
    assert trainer.global_step == 8  # 8 of 40 weights


@pytest.mark.parametrize("stopping_first", [True, False])
def test_early_stopping_monitors_sparsity_without_validation(tmp_path, stopping_first):
    stopping = EarlyStopping("sparsity/model", mode="max", stopping_threshold=0.19, patience=100)
    callbacks = [stopping, CompressionMonitor()] if stopping_first else [CompressionMonitor(), stopping]
    trainer = make_trainer(tmp_path, callbacks, max_epochs=10, log_every_n_steps=50)
    trainer.fit(DiesSlowly(), loader())
    assert trainer.global_step == 8


@pytest.mark.parametrize("validate", [True, False])
def test_model_checkpoint_keeps_the_sparsest(tmp_path, validate):
    class DiesAndRecovers(ValidatedRegression):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.net.load_state_dict(mlp().state_dict())

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.current_epoch < 2:
                with torch.no_grad():
                    self.net[0].weight.view(-1)[: self.trainer.global_step + 1] = 0.0

    best = ModelCheckpoint(tmp_path, "best", monitor="sparsity/model", mode="max")
    trainer = make_trainer(
        tmp_path,
        [best, CompressionMonitor()],
        max_epochs=4,
        enable_checkpointing=True,
        log_every_n_steps=50,
        limit_val_batches=1.0 if validate else 0,
    )
    trainer.fit(DiesAndRecovers(), loader(), loader(count=4))
    assert float(best.best_model_score) == pytest.approx(8 / 40)
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert int((weights["net.0.weight"] == 0).sum()) == 8


def test_sanity_check_reports_nothing(tmp_path):
    trainer = make_trainer(tmp_path, [CompressionMonitor()], max_steps=0, max_epochs=-1, num_sanity_val_steps=1)
    trainer.fit(ValidatedRegression(), loader(), loader())
    assert not any(key.startswith("sparsity/") for key in trainer.callback_metrics)


# -- TensorBoard ---------------------------------------------------------------------------------------------------


def histograms_of(logger):
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    return {key: events.Histograms(key) for key in events.Tags()["histograms"]}


@pytest.mark.parametrize("histograms", [True, False])
def test_tensorboard_gets_a_histogram_of_each_weight_each_epoch_on_request(tmp_path, histograms):
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    loggers = [CSVLogger(tmp_path, name="csv"), logger]
    fit(tmp_path, Regression(), CompressionMonitor(histograms=histograms), logger=loggers, max_epochs=2)
    found = histograms_of(logger)
    if not histograms:
        assert not found
        return
    assert set(found) == {"weights/net.0.weight", "weights/net.2.weight"}
    for key, size in (("weights/net.0.weight", 32), ("weights/net.2.weight", 8)):
        assert [event.step for event in found[key]] == [3, 7]
        assert [event.histogram_value.num for event in found[key]] == [size, size]


@pytest.mark.parametrize(("spoilt", "kept"), [(3, 29), (32, None)], ids=["some", "all"])
def test_histograms_survive_weights_that_are_not_finite(tmp_path, spoilt, kept):
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    model = regression_with(*[float("nan")] * (spoilt - 1), float("inf"))
    fit(tmp_path, model, CompressionMonitor(histograms=True, exclude=[r"\.2\."]), logger=logger)
    found = histograms_of(logger)
    if kept is None:
        assert not found
    else:
        assert [event.histogram_value.num for event in found["weights/net.0.weight"]] == [kept]
    # NaN is not zero.
    assert read_tensorboard(logger)["sparsity/model"][-1][1] == 0.0


# -- no trace ------------------------------------------------------------------------------------------------------


def test_training_is_bit_identical_with_the_monitor(tmp_path):
    results = []
    for callbacks in ([], [CompressionMonitor(0.1, histograms=True)]):
        model = ValidatedRegression(make_optimizer=momentum)
        logger = TensorBoardLogger(tmp_path, name=f"with_{len(callbacks)}")
        trainer = make_trainer(tmp_path, callbacks, max_epochs=2, logger=logger)
        trainer.fit(model, loader(), loader())
        results.append((weights_of(model), trainer.optimizers[0].state_dict()["state"], torch.rand(1)))
        torch.manual_seed(0)
    (weights, state, _), (monitored, monitored_state, _) = results
    assert same(weights, monitored)
    for index in state:
        assert torch.equal(state[index]["momentum_buffer"], monitored_state[index]["momentum_buffer"])


def test_monitor_and_regularization_work_together(tmp_path):
    logger = MemoryLogger()
    callbacks = [
        GradientCoherentRegularization(strength=0.1, gate=None, update="proximal"),
        CompressionMonitor(),
    ]
    model = Regression()
    fit(tmp_path, model, callbacks, logger=logger, max_epochs=5)
    zeros = sum(int((model.net[i].weight == 0).sum()) for i in (0, 2))
    assert zeros > 0
    assert logger.values("sparsity/model")[-1] == pytest.approx(zeros / 40)


@pytest.mark.parametrize(
    "arguments",
    [
        {"fast_dev_run": True},
        {"logger": False},
        {"max_steps": 3, "max_epochs": -1},
        {"overfit_batches": 2},
        {"log_every_n_steps": 0},
    ],
    ids=str,
)
def test_every_mode_of_the_trainer_trains_with_the_monitor(tmp_path, arguments):
    model = ValidatedRegression()
    trainer = make_trainer(tmp_path, [CompressionMonitor(histograms=True)], **({"max_epochs": 2} | arguments))
    trainer.fit(model, loader(), loader(count=8))
    assert trainer.global_step > 0
    assert "sparsity/model" in trainer.callback_metrics


def test_barebones_trains_with_the_monitor():
    class Silent(Regression):
        def log(self, *_, **__):
            """`Trainer(barebones=True)` warns of every use of it."""

    trainer = Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[CompressionMonitor()])
    trainer.fit(Silent(), loader())
    assert trainer.global_step == 4


class ScoredDiesSlowly(ValidatedDiesSlowly):
    """Logs an accuracy beside the loss."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_acc", 0.5 + self.trainer.current_epoch / 10)


def test_plot_shows_metric_and_sparsity_over_the_steps_also_of_a_resumed_run(tmp_path, monkeypatch):
    def train(epochs, ckpt_path=None):
        monitor = CompressionMonitor()
        callbacks = [monitor, GradientCoherentRegularization(strength=1e-9)]
        trainer = make_trainer(tmp_path, callbacks, max_epochs=epochs, log_every_n_steps=1)
        trainer.fit(ScoredDiesSlowly(), loader(), loader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return monitor

    def lines(figure):
        assert [panel.get_ylabel() for panel in figure.axes] == ["val_acc", "sparsity in %"]
        return [panel.lines[0].get_xydata().tolist() for panel in figure.axes]

    with pytest.raises(ValueError, match=r"`CompressionMonitor\.plot` has nothing to draw"):
        CompressionMonitor().plot()
    whole = train(3)
    train(1)
    accuracy, zeros = lines(whole.plot())
    assert accuracy == [[3, 0.5], [7, pytest.approx(0.6)], [11, pytest.approx(0.7)]]
    assert zeros == [[step, pytest.approx(100 * (step + 1) / 40)] for step in range(12)]
    assert lines(train(3, tmp_path / "1.ckpt").plot()) == [accuracy, zeros]
    assert whole.plot("validation_loss").axes[0].get_ylabel() == "validation_loss"
    with pytest.raises(
        ValueError, match=r"`metric` must be one of the metrics at validations, 'loss', 'val_acc', 'val"
    ):
        whole.plot("gcsr/injected")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"`CompressionMonitor\.plot` draws with matplotlib"):
        whole.plot()
