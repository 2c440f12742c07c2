"""TensorBoard's Custom Scalars: one layout a run, of all our callbacks, which spares that of the user."""

import re

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lightning_gcsr import CompressionMonitor, CoupledGroupLasso, Gate, GradientCoherentRegularization
from lightning_gcsr.callbacks.reporting.tensorboard_layout import layout_of

from .models import Adversaries, Regression, fit, loader, make_trainer
from .test_logging import read_tensorboard, regularization

GATE, LAYERS, SPARSITY, STRENGTH = (
    "Is the gate open?",
    "Which layers collapse?",
    "How sparse is the model, and how good?",
    "Should the strength be raised?",
)


def events_of(logger):
    return EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()


def layouts_of(logger):
    """Every layout in the run's event files, in the order in which they were written: the last is the one shown."""
    events = events_of(logger)
    if "custom_scalars__config__" not in events.Tags()["tensors"]:
        return []
    protos = [Layout.FromString(e.tensor_proto.string_val[0]) for e in events.Tensors("custom_scalars__config__")]
    return [
        {
            category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
            for category in p.category
        }
        for p in protos
    ]


def shown(layout, keys):
    """The keys that each chart shows, as TensorBoard's plugin finds them: by `re.match`."""
    return {
        title: {chart: {key for key in keys for tag in tags if re.match(tag, key)} for chart, tags in charts.items()}
        for title, charts in layout.items()
    }


def fit_and_read(tmp_path, callbacks, model=None, prefix="", **kwargs):
    logger = TensorBoardLogger(tmp_path, name="tensorboard", prefix=prefix)
    fit(tmp_path, model or Regression(), callbacks, logger=logger, **kwargs)
    [layout] = layouts_of(logger)
    return shown(layout, read_tensorboard(logger))


@pytest.mark.parametrize("monitor_first", [True, False])
def test_what_belongs_together_is_shown_together(tmp_path, monitor_first):
    callbacks = [regularization(gate=Gate(scope="model", averaging=0.0), update="gradient"), CompressionMonitor()]
    charts = fit_and_read(tmp_path, callbacks[::-1] if monitor_first else callbacks)
    assert list(charts) == [SPARSITY, GATE, LAYERS, STRENGTH]
    assert charts[GATE] == {
        "gcsr: share of weights that got the penalty": {"gcsr/injected"},
        "gcsr: coherence and its threshold": {"gcsr/coherence", "gcsr/threshold"},
    }
    assert charts[LAYERS] == {
        "sparsity, by layer": {"sparsity/parameter/net.0.weight", "sparsity/parameter/net.2.weight"},
    }
    assert charts[SPARSITY] == {
        "accuracy and loss": {"loss"},
        "sparsity": {"sparsity/model"},
        "compression, and dense ÷ stored size": {"compression/ratio", "compression/stored_ratio"},
    }
    assert charts[STRENGTH] == {
        "gcsr: strength": {"gcsr/strength"},
        "gcsr: norms of the two gradients": {"gcsr/grad_norm", "gcsr/penalty_grad_norm"},
        "gcsr: penalty": {"gcsr/penalty"},
    }


def test_coupled_groups_have_a_chart_and_none_is_dropped(tmp_path):
    callback = regularization(penalty=CoupledGroupLasso(example_input=torch.ones(1, 4)))
    charts = fit_and_read(tmp_path, callback)
    assert charts[SPARSITY]["gcsr: share of groups that are zero"] == {"gcsr/zero_groups"}
    callback.tensorboard_charts = lambda module: {"unknown": {"chart": ["key"]}}
    with pytest.raises(KeyError, match="unknown"):
        layout_of([callback], Regression())


def test_several_callbacks_are_side_by_side(tmp_path):
    callbacks = [
        regularization(name="a.b", include=[r"\.0\."], log_per_parameter=True),
        regularization(name="a-b", include=[r"\.2\.weight"], gate=None),
        regularization(name="a", include=[r"\.2\."], exclude=["weight"]),
    ]
    charts = fit_and_read(tmp_path, callbacks)
    assert charts[GATE] == {
        "a.b: share of weights that got the penalty": {"a.b/injected"},
        "a.b: coherence over all weights, each of which has its own gate": {"a.b/coherence"},
        "a-b: share of weights that got the penalty": {"a-b/injected"},
        "a: share of weights that got the penalty": {"a/injected"},
        "a: coherence over all weights, each of which has its own gate": {"a/coherence"},
    }
    layers = {"a.b/injected/net.0.weight", "a.b/injected/net.0.bias"}
    assert charts[LAYERS] == {"a.b: share that got the penalty, by layer": layers}
    assert {chart.partition(":")[0] for chart in charts[STRENGTH]} == {"a.b", "a-b", "a"}
    assert charts[SPARSITY] == {"accuracy and loss": {"loss"}}


