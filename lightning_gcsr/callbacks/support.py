"""What our callbacks share: which Trainers they support, when Lightning logs, and how numbers reach its loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["check_trainer", "completes_step", "log_metrics", "logs_now", "show_metrics", "total_steps"]

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
_UNLIKE_THEIR_PARENTS = (DeepSpeedStrategy, SingleDeviceXLAStrategy, XLAStrategy)  # subclasses of these
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


def check_trainer(trainer: Trainer, callback: str) -> None:
    """Refuse a strategy or a precision on which the callback would silently do the wrong thing.

    Raises:
        MisconfigurationException: If the Trainer's strategy or precision is not supported.
    """
    if not isinstance(trainer.strategy, _STRATEGIES) or isinstance(trainer.strategy, _UNLIKE_THEIR_PARENTS):
        raise MisconfigurationException(
            f"`{callback}` does not support the strategy {type(trainer.strategy).__name__}: there the callback would"
            " not see all of the gradients and weights. Use a single device, strategy='ddp', or ModelParallelStrategy"
            " (FSDP2 and tensor parallelism)."
        )
    if trainer.precision not in _PRECISIONS:
        raise MisconfigurationException(
            f"`{callback}` does not support precision={trainer.precision!r} yet."
            f" Use one of {', '.join(map(repr, _PRECISIONS))}."
        )


def total_steps(trainer: Trainer, wanted_by: str) -> int:
    """The number of optimizer steps of the whole training.

    Raises:
        MisconfigurationException: If the training has no end that is known at its start.
    """
    total = trainer.estimated_stepping_batches
    if total == float("inf") or total < 0:  # of epochs of unknown length Lightning gives max_steps, or −1
        raise MisconfigurationException(
            f"{wanted_by} is a share of the training, whose length is not known. Give the Trainer max_steps, or"
            " max_epochs and a train dataloader with a length, or say how many steps, as an integer."
        )
    return int(total)


def completes_step(trainer: Trainer) -> bool:
    """Whether an optimizer step follows the batch at hand, under automatic optimization."""
    # Private, but it is the very function by which Lightning decides, and its ThroughputMonitor uses it likewise.
    return not trainer.fit_loop._should_accumulate()


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning logs the step at hand (``log_every_n_steps``); LearningRateMonitor asks the same way."""
    return trainer._logger_connector.should_update_logs


def log_metrics(trainer: Trainer, metrics: Mapping[str, float], step: int, prog_bar: Iterable[str] = ()) -> None:
    """Send numbers to every logger, and to where other callbacks look for them, see :func:`show_metrics`.

    ``LightningModule.log`` would cost a millisecond for each number, and repeat stale ones while a module that
    optimizes by hand accumulates.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    show_metrics(trainer, metrics, prog_bar)


def show_metrics(trainer: Trainer, metrics: Mapping[str, float], prog_bar: Iterable[str] = ()) -> None:
    """Put numbers where ``ModelCheckpoint`` and ``EarlyStopping`` look for them, and some into the progress bar.

    ``trainer.progress_bar_metrics`` is what every progress bar of Lightning shows, and what ``LightningModule.log``
    with ``prog_bar=True`` fills.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    trainer.progress_bar_metrics.update({name: metrics[name] for name in prog_bar})
