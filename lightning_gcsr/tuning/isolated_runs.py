"""Trials: copies of a Trainer and a model train, while those of the user stay as they are."""

from __future__ import annotations

import copy
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from lightning_gcsr._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check_trainer,
    counterpart,
    is_a,
    is_fast_dev_run,
    misconfiguration,
    package_of,
    trainer_callbacks,
)
from lightning_gcsr.sparsity.computed_weights import masked_attributes
from lightning_gcsr.validation import argument_error, near_names

__all__ = ["Trials", "untouched"]

# What shapes the training itself; other callbacks write, print, stop and save, which is not for a trial. By name,
# because not every Lightning that we support has each of them.
_PART_OF_THE_TRAINING = {
    "BaseFinetuning",
    "GradientAccumulationScheduler",
    "GradientCoherentRegularization",
    "KeepZeros",
    "StochasticWeightAveraging",
    "WeightAveraging",
}
_DATA = (DataLoader, Dataset, Sampler)


@dataclass
class Trials:
    """Trains copies of a model by copies of a Trainer, each from the same weights, data order and random state.

    A copy has no logger, no checkpoints, no progress bar, and of the callbacks only those that shape the training.

    Raises:
        MisconfigurationException: If the Trainer cannot be copied or used for trials; see :meth:`check`.
    """

    trainer: Trainer
    model: LightningModule
    train_dataloaders: Any = None
    val_dataloaders: Any = None
    datamodule: Optional[LightningDataModule] = None
    callbacks: Sequence[Callback] = ()
    """Further callbacks that the training depends on."""
    quiet: bool = False
    """Whether warnings are silenced, since a copy before has given them."""
    wanted_by: str = "find_strength"
    """The function that messages name."""

    def check_copies(self) -> None:
        """Refuse a Trainer whose copies would not do what it does."""
        check_trainer(self.trainer, self.wanted_by)
        strategy = self.trainer.strategy
        if not is_a(strategy, "SingleDeviceStrategy", "DDPStrategy"):
            raise misconfiguration(
                self.trainer,
                f"`{self.wanted_by}` does not support the strategy {type(strategy).__name__}: it works on copies of the"
                " model. Use a single device or strategy='ddp'.",
            )
        if is_a(strategy.launcher, "_MultiProcessingLauncher"):
            raise misconfiguration(
                self.trainer,
                f"`{self.wanted_by}` does not support strategies that start their processes anew for each call, as"
                " 'ddp_spawn' and 'ddp_notebook' do: what a copy finds would stay there. Use strategy='ddp' in a"
                " script or a single device.",
            )

    def check(self) -> None:
        """Refuse what would not give trials that are worth something, before anything runs."""
        self.check_copies()
        if is_fast_dev_run(self.trainer):
            raise misconfiguration(
                self.trainer,
                "`find_strength` needs a Trainer that trains, got one with fast_dev_run. Leave it out; a Trainer with"
                " fewer epochs makes trials short.",
            )
        if self.trainer.global_step > 0:
            raise misconfiguration(
                self.trainer,
                f"`find_strength` needs a Trainer that has not trained yet, got one after {self.trainer.global_step}"
                " steps, which would not start at the beginning. Make a new Trainer; the model may be trained already.",
            )
        if self.trainer.max_steps == -1 and self.trainer.max_epochs in (None, -1):
            raise misconfiguration(
                self.trainer,
                "`find_strength` needs trials that end, and this Trainer trains without end. Give it `max_epochs` or"
                " `max_steps`.",
            )

    def fit(self, callbacks: Sequence[Callback], only_one_step: bool = False) -> Trainer:
        """Train one copy; ``trainer.lightning_module`` of what comes back is the model that was trained."""
        trainer, model = self._copies([*callbacks, _OneStep()] if only_one_step else callbacks)
        loop = trainer.fit_loop
        loop.min_epochs, loop.epoch_loop.min_steps = None, None  # a trial that has failed ends at once
        with self._from_the_start() as datamodule, warnings.catch_warnings():
            if only_one_step:
                warnings.simplefilter("ignore")  # of an early end; what else there is comes again in a trial
            trainer.fit(model, self.train_dataloaders, self.val_dataloaders, datamodule=datamodule)
        return trainer

    def validate(self, trained: Optional[Trainer] = None) -> dict[str, float]:
        """The metrics of a validation: of the model that was trained, or of one that was not."""
        return self._validate(*(self._copies(()) if trained is None else (trained, trained.lightning_module)))

    def validate_changed(self, change: Callable[[LightningModule], object]) -> dict[str, float]:
        """The metrics of a validation of a copy whose weights were changed.

        Only the further ``callbacks`` take part: one that shapes the training, such as an average of the weights, would
        put its own weights in.
        """
        trainer, model = self._copies((), shaping=False)
        change(model)
        return self._validate(trainer, model)

    def _validate(self, trainer: Trainer, model: LightningModule) -> dict[str, float]:
        with self._from_the_start() as datamodule:
            trainer.validate(model, self.val_dataloaders, verbose=False, datamodule=datamodule)
        return metrics_of(trainer)

    @contextmanager
    def _from_the_start(self) -> Iterator[Optional[LightningDataModule]]:
        """The same random state and position of the data for each, and silence but for warnings."""
        log = logging.getLogger(package_of(self.trainer))
        level = log.level
        log.setLevel(max(level, logging.WARNING))
        try:
            with data_as_before(*self.data()), random_state_as_before(), warnings.catch_warnings():
                # That weights collapse and gradients overflow is what a trial is about.
                warnings.filterwarnings("ignore", r".*: (at step \d+ the weights of|until step \d+ the loss gradient)")
                warnings.filterwarnings("ignore", r"KeepZeros: the training ended after")
                if self.quiet:
                    warnings.simplefilter("ignore")
                yield copy.copy(self.datamodule)  # what its `setup` makes stays with the copy
        finally:
            log.setLevel(level)

    def _copies(self, callbacks: Sequence[Callback], shaping: bool = True) -> tuple[Trainer, LightningModule]:
        present: list[Callback] = trainer_callbacks(self.trainer)
        replaced = {callback.state_key for callback in callbacks}
        named = [callback for callback in self.callbacks if callback not in present]
        kept = [
            callback
            for callback in present
            if (shaping and _shapes_training(callback) and callback.state_key not in replaced)
            or callback in self.callbacks
        ]
        memo: dict[int, Any] = {id(self.trainer.profiler): counterpart(self.trainer, PassThroughProfiler)()}  # type: ignore[attr-defined]
        memo |= {id(logger): counterpart(self.trainer, DummyLogger)() for logger in self.trainer.loggers}
        memo |= {id(other): Callback() for other in present if other not in kept}
        memo |= {id(data): data for data in self.data()}
        # What each run makes anew is not copied from an earlier one: the loaders hold its data, the optimizers a state.
        loops = (*self._loops(), self.trainer.test_loop, self.trainer.predict_loop)
        memo |= {id(loop._combined_loader): None for loop in loops}
        strategy = self.trainer.strategy
        processes = getattr(strategy.launcher, "procs", [])  # those that it started; no trial starts more
        memo |= {id(made): [] for made in (strategy._optimizers, strategy.lr_scheduler_configs, processes)}
        # Nor is another Trainer copied that a module was trained by, with all that it holds.
        earlier = [part._trainer for part in self.model.modules() if is_a(part, "LightningModule")]
        memo |= {id(other): Trainer.__new__(type(other)) for other in earlier if other not in (None, self.trainer)}
        memo |= {id(weight): weight.detach().clone() for weight in masked_attributes(self.model)}
        try:
            trainer, model, others = copy.deepcopy((self.trainer, self.model, [*kept, *named]), memo)
        except Exception as error:
            raise misconfiguration(
                self.trainer,
                f"`{self.wanted_by}` works on copies of model and Trainer, and Python cannot copy them: {error}. Keep"
                " what cannot be copied (locks, open files, tensors that carry a gradient history) out of their"
                " attributes.",
            ) from error
        trainer.callbacks = [*others, *callbacks]  # type: ignore[attr-defined]
        model.configure_callbacks = list  # type: ignore[method-assign]  # those of the module are left out, too
        trainer.num_sanity_val_steps = 0
        trainer.log_every_n_steps = 10  # type: ignore[attr-defined]
        return trainer, model

    def data(self) -> Iterator[Any]:
        """What holds data and is shared instead of copied."""
        yield from (self.train_dataloaders, self.val_dataloaders, self.datamodule)
        sources = [loop._data_source.instance for loop in self._loops()]  # of an earlier `trainer.validate`
        yield from (source for source in sources if not is_a(source, "LightningModule"))
        holders = (self.trainer, self.model)
        yield from (value for holder in holders for value in vars(holder).values() if _holds_data(value))

    def _loops(self) -> tuple[Any, ...]:
        return (self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop.val_loop, self.trainer.validate_loop)


