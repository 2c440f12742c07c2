"""What a run leaves in its loggers at the end: the table as text, and a row among TensorBoard's HParams."""

import pytest
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_gcsr import CompressionMonitor, Gate, GroupLasso

from .models import MemoryLogger, Regression, ValidatedRegression, adam, fit, loader, make_trainer, sgd
from .test_logging import read_tensorboard, regularization
from .test_monitor import regression_with

OURS = {"sparsity/model", "compression/ratio", "compression/stored_ratio"} | {
    f"gcsr/{key}" for key in ("injected", "strength", "penalty")
}


def hparams_of(logger):
    """The hyperparameters and the metrics that TensorBoard shows of a run: those that were written first."""
    contents = EventAccumulator(logger.log_dir).Reload().PluginTagToContent(metadata.PLUGIN_NAME)
    started = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    values = {name: value.string_value or value.number_value for name, value in started.hparams.items()}
    return values, [info.name.tag for info in experiment.metric_infos]


def texts_of(logger):
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    return {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]
        for tag in events.PluginTagToContent("text")
    }


class Saves(ValidatedRegression):
    """A module with hyperparameters of its own."""

    def __init__(self, width=8, nested=None):
        super().__init__()
        self.save_hyperparameters()


def run(tmp_path, model, callbacks=None, data=None, **kwargs):
    logger = TensorBoardLogger(tmp_path, name="tensorboard", **kwargs)
    callbacks = callbacks or [regularization(), CompressionMonitor()]
    trainer = make_trainer(tmp_path, callbacks, logger=logger, max_epochs=2)
    trainer.fit(model, *([] if data else [loader(), loader(count=4)]), datamodule=data)
    return logger


# -- hyperparameters -----------------------------------------------------------------------------------------------


def test_settings_and_all_metrics_are_compared(tmp_path):
    logger = run(tmp_path, ValidatedRegression())
    values, metrics = hparams_of(logger)
    assert values["gcsr/strength"] == 0.05
    assert values["gcsr/penalty"] == "l1"
    assert values["gcsr/gate.coherence"] == "agreement"
    assert values["gcsr/schedule.warmup"] == 0.3  # what was chosen where nothing was said
    assert values["sparsity/zero_threshold"] == 0.0
    assert set(metrics) == OURS | {"loss", "validation_loss"}
    # Five are shown before anything is chosen.
    assert metrics[:5] == ["sparsity/model", "compression/ratio", "gcsr/strength", "validation_loss", "loss"]
    found = read_tensorboard(logger)
    assert all(metric in found for metric in metrics)
    assert len(found["sparsity/model"]) == len(dict(found["sparsity/model"]))  # and no point twice


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_settings_are_those_at_work_where_they_were_left_open(tmp_path, make_optimizer):
    """They are the same under every optimizer, and other ones with another gate."""
    values, _ = hparams_of(run(tmp_path, ValidatedRegression(make_optimizer=make_optimizer)))
    chosen = ("gate.averaging", "gate.tolerance", "schedule.warmup")
    assert [values[f"gcsr/{name}"] for name in chosen] == [0.98, 0.1, 0.3]
    strict = [regularization(gate=Gate("direction", scope="model")), CompressionMonitor()]
    values, _ = hparams_of(run(tmp_path, ValidatedRegression(make_optimizer=make_optimizer), strict))
    assert [values[f"gcsr/{name}"] for name in (*chosen, "gate.threshold")] == [0.0, 0.0, 0.0, 0.1]


def test_settings_of_every_kind_are_written(tmp_path):
    callbacks = [
        regularization(penalty=GroupLasso(dim=0), strength={r"\.0\.": 0.1}, name="rows", exclude=["bias"]),
        regularization(strength=None, target_sparsity=0.5, name="target", include=[r"\.2\."]),
        CompressionMonitor(zero_threshold=0.001, verbose=False),
    ]
    with pytest.warns(UserWarning, match="target_sparsity"):
        values, metrics = hparams_of(run(tmp_path, ValidatedRegression(), callbacks))
    assert values["rows/penalty"] == "GroupLasso(dim=0)"
    assert values["rows/strength"] == repr({r"\.0\.": 0.1})
    assert values["rows/exclude"] == "['bias']"
    assert values["target/target_sparsity"] == 0.5
    assert values["target/strength"] == "None"
    assert values["sparsity/zero_threshold"] == 0.001
    assert {"rows/strength", "target/strength"} <= set(metrics)


def test_hyperparameters_of_the_module_are_kept(tmp_path):
    """Lightning's own row has one metric and would be the only one that is shown."""
    stopping = EarlyStopping("validation_loss", patience=100)
    callbacks = [stopping, regularization(), CompressionMonitor()]
    logger = run(tmp_path, Saves(width=7, nested={"a": 1, "b": {"c": [2]}}), callbacks)
    values, metrics = hparams_of(logger)
    assert values["width"] == 7.0
    assert values["nested/a"] == 1.0
    assert values["nested/b/c"] == "[2]"
    assert values["gcsr/strength"] == 0.05
    assert set(metrics) == OURS | {"hp_metric", "validation_loss"}
    with open(f"{logger.log_dir}/hparams.yaml") as file:
        assert yaml.safe_load(file) == {"width": 7, "nested": {"a": 1, "b": {"c": [2]}}}


