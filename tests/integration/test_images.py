"""The monitor's images: at their cadence, of what was logged, whole after a resume, for loggers that take them."""

import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import prune

from lightning_gcsr import CompressionMonitor, Gate
from lightning_gcsr.callbacks.reporting import figures

from .models import (
    Adversaries,
    ManualRegression,
    MemoryLogger,
    Regression,
    ResumableLoader,
    ValidatedRegression,
    fit,
    loader,
    make_trainer,
    samples,
)
from .test_logging import regularization
from .test_monitor import DiesSlowly, histograms_of

TAGS = {"layers/sparsity", "layers/gcsr/injected", "layers/weights"}
LAYERS = ["net.0.weight", "net.2.weight"]


def images_of(logger):
    """For each tag the images with their steps."""
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def drawn(tmp_path, callbacks=None, model=None, **kwargs):
    """The steps at which each image was drawn."""
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    callbacks = callbacks or [regularization(), CompressionMonitor(images_every_n_steps=3)]
    trainer = make_trainer(tmp_path, callbacks, logger=logger, **({"max_epochs": 2} | kwargs))
    trainer.fit(model or ValidatedRegression(), loader(), loader(count=4) if model is None else None)
    return {tag: [image.step for image in images] for tag, images in images_of(logger).items()}


def table_of(monitor, key):
    """The steps and, for each layer, the values of a heat map."""
    state = monitor.state_dict()[key]
    return state["steps"], dict(zip(state["names"], state["table"].tolist(), strict=True))


# -- when ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [2, 5, 7]),
        ({"val_check_interval": 1}, [2, 5, 7]),
        ({"log_every_n_steps": 2}, [2, 5, 7]),
        ({"accumulate_grad_batches": 2, "max_epochs": 3}, [2, 5]),
        ({"max_steps": 6, "max_epochs": -1}, [2, 5]),
        ({"max_epochs": 1, "limit_train_batches": 2}, [1]),
    ],
    ids=str,
)
def test_images_are_drawn_on_their_own_cadence_and_at_the_end(tmp_path, arguments, expected):
    assert drawn(tmp_path, **arguments) == dict.fromkeys(TAGS, expected)


@pytest.mark.parametrize("monitor_first", [True, False])
def test_the_last_image_is_whole_whatever_the_order_of_the_callbacks(tmp_path, monitor_first):
    callbacks = [regularization(), CompressionMonitor(images_every_n_steps=8)]
    steps = drawn(tmp_path, callbacks[::-1] if monitor_first else callbacks)
    assert {tag: list(dict.fromkeys(found)) for tag, found in steps.items()} == {key: [7] for key in TAGS}
    for key in ("sparsity", "gcsr/injected"):
        assert table_of(callbacks[1], key)[0] == list(range(8))


def test_manual_optimization(tmp_path):
    assert drawn(tmp_path, model=ManualRegression(every=2)) == {key: [2, 5, 7] for key in TAGS}


def test_the_default_is_at_the_end(tmp_path):
    assert drawn(tmp_path, [regularization(), CompressionMonitor()]) == {key: [7] for key in TAGS}


@pytest.mark.parametrize("matplotlib", [True, False])
def test_nothing_is_drawn_on_request_or_by_default_without_matplotlib(tmp_path, monkeypatch, matplotlib):
    if not matplotlib:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "lightning_gcsr.callbacks.reporting.figures", None)
    monitor = CompressionMonitor(images_every_n_steps=0 if matplotlib else None)
    assert drawn(tmp_path, [regularization(), monitor]) == {}
    assert set(monitor.state_dict()) == {"plot/sparsity", "plot/metrics"}


def test_matplotlib_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"`images_every_n_steps` must be None or 0 .* Install matplotlib"):
        CompressionMonitor(images_every_n_steps=100)


