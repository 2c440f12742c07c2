"""What this package reads from Lightning beyond its typed public interface, and which of its two packages is at work.

A Trainer comes from ``lightning.pytorch`` or from ``pytorch_lightning``: the same code under two names, where no class
of the one is a class of the other. Objects are therefore recognized by the names of their classes, and neither package
has to be installed for the other to work. Private names and untyped attributes of Lightning appear in no other module.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_gcsr.core.schedule import Clock

__all__ = [
    "Callback",
    "LightningModule",
    "Trainer",
    "check_trainer",
    "checkpoint_callbacks",
    "clock",
    "completes_step",
    "counterpart",
    "is_a",
    "is_fast_dev_run",
    "is_logger",
    "logged_step",
    "logs_now",
    "loss_scale",
    "misconfiguration",
    "overrides",
    "package_of",
    "rank_zero_info",
    "rank_zero_warn",
    "state_to_copy",
    "trainer_callbacks",
    "trainer_loggers",
]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_UNLIKE_THEIR_PARENTS = ("DeepSpeedStrategy", "SingleDeviceXLAStrategy", "XLAStrategy")  # subclasses of these
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


# -- which package, which class ----------------------------------------------------------------------------------------


def is_a(thing: object, *names: str) -> bool:
    """Whether this is an instance of a class that one of Lightning's two packages defines under one of these names.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> is_a(CSVLogger("logs"), "CSVLogger"), is_a(CSVLogger("logs"), "Logger"), is_a("CSVLogger", "CSVLogger")
        (True, True, False)
    """
    return any(kind.__name__ in names and _package(kind) is not None for kind in type(thing).__mro__)


def _package(kind: type) -> Optional[str]:
    roots = (package for package in _PACKAGES if f"{kind.__module__}.".startswith(f"{package}."))
    return next(roots, None)


def package_of(trainer: Trainer) -> str:
    """The package that this Trainer comes from, ``"lightning.pytorch"`` or ``"pytorch_lightning"``."""
    packages = (_package(kind) for kind in type(trainer).__mro__)
    return next((package for package in packages if package is not None), _PACKAGES[0])


def counterpart(trainer: Trainer, kind: type) -> Any:
    """This class of ``lightning.pytorch``, or that of the same name in the Trainer's own package."""
    module = kind.__module__.replace(_PACKAGES[0], package_of(trainer), 1)
    return getattr(sys.modules.get(module), kind.__name__, kind)


def misconfiguration(trainer: Trainer, message: str) -> Exception:
    """The ``MisconfigurationException`` of the Trainer's own package."""
    exceptions = sys.modules.get(f"{package_of(trainer)}.utilities.exceptions")
    error: Exception = getattr(exceptions, "MisconfigurationException", MisconfigurationException)(message)
    return error


def is_logger(logger: object, *names: str) -> bool:
    """Whether this is a logger of one of these names, of either package."""
    return is_a(logger, *names)


def overrides(holder: object, hook: str) -> bool:
    """Whether a module or data module has its own version of a method that Lightning defines."""
    if hook in vars(holder):
        return True
    return next((_package(kind) is None for kind in type(holder).__mro__ if hook in vars(kind)), False)


def state_to_copy(callback: Callback) -> dict[str, Any]:
    """The attributes of a callback that go along when it is pickled.

    The Trainer attaches two methods of its module to each callback, and with them the module would be pickled, by a
    library that keeps its callbacks in saved models, as darts does. The Trainer attaches them anew in each fit.
    """
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}


# -- what belongs to the Trainer ---------------------------------------------------------------------------------------


def trainer_callbacks(trainer: Trainer) -> list[Any]:
    """The Trainer's callbacks, in their order; its callback connector sets the attribute."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def trainer_loggers(trainer: Trainer, *names: str) -> Iterator[Any]:
    """The Trainer's loggers of these names; without names, all."""
    yield from (logger for logger in trainer.loggers if not names or is_logger(logger, *names))


def checkpoint_callbacks(trainer: Trainer) -> list[Any]:
    """The Trainer's ``ModelCheckpoint`` callbacks, of either package."""
    return [callback for callback in trainer_callbacks(trainer) if is_a(callback, "ModelCheckpoint")]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the Trainer makes a run of a few batches to find faults; its constructor sets the attribute."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def check_trainer(trainer: Trainer, callback: str) -> None:
    """Refuse a strategy or a precision on which the callback would silently do the wrong thing.

    Raises:
        MisconfigurationException: If the Trainer's strategy or precision is not supported.
    """
    if not is_a(trainer.strategy, *_STRATEGIES) or is_a(trainer.strategy, *_UNLIKE_THEIR_PARENTS):
        raise misconfiguration(
            trainer,
            f"`{callback}` does not support the strategy {type(trainer.strategy).__name__}: there the callback would"
            " not see all of the gradients and weights. Use a single device, strategy='ddp', or ModelParallelStrategy"
            " (FSDP2 and tensor parallelism).",
        )
    if trainer.precision not in _PRECISIONS:
        raise misconfiguration(
            trainer,
            f"`{callback}` does not support precision={trainer.precision!r} yet."
            f" Use one of {', '.join(map(repr, _PRECISIONS))}.",
        )


# -- where the training is ---------------------------------------------------------------------------------------------


def completes_step(trainer: Trainer) -> bool:
    """Whether an optimizer step follows the current batch, under automatic optimization."""
    # Private, but Lightning decides by this very function, and its ThroughputMonitor asks it too.
    return not trainer.fit_loop._should_accumulate()


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning logs the current step (``log_every_n_steps``); LearningRateMonitor asks the same way."""
    return trainer._logger_connector.should_update_logs


def logged_step(trainer: Trainer) -> int:
    """The number under which Lightning logs the current step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def clock(trainer: Trainer) -> Clock:
    """How far the training is, before the optimizer step that the current batch belongs to.

    Progress is the fraction of the batches that are done, or of ``max_steps`` where that is larger: where ``max_steps``
    ends the training first. Batches that are accumulated for the current step are not done yet, so that accumulation
    gives the progress of one large batch. Lightning restores what this reads, so progress goes on after a resume.

    May be asked for from ``on_train_start`` on, where it is known whether the training has a length.
    """
    fractions = []
    batches, epochs, steps = trainer.num_training_batches, trainer.max_epochs, trainer.max_steps
    if epochs is not None and epochs > 0 and 0 < batches < math.inf:
        together = max(1, trainer.accumulate_grad_batches)
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # counts the current batch
        done = max(0, ready - 1) // together * together
        fractions.append((trainer.current_epoch + min(1.0, done / batches)) / epochs)
    if steps > 0:
        fractions.append(trainer.global_step / steps)
    return Clock(trainer.global_step, min(1.0, max(fractions)) if fractions else None)


def loss_scale(trainer: Trainer, device: torch.device) -> float | Tensor:
    """What gradients are multiplied by after a backward, without asking the device for it."""
    scaler = trainer.scaler
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))