class _OneStep(Callback):
    """Ends after one optimizer step a training that was set up at its full length, which schedules may ask for."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = 1


def _shapes_training(callback: Callback) -> bool:
    return any(kind.__name__ in _PART_OF_THE_TRAINING for kind in type(callback).__mro__)


def metrics_of(trainer: Trainer) -> dict[str, float]:
    """The metrics logged last, averaged over processes, so that all of them see the same numbers."""
    metrics = {name: value.detach() for name, value in sorted(trainer.callback_metrics.items()) if value.numel() == 1}
    if trainer.world_size == 1:
        return {name: float(value) for name, value in metrics.items()}
    known: list[list[str]] = [[]] * trainer.world_size
    torch.distributed.all_gather_object(known, list(metrics))
    shared = [name for name in metrics if all(name in names for names in known)]  # one may log more than another
    return {name: float(trainer.strategy.reduce(metrics[name].double(), reduce_op="mean")) for name in shared}


def unknown_metric(metric: str, logged: list[str], by: str, advice: str = "") -> Exception:
    """An error that lists what is logged, and says which name is near unless there is other advice."""
    if not advice:
        advice = f"Did you mean {near_names(metric, logged, 1)[0]!r}?" if logged else "Log one with `self.log`."
    rule = f"must be one of the metrics that {by} logs, {', '.join(map(repr, logged)) or 'which are none'}"
    return argument_error("metric", metric, rule, advice)


@contextmanager
def untouched(*data: Any) -> Iterator[None]:
    """Leave random state, signal handlers and what the data loaders know of their position as they are found.

    Lightning turns Ctrl-C into ``SystemExit`` and ignores it from then on; here it stays a ``KeyboardInterrupt``.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()} if in_main_thread else {}
    try:
        with data_as_before(*data), random_state_as_before():
            yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def random_state_as_before() -> Iterator[None]:
    """Put back the random state of torch, NumPy and Python, after an exception too, as Lightning's own does not."""
    with ExitStack() as stack:
        isolation = isolate_rng()
        isolation.__enter__()
        stack.callback(isolation.__exit__, None, None, None)
        yield