@pytest.mark.parametrize(("value", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_cadence_is_a_number_of_steps(value, kind):
    with pytest.raises(kind, match=r"`images_every_n_steps` must be .* Use 0 for no images"):
        CompressionMonitor(images_every_n_steps=value)


@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"logger": False}], ids=str)
def test_without_loggers_nothing_is_drawn(tmp_path, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_gcsr.callbacks.reporting.figures", None)
    monitor = CompressionMonitor(images_every_n_steps=1)
    trainer = make_trainer(tmp_path, [monitor], **arguments)
    trainer.fit(ValidatedRegression(), loader(), loader())


def test_loggers_that_take_no_images_are_given_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_gcsr.callbacks.reporting.figures", None)
    loggers = [CSVLogger(tmp_path, name="csv"), MemoryLogger()]
    fit(tmp_path, Regression(), CompressionMonitor(images_every_n_steps=1), logger=loggers)
    assert all(isinstance(value, (int, float)) for _, metrics in loggers[1].rows for value in metrics.values())


# -- what ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor_first", [True, False])
@pytest.mark.parametrize("log_every_n_steps", [1, 2])
def test_heat_maps_show_what_is_logged(tmp_path, monitor_first, log_every_n_steps):
    logger = MemoryLogger()
    monitor = CompressionMonitor(images_every_n_steps=100)
    callbacks = [regularization(log_per_parameter=True), monitor]
    fit(
        tmp_path,
        DiesSlowly(),
        callbacks[::-1] if monitor_first else callbacks,
        logger=[logger, TensorBoardLogger(tmp_path)],
        max_epochs=3,
        log_every_n_steps=log_every_n_steps,
    )
    for key, prefix in (("sparsity", "sparsity/parameter"), ("gcsr/injected", "gcsr/injected")):
        steps, values = table_of(monitor, key)
        assert list(values) == LAYERS
        for name in LAYERS:
            assert steps == logger.steps(f"{prefix}/{name}")
            assert values[name] == pytest.approx(logger.values(f"{prefix}/{name}"))


def test_each_regularization_has_a_heat_map_of_its_own(tmp_path):
    callbacks = [
        regularization(name="a", include=[r"\.0\.weight"]),
        regularization(name="b", include=[r"\.2\.weight"]),
        CompressionMonitor(images_every_n_steps=100),
    ]
    assert set(drawn(tmp_path, callbacks)) == {"layers/sparsity", "layers/a/injected", "layers/b/injected"} | {
        "layers/weights"
    }
    assert list(table_of(callbacks[2], "a/injected")[1]) == LAYERS[:1]
    assert list(table_of(callbacks[2], "b/injected")[1]) == LAYERS[1:]


def test_layers_of_optimizers_that_step_in_turns_have_gaps(tmp_path):
    monitor = CompressionMonitor(images_every_n_steps=4)
    callbacks = [regularization(update="gradient", gate=Gate(averaging=0.0, tolerance=0.0)), monitor]
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    model = Adversaries(toggle=True, every=(1, 2), offsets=(0, 1))
    fit(tmp_path, model, callbacks, logger=logger)
    _, values = table_of(monitor, "gcsr/injected")
    known = {name: [value == value for value in row] for name, row in values.items()}
    assert known == {"generator.weight": [True] * 4, "critic.weight": [False, True, False, True]}
    assert len(images_of(logger)["layers/gcsr/injected"]) == 1


@pytest.mark.parametrize("spoilt", [float("nan"), 0.0])
def test_weights_that_are_not_finite_or_all_zero_are_drawn(tmp_path, spoilt):
    class Spoilt(Regression):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                self.net[0].weight.fill_(spoilt)

    assert set(drawn(tmp_path, [CompressionMonitor(images_every_n_steps=4)], Spoilt())) == TAGS - {
        "layers/gcsr/injected"
    }


def test_model_that_is_not_regularized_is_drawn_too(tmp_path):
    assert set(drawn(tmp_path, [CompressionMonitor(images_every_n_steps=4)])) == {"layers/sparsity", "layers/weights"}


def test_histograms_are_of_the_weights_under_masks(tmp_path, monkeypatch):
    counts, original = [], figures.weight_histograms
    monkeypatch.setattr(figures, "weight_histograms", lambda c, title: counts.append(c) or original(c, title))
    model, logger = Regression(), TensorBoardLogger(tmp_path, name="tensorboard")
    prune.random_unstructured(model.net[0], "weight", 0.5)
    fit(tmp_path, model, CompressionMonitor(histograms=True, images_every_n_steps=2), logger=logger)
    assert [{name: zeros for name, (zeros, *_) in c.items()} for c in counts] == 2 * [{LAYERS[0]: 16, LAYERS[1]: 0}]
    assert set(histograms_of(logger)) == {f"weights/{name}" for name in LAYERS}


# -- a run that goes on --------------------------------------------------------------------------------------------


def run(tmp_path, epochs, ckpt_path=None, **checkpoint):
    """A fit over resumable data; the checkpoints of its steps or epochs."""
    monitor = CompressionMonitor(images_every_n_steps=100)
    saving = ModelCheckpoint(tmp_path / "checkpoints", "{step}", save_top_k=-1, **checkpoint)
    callbacks = [regularization(), monitor, saving]
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    trainer = make_trainer(
        tmp_path, callbacks, max_epochs=epochs, enable_checkpointing=True, logger=logger, log_every_n_steps=1
    )
    model = DiesSlowly()
    trainer.fit(model, ResumableLoader(samples(16), batch_size=4), ckpt_path=ckpt_path)
    return monitor


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("step", "checkpoint"),
    [(8, {"every_n_epochs": 1}), (6, {"every_n_train_steps": 1})],
    ids=["between epochs", "within an epoch"],
)
def test_a_resumed_run_has_the_history_of_the_uninterrupted_one(tmp_path, step, checkpoint):
    expected = run(tmp_path / "whole", 3, **checkpoint)
    path = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
    resumed = run(tmp_path / "resumed", 3, path, **checkpoint)
    for key in ("sparsity", "gcsr/injected"):
        assert table_of(resumed, key) == table_of(expected, key)
        assert table_of(resumed, key)[0] == list(range(12))