def test_hyperparameters_of_the_data_are_kept(tmp_path):
    class Data(LightningDataModule):
        def __init__(self, count=16):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return loader(self.hparams.count)

    values, metrics = hparams_of(run(tmp_path, Regression(), data=Data(12)))
    assert values["count"] == 12.0
    assert "hp_metric" in metrics


def test_module_that_keeps_its_hyperparameters_to_itself(tmp_path):
    class Silent(ValidatedRegression):
        def __init__(self, width=8):
            super().__init__()
            self.save_hyperparameters(logger=False)

    values, metrics = hparams_of(run(tmp_path, Silent()))
    assert "width" not in values
    assert "hp_metric" not in metrics


def test_hyperparameters_without_a_placeholder_come_with_all_metrics(tmp_path):
    values, metrics = hparams_of(run(tmp_path, Saves(width=7), default_hp_metric=False))
    assert values["width"] == 7.0
    assert set(metrics) == OURS | {"loss", "validation_loss"}


def test_what_the_user_writes_is_what_is_shown(tmp_path):
    class Writes(Saves):
        def on_train_start(self):
            self.logger.log_hyperparams(self.hparams, {"mine": 0.5})

    values, metrics = hparams_of(run(tmp_path, Writes(width=7), default_hp_metric=False))
    assert set(values) == {"width", "nested"}
    assert metrics == ["mine"]


def test_prefix_of_the_logger_is_part_of_the_metrics(tmp_path):
    _, metrics = hparams_of(run(tmp_path, ValidatedRegression(), prefix="p"))
    assert set(metrics) == {f"p-{key}" for key in OURS | {"loss", "validation_loss"}}


def test_the_settings_that_tell_runs_apart_are_shown_first(tmp_path):
    logger = run(tmp_path, ValidatedRegression())
    contents = EventAccumulator(logger.log_dir).Reload().PluginTagToContent(metadata.PLUGIN_NAME)
    infos = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG]).hparam_infos
    first = {"penalty", "strength", "target_sparsity", "gate.coherence", "update"}
    assert {info.name for info in infos if info.differs} == {f"gcsr/{name}" for name in first}


@pytest.mark.parametrize(
    "regularized",
    [{}, {"gate": None}, {"strength": None, "target_sparsity": 0.5}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*target_sparsity")
def test_runs_of_every_kind_have_the_same_settings(tmp_path, regularized):
    without, _ = hparams_of(run(tmp_path, ValidatedRegression(), [CompressionMonitor()]))
    assert (without["gcsr/penalty"], without["gcsr/strength"]) == ("None", 0.0)
    values, _ = hparams_of(run(tmp_path, ValidatedRegression(), [regularization(**regularized), CompressionMonitor()]))
    assert set(values) == set(without)


def test_a_run_that_goes_on_is_in_the_table(tmp_path):
    class Stops(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            contents = EventAccumulator(trainer.logger.log_dir).Reload().PluginTagToContent(metadata.PLUGIN_NAME)
            assert list(contents) == [metadata.SESSION_START_INFO_TAG]

    run(tmp_path, ValidatedRegression(), [CompressionMonitor(), Stops()])


def test_run_without_a_penalty_has_a_row_too(tmp_path):
    values, metrics = hparams_of(run(tmp_path, ValidatedRegression(), [CompressionMonitor()]))
    assert values["sparsity/zero_threshold"] == 0.0
    assert set(metrics) == {
        "sparsity/model",
        "compression/ratio",
        "compression/stored_ratio",
        "loss",
        "validation_loss",
    }


# -- the table -----------------------------------------------------------------------------------------------------


def test_text_is_the_table_of_the_end(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="tensorboard"), CSVLogger(tmp_path, name="csv")]
    callbacks = [regularization(gate=None, strength=1e-9, include=[r"\.2\.weight"]), CompressionMonitor()]
    fit(tmp_path, regression_with(*[0.0] * 32), callbacks, logger=loggers, max_epochs=2)
    [(step, text)] = texts_of(loggers[0])["summary/text_summary"]
    assert step == 7
    assert text.startswith("80.00% of 40 weights are zero: compression ratio 5.0×.")
    assert "| net.0.weight | 8×4 | 32 | 100.00% | bitmask | 4 | 3.1% |" in text.splitlines()
    assert "- gcsr/strength: 1e-09" in text.splitlines()
    with open(f"{loggers[1].log_dir}/summary.md") as file:
        assert file.read() == text


def test_no_summary_where_it_is_not_wanted(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="tensorboard"), CSVLogger(tmp_path, name="csv")]
    fit(tmp_path, Regression(), [regularization(), CompressionMonitor(log_summary=False)], logger=loggers)
    tags = EventAccumulator(loggers[0].log_dir).Reload().Tags()["tensors"]
    assert not [tag for tag in tags if "summary" in tag or "hparams" in tag]
    assert not list(tmp_path.rglob("summary.md"))


def test_no_summary_of_a_fast_dev_run(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="tensorboard"), CSVLogger(tmp_path, name="csv")]
    fit(tmp_path, Regression(), CompressionMonitor(), logger=loggers, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_other_loggers_get_the_settings(tmp_path):
    class Remembers(MemoryLogger):
        def log_hyperparams(self, params):
            self.hparams = dict(params)

    logger = Remembers()
    fit(tmp_path, Regression(), [regularization(), CompressionMonitor()], logger=logger)
    assert logger.hparams["gcsr/strength"] == 0.05
