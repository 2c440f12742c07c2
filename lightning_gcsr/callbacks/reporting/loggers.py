"""Numbers to every logger; images, tables and settings to each that takes them, by the first process only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightning_gcsr._lightning import Trainer, is_logger, trainer_loggers
from lightning_gcsr.sparsity.summary import HEADER, CompressionSummary, markdown_table
from lightning_gcsr.storage.atomic_write import replace_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "log_image",
    "log_metrics",
    "log_settings",
    "log_summary",
    "prefixed",
    "show_metrics",
    "takes_images",
]


def log_metrics(
    trainer: Trainer, metrics: Mapping[str, float], step: int, prog_bar: Mapping[str, str] | None = None
) -> None:
    """Send numbers to every logger, and to where other callbacks look for them, see :func:`show_metrics`.

    ``LightningModule.log`` would cost a millisecond for each number, and repeat stale ones while a module that
    optimizes by hand accumulates.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    show_metrics(trainer, metrics, prog_bar)


def show_metrics(trainer: Trainer, metrics: Mapping[str, float], prog_bar: Mapping[str, str] | None = None) -> None:
    """Put numbers where ``ModelCheckpoint`` and ``EarlyStopping`` look for them, and some into the progress bar.

    ``trainer.progress_bar_metrics`` is what every progress bar of Lightning shows, and what ``LightningModule.log``
    with ``prog_bar=True`` fills. ``prog_bar`` has short names for the bar, and the keys that they stand for.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    trainer.progress_bar_metrics.update({name: metrics[key] for name, key in (prog_bar or {}).items()})


def takes_images(logger: object) -> bool:
    """Whether :func:`log_image` gives this logger any."""
    return is_logger(logger, "TensorBoardLogger", "MLFlowLogger", "WandbLogger")


def prefixed(logger: Any, key: str) -> str:
    """The key as the logger writes it."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}{key}" if prefix else key


def log_image(trainer: Trainer, key: str, image: NDArray[np.uint8], step: int) -> None:
    """An image of shape (height, width, 3)."""
    if not trainer.is_global_zero:
        return
    for logger in trainer_loggers(trainer):
        if is_logger(logger, "TensorBoardLogger"):
            logger.experiment.add_image(prefixed(logger, key), image, step, dataformats="HWC")
        elif is_logger(logger, "WandbLogger"):
            logger.log_image(key, [image], step)
        elif is_logger(logger, "MLFlowLogger"):
            logger.experiment.log_image(logger.run_id, image, key=prefixed(logger, key), step=step)


def log_summary(trainer: Trainer, summary: CompressionSummary, settings: Mapping[str, Any], step: int) -> None:
    """The table of the layers and the settings, as text; into a file ``summary.md`` where there are files only."""
    if not trainer.is_global_zero:
        return
    rows = summary.rows(limit=100)
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    text = "\n".join([summary.sentence(), "", markdown_table(rows), "", *lines, ""])
    for logger in trainer_loggers(trainer):
        if is_logger(logger, "TensorBoardLogger"):
            logger.experiment.add_text(prefixed(logger, "summary"), text, step)
        elif is_logger(logger, "WandbLogger"):
            logger.log_table("summary", list(HEADER), [list(row) for row in rows], step=step)
        elif is_logger(logger, "MLFlowLogger"):
            logger.experiment.log_text(logger.run_id, text, "summary.md")
        elif is_logger(logger, "CSVLogger") and "://" not in logger.log_dir:
            os.makedirs(logger.log_dir, exist_ok=True)
            replace_file(os.path.join(logger.log_dir, "summary.md"), text.encode())


def log_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """The settings as hyperparameters, beside those of the module.

    Not for TensorBoard, where hyperparameters come with metrics, and not for CSV, whose ``hparams.yaml`` is that of the
    module: ``load_from_checkpoint`` can read it.
    """
    for logger in trainer_loggers(trainer) if trainer.is_global_zero else ():
        new = dict(settings)
        if is_logger(logger, "TensorBoardLogger", "CSVLogger"):
            continue
        if is_logger(logger, "MLFlowLogger"):  # it refuses to change what a run that goes on has
            known = logger.experiment.get_run(logger.run_id).data.params
            new = {name: value for name, value in new.items() if name not in known}
        logger.log_hyperparams(new)