def test_each_chart_shows_something_with_several_optimizers_and_a_prefix(tmp_path):
    charts = fit_and_read(
        tmp_path,
        [
            regularization(gate=Gate(scope="parameter", averaging=0.0, tolerance=0.0), update="gradient"),
            CompressionMonitor(),
        ],
        Adversaries(toggle=True),
        prefix="my.run",
    )
    assert charts[SPARSITY].pop("accuracy and loss") == set()  # this module logs neither
    assert all(keys for charts in charts.values() for keys in charts.values())
    assert charts[GATE]["gcsr: coherence over all weights, and the threshold of each tensor"] == {
        "my.run-gcsr/optimizer_0/coherence",
        "my.run-gcsr/optimizer_1/coherence",
        "my.run-gcsr/threshold",
    }
    assert charts[SPARSITY]["sparsity"] == {"my.run-sparsity/model"}


def test_only_what_the_monitor_logs_has_a_chart(tmp_path):
    charts = fit_and_read(tmp_path, CompressionMonitor(per_parameter=False))
    assert list(charts) == [SPARSITY]


@pytest.mark.parametrize(
    ("arguments", "threshold"),
    [
        ({"gate": Gate(scope="model", threshold=-0.25)}, -0.25),
        ({"gate": Gate("direction", scope="parameter")}, 0.1),
        ({"gate": Gate(scope="element")}, None),
        ({"gate": None}, None),
    ],
    ids=str,
)
def test_threshold_is_logged_where_it_decides(tmp_path, arguments, threshold):
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    fit(tmp_path, Regression(), regularization(**arguments), logger=logger)
    found = read_tensorboard(logger).get("gcsr/threshold", [])
    assert found == ([] if threshold is None else [(step, pytest.approx(threshold)) for step in range(4)])


class LogsPerplexity(Regression):
    """A module with a metric whose name says neither accuracy nor loss."""

    def training_step(self, batch, batch_idx):
        self.log("perplexity", 1.0, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_what_is_monitored_is_shown_beside_the_sparsity(tmp_path):
    callbacks = [
        EarlyStopping("perplexity", patience=100, check_on_train_epoch_end=True),
        EarlyStopping("sparsity/model", mode="max", patience=100, check_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path / "best", monitor="perplexity_epoch"),
        ModelCheckpoint(tmp_path / "last"),
        CompressionMonitor(),
    ]
    charts = fit_and_read(tmp_path, callbacks, LogsPerplexity(), enable_checkpointing=True)
    assert charts[SPARSITY]["what callbacks monitor: perplexity_epoch"] == {"perplexity_epoch"}


def test_layers_have_a_line_each_only_where_they_are_few(tmp_path):
    many = Regression(nn.Sequential(*(nn.Linear(4, 4) for _ in range(25)), nn.Linear(4, 1)))
    assert LAYERS not in fit_and_read(tmp_path, CompressionMonitor(), many)


# -- the user's own ------------------------------------------------------------------------------------------------

MINE = {"mine": {"chart": ["Multiline", ["loss"]]}}


def write(logger):
    logger.experiment.add_custom_scalars(MINE)


class WritesInSetup(Regression):
    """A module with a layout of its own."""

    def setup(self, stage):
        write(self.logger)


@pytest.mark.parametrize("where", ["before fit", "setup of the module"])
def test_a_layout_of_the_user_is_the_one_shown(tmp_path, where):
    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    if where == "before fit":
        write(logger)
    model = Regression() if where == "before fit" else WritesInSetup()
    fit(tmp_path, model, [regularization(), CompressionMonitor()], logger=logger)
    assert layouts_of(logger)[-1] == {"mine": {"chart": ["loss"]}}


def test_a_run_that_goes_on_keeps_its_layout(tmp_path):
    """In a second `fit`, and in a logger that is made anew for the same run."""
    for epochs in (1, 2):
        logger = TensorBoardLogger(tmp_path, name="tensorboard", version=0)
        trainer = make_trainer(tmp_path, [CompressionMonitor()], max_epochs=epochs, logger=logger)
        trainer.fit(Regression(), loader())
        trainer.fit_loop.max_epochs += 1
        trainer.fit(Regression(), loader())
    assert len(layouts_of(logger)) == 1


def test_every_tensorboard_logger_gets_it_and_a_run_of_another_folder_does_not_count(tmp_path):
    SummaryWriter(str(tmp_path / "old")).add_custom_scalars(MINE)
    loggers = [TensorBoardLogger(tmp_path, name=name) for name in ("one", "two")]
    fit(tmp_path, Regression(), GradientCoherentRegularization(strength=0.1), logger=loggers)
    assert len(layouts_of(loggers[0])) == len(layouts_of(loggers[1])) == 1


@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"logger": False}], ids=str)
def test_without_a_run_nothing_is_written(tmp_path, arguments):
    trainer = make_trainer(tmp_path, [regularization(), CompressionMonitor()], **arguments)
    trainer.fit(Regression(), loader())
    assert not list(tmp_path.rglob("*tfevents*"))


def test_validation_and_test_write_no_layout(tmp_path):
    class Tested(Regression):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

    logger = TensorBoardLogger(tmp_path, name="tensorboard")
    make_trainer(tmp_path, [CompressionMonitor(), regularization()], logger=logger).test(
        Tested(), loader(), verbose=False
    )
    assert not layouts_of(logger)
