"""TensorBoard's HParams: a row for each run, with its settings and the metrics by which runs are compared.

Of a run TensorBoard takes the first hyperparameters that were written and no others, and it shows the columns of one
run for all. So every run writes the same settings, whatever penalizes its weights, with "None" for what it lacks.

Lightning writes the hyperparameters of ``save_hyperparameters`` at the start of ``fit``, with one metric,
``hp_metric``. Where it is about to do so, the same is written before it, with our settings and metrics in addition.
Otherwise the settings are written when the first step is logged, so that a run that goes on is in the table, and the
metrics at the end of ``fit``, when all are known. What a user writes stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from lightning_gcsr._lightning import LightningModule, Trainer, trainer_callbacks, trainer_loggers
from lightning_gcsr.callbacks.reporting.gate_logging import settings_without_penalty
from lightning_gcsr.callbacks.reporting.loggers import prefixed
from lightning_gcsr.callbacks.reporting.tensorboard_layout import run_holds

__all__ = ["Compared", "settings_of", "write_at_end", "write_at_first_step", "write_at_start"]

_SHOWN_FIRST = ("/penalty", "/strength", "/target_sparsity", "/gate.coherence", "/update")


@runtime_checkable
class Compared(Protocol):
    """A callback with settings of its own, and metrics by which runs are compared."""

    def hyperparameters(self, trainer: Trainer) -> dict[str, Any]:
        """The settings for this Trainer, by names that begin with that of the callback."""

    def compared_metrics(self) -> list[str]:
        """The keys of the metrics, those of the whole model."""


def _compared(trainer: Trainer) -> list[Compared]:
    return [callback for callback in trainer_callbacks(trainer) if isinstance(callback, Compared)]


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """The settings of all our callbacks; without a regularization, those that stand for none."""
    compared = _compared(trainer)
    settings = {name: value for callback in compared for name, value in callback.hyperparameters(trainer).items()}
    return settings if any(name.endswith("/penalty") for name in settings) else settings_without_penalty() | settings


def write_at_start(trainer: Trainer, module: LightningModule) -> None:
    """Where Lightning is about to write the module's hyperparameters with its placeholder, write ours with them."""
    saved = _saved(trainer, module)
    if not saved or not getattr(trainer, "enable_autolog_hparams", True):
        return
    monitors = [getattr(callback, "monitor", None) for callback in trainer_callbacks(trainer)]
    metrics = ["hp_metric", *[monitor for monitor in monitors if isinstance(monitor, str)], *_metrics(trainer)]
    for logger in _tensorboard(trainer):
        if logger._default_hp_metric:
            _write(logger, saved | settings_of(trainer), metrics)


def write_at_first_step(trainer: Trainer, module: LightningModule) -> None:
    """Write the hyperparameters where the run has none yet; the metrics follow at the end."""
    for logger in _tensorboard(trainer):
        _write(logger, _saved(trainer, module) | settings_of(trainer), metrics=())


def write_at_end(trainer: Trainer, module: LightningModule) -> None:
    """Write all metrics, where the run has none."""
    logged = [key for key in trainer.logged_metrics if key != "epoch"]
    ours = [key for key in _metrics(trainer) if key in trainer.callback_metrics]
    # TensorBoard shows the first five before anything else is chosen, and what is logged last is that of validation.
    strengths = [key for key in ours if key.endswith("/strength")]
    metrics = ["sparsity/model", "compression/ratio", *strengths, *reversed(logged), *ours]
    for logger in _tensorboard(trainer):
        _write(logger, _saved(trainer, module) | settings_of(trainer), metrics)


def _metrics(trainer: Trainer) -> list[str]:
    return [key for callback in _compared(trainer) for key in callback.compared_metrics()]


def _saved(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What Lightning would log of ``save_hyperparameters``."""
    holders = [holder for holder in (module, getattr(trainer, "datamodule", None)) if holder is not None]
    saved = [holder.hparams_initial for holder in holders if holder._log_hyperparams]
    return {name: value for values in saved for name, value in values.items() if name != "_class_path"}


def _tensorboard(trainer: Trainer) -> Iterator[Any]:
    if trainer.is_global_zero:
        yield from trainer_loggers(trainer, "TensorBoardLogger")


def _write(logger: Any, parameters: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """As ``TensorBoardLogger.log_hyperparams``, which would write each metric once more, and ours into hparams.yaml.

    Without metrics only the start of the session is written, which has the values of the run. The metrics come with
    the experiment, which has the columns.
    """
    metrics = list(metrics)
    started = run_holds(logger, "_hparams_/session_start_info")
    if run_holds(logger, "_hparams_/experiment") or (started and not metrics):
        return
    try:
        from torch.utils.tensorboard.summary import hparams
    except ImportError:  # tensorboardX alone
        return
    keys = dict.fromkeys((prefixed(logger, key) for key in metrics), 0.0)
    writer = logger.experiment._get_file_writer()
    experiment, start, end = hparams(dict(_flat(parameters)), keys)  # type: ignore[no-untyped-call]
    _show_first(experiment)
    for summary in [experiment, start, end] if metrics else [start]:
        writer.add_summary(summary)


def _show_first(experiment: Any) -> None:
    """Mark the settings that tell runs apart: TensorBoard shows five before any is chosen, marked ones first."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        if hasattr(info, "differs") and info.name.endswith(_SHOWN_FIRST):  # old versions have no such mark
            info.differs = True
    plugin.content = data.SerializeToString()


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value if isinstance(value, (bool, int, float, str)) else str(value)