def test_a_regularization_called_plot_keeps_its_heat_map(tmp_path):
    monitor, resumed = (CompressionMonitor(images_every_n_steps=100) for _ in range(2))
    fit(tmp_path, DiesSlowly(), [regularization(name="plot"), monitor], logger=TensorBoardLogger(tmp_path))
    resumed.load_state_dict(monitor.state_dict())
    resumed._draws = True
    assert table_of(resumed, "plot/injected") == table_of(monitor, "plot/injected")


def test_a_second_fit_goes_on_and_one_from_the_start_begins_anew(tmp_path):
    monitor = CompressionMonitor(images_every_n_steps=100)
    trainer = make_trainer(tmp_path, [monitor], max_epochs=1, logger=TensorBoardLogger(tmp_path))
    model = DiesSlowly()
    for epochs, expected in ((1, 4), (2, 8)):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, loader())
        assert table_of(monitor, "sparsity")[0] == list(range(expected))
    fit(tmp_path, DiesSlowly(), monitor, logger=TensorBoardLogger(tmp_path))
    assert table_of(monitor, "sparsity")[0] == list(range(4))


def test_validating_a_checkpoint_leaves_the_history_alone(tmp_path):
    class Tested(DiesSlowly, ValidatedRegression):
        """With validation."""

    monitor = CompressionMonitor(images_every_n_steps=100)
    saving = ModelCheckpoint(tmp_path / "checkpoints", "{step}", save_top_k=-1, every_n_epochs=1)
    trainer = make_trainer(
        tmp_path, [monitor, saving], max_epochs=2, enable_checkpointing=True, logger=TensorBoardLogger(tmp_path)
    )
    model = Tested()
    trainer.fit(model, loader(), loader(count=4))
    trainer.validate(
        model, loader(count=4), ckpt_path=tmp_path / "checkpoints" / "step=4.ckpt", verbose=False, weights_only=True
    )
    assert table_of(monitor, "sparsity")[0] == list(range(8))