@contextmanager
def data_as_before(*data: Any) -> Iterator[None]:
    """Put back the attributes of loaders, samplers, datasets and data modules, and the state of their generators."""
    holders = _holders(data)
    attributes = [dict(vars(holder)) for holder in holders]
    restore = [_state_of(value) for known in attributes for value in known.values()]
    try:
        yield
    finally:
        for holder, known in zip(holders, attributes, strict=True):
            vars(holder).clear()
            vars(holder).update(known)
        for put_back in restore:
            put_back()


def _holders(data: Iterable[Any]) -> list[Any]:
    """Loaders, data modules, datasets and samplers: those given, and those that these hold."""
    found: dict[int, Any] = {}
    waiting = list(data)
    while waiting:
        item = waiting.pop()
        if id(item) in found:
            continue
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif item is not None and hasattr(item, "__dict__"):
            found[id(item)] = item
            waiting.extend(value for value in vars(item).values() if _is_data(value))
    return list(found.values())


def _is_data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):  # as of a ConcatDataset; a list of samples may be long
        return bool(value) and _holds_data(value[0])
    return _holds_data(value)


def _holds_data(value: Any) -> bool:
    return isinstance(value, _DATA) or is_a(value, "CombinedLoader", "LightningDataModule")


def _state_of(value: Any) -> Callable[[], object]:
    """What puts the state of a random generator back; nothing for other things."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.Generator):
        numbers = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", numbers)
    return lambda: None
