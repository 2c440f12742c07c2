"""The callback that writes the compressed weights of a training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Optional, Union

from torch import Tensor
from typing_extensions import override

from lightning_gcsr._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check_trainer,
    checkpoint_callbacks,
    is_a,
    misconfiguration,
    rank_zero_info,
    rank_zero_warn,
    state_to_copy,
    trainer_callbacks,
)
from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.sparsity.computed_weights import counted_weights
from lightning_gcsr.sparsity.counting import count_tensors
from lightning_gcsr.sparsity.tensor_table import totals
from lightning_gcsr.storage.compressed_file import save_compressed
from lightning_gcsr.storage.storable import storable_tensors
from lightning_gcsr.storage.tensor_memory import distinct_tensors
from lightning_gcsr.storage.weights_reader import read_weights
from lightning_gcsr.validation import call_repr, check_finite_number

__all__ = ["CompressedCheckpoint"]

_CLOSE_TO_TARGET = 0.01  # a sparsity that much below `target_sparsity` meets it


class CompressedCheckpoint(Callback):
    """Writes the compressed weights of the best checkpoint at the end of ``fit``.

    The best checkpoint is that of the Trainer's first ``ModelCheckpoint``; the file has its name with the suffix
    ``.safetensors`` and lies beside it. If there is no best checkpoint, or it cannot be read any more (a warning says
    so), the file has the weights at the end of the training and the name ``model.safetensors``. It then lies in the
    folder of the ``ModelCheckpoint``, else of the logger, else in the Trainer's ``default_root_dir``.
    :func:`~lightning_gcsr.load_compressed` loads the weights for ``load_state_dict``.

    The best checkpoint may be older than the sparsity that was asked for: without zeros the loss is often lowest early.
    With ``min_sparsity``, only weights that are at least that sparse are considered. Whenever the ``ModelCheckpoint``
    looks at its metric and the weights are sparse enough, they are compared with the best ones so far; the best are
    kept in the file. Once frozen weights are unfrozen, the comparison begins anew. If none are sparse enough, the file
    has the weights at the end, and a warning says so. A warning also comes if a callback has a ``target_sparsity`` and
    the best checkpoint is more than a percentage point below; not if the target is one of coupled groups.

    Checkpoints are read through the Trainer's ``CheckpointIO``. If that is Lightning's own, nothing in a checkpoint is
    executed: objects among the hyperparameters do not matter. After the last epoch nothing raises; if the file cannot
    be written, a warning says why and ``path`` is ``None``.

    **Hooks used.** ``on_fit_end``, when every checkpoint is written; with ``min_sparsity`` also ``on_validation_end``
    and what follows the end of an epoch. The callback changes nothing in the training. After an exception or an
    interrupt, in ``fast_dev_run`` and under ``barebones``, ``on_fit_end`` writes nothing. **State saved.** With
    ``min_sparsity``, the best metric so far, how many weights were trained then, and the path of the file.

    **Strategies tested.** A single device and DDP, on CPU; the first process writes. ``ModelParallelStrategy`` is
    refused, since each process holds only a part of the weights. **Keys logged.** None; path and sizes are in the log
    on the console.

    Args:
        dirpath: The folder to write to instead. It is created.
        filename: The name of the file instead, with or without its suffix.
        min_sparsity: The least sparsity of the weights to write, in [0, 1]: the sparsity of the trained weights that
            penalties reach. It counts weights, also where a ``target_sparsity`` counts coupled groups.

    Raises:
        ValueError: If ``min_sparsity`` is not in [0, 1].
        MisconfigurationException: Before the first step, if strategy or precision are not supported, if the module's
            state dict holds something other than plain tensors (such as an ``_extra_state``), or if the checkpoints
            are not on a file system and there is no ``dirpath``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_gcsr import CompressedCheckpoint
        >>> best = ModelCheckpoint(monitor="val_loss")
        >>> trainer = Trainer(callbacks=[best, CompressedCheckpoint(min_sparsity=0.9)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        dirpath: Union[str, os.PathLike[str], None] = None,
        filename: Optional[str] = None,
        min_sparsity: Optional[float] = None,
    ) -> None:
        super().__init__()
        if min_sparsity is not None:
            check_finite_number("min_sparsity", min_sparsity, 0.0, 1.0, "Use None to write the best checkpoint.")
        self.dirpath, self.filename, self.min_sparsity = dirpath, filename, min_sparsity
        self.path: Optional[str] = None
        """The file of the last ``fit``, the same on all processes; ``None`` if nothing was written."""
        self._folder: Union[str, os.PathLike[str]] = ""
        self._kept_score: Optional[float] = None
        self._kept_trained = 0  # how many weights were trained when these were kept
        self._epoch_ended = False
        self._stage = "fit"

    def __repr__(self) -> str:
        dirpath = None if self.dirpath is None else os.fspath(self.dirpath)
        return call_repr(type(self).__name__, CompressedCheckpoint, vars(self) | {"dirpath": dirpath})

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage != "fit":
            return
        if is_a(trainer.strategy, "ModelParallelStrategy"):
            raise misconfiguration(
                trainer,
                "`CompressedCheckpoint` does not support ModelParallelStrategy: no process has all of the weights."
                " Gather them after the training, with torch.distributed.checkpoint.state_dict.get_model_state_dict or"
                " ModelParallelStrategy(save_distributed_checkpoint=False), and call save_compressed.",
            )
        check_trainer(trainer, type(self).__name__)
        self._epoch_ended = False
        if trainer.global_step == 0:  # what is there is of an earlier fit; a checkpoint comes after this hook
            self.path, self._kept_score, self._kept_trained = None, None, 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            storable_tensors(pl_module)
        except (TypeError, ValueError) as error:
            raise misconfiguration(trainer, f"`CompressedCheckpoint`: {error}") from error
        if self.min_sparsity is not None:
            _watched(trainer, pl_module)  # raises if there are no such weights
            if average := _averages(trainer):
                rank_zero_warn(
                    f"`CompressedCheckpoint` with min_sparsity writes the weights of the training, and {average}"
                    " validates averaged ones, which are hardly ever zero: the metric is not that of the weights in the"
                    f" file. Leave {average} out, or write the best checkpoint without min_sparsity."
                )
        checkpoints = _model_checkpoint(trainer)
        if self.dirpath is not None:
            self._folder = self.dirpath
        elif checkpoints is not None and checkpoints.dirpath is not None:
            if "://" in str(checkpoints.dirpath):
                raise misconfiguration(
                    trainer,
                    "`CompressedCheckpoint` writes to file systems only, and the checkpoints go to"
                    f" {checkpoints.dirpath}. Give it a `dirpath`.",
                )
            self._folder = checkpoints.dirpath
        else:
            self._folder = trainer.log_dir or trainer.default_root_dir  # which all processes must ask for

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._consider(trainer, pl_module, after_validation=True)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What the module logs in its own `on_train_epoch_end` is known after this hook only; the weights stay.
        self._epoch_ended = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._consider_epoch(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._consider_epoch(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._epoch_ended:
            self._consider_epoch(trainer, pl_module)
            if self.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.barebones or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a function of Lightning's
            return
        if trainer.is_global_zero:
            kept = self._kept_score is not None and self.path is not None and os.path.isfile(self.path)
            if self.min_sparsity is None:
                self._write_best(trainer, pl_module)
            elif not kept:
                self._write_last_of_none(trainer, pl_module)
        self.path = trainer.strategy.broadcast(self.path)  # which also lets every process find the file

    def _consider_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epoch_ended:
            self._epoch_ended = False
            self._consider(trainer, pl_module, after_validation=False)

    def _consider(self, trainer: Trainer, pl_module: LightningModule, after_validation: bool) -> None:
        """Keep the present weights if they are sparse enough and better than all before."""
        if self.min_sparsity is None or trainer.barebones or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        checkpoints = _model_checkpoint(trainer)
        looks_after_epoch = checkpoints is None or checkpoints._should_save_on_train_epoch_end(trainer)
        if looks_after_epoch is after_validation or not trainer.is_global_zero:
            return
        score = float(trainer.global_step)
        if checkpoints is not None and checkpoints.monitor is not None:
            if checkpoints.monitor not in trainer.callback_metrics:
                return
            score = float(trainer.callback_metrics[checkpoints.monitor]) * (-1 if checkpoints.mode == "min" else 1)
        watched = _watched(trainer, pl_module)
        trained = sum(parameter.numel() for parameter in watched.values() if parameter.requires_grad)
        if trained > self._kept_trained:  # weights were unfrozen: what is kept was sparse in only some of them
            self._kept_score = None
        if math.isnan(score) or (self._kept_score is not None and score <= self._kept_score):
            return
        if _sparsity(watched, pl_module) >= self.min_sparsity:
            self._write(pl_module.state_dict(), "model", "the best weights so far")
            self._kept_score, self._kept_trained = score, trained

    def _write_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = _model_checkpoint(trainer)
        best = checkpoints.best_model_path if checkpoints is not None else ""
        if not best:
            self._write(pl_module.state_dict(), "model", "the last weights")
            return
        try:
            tensors = storable_tensors(_weights(trainer, best))
        except Exception as error:  # a plugin may raise anything, and the training is done
            rank_zero_warn(
                f"`CompressedCheckpoint` cannot read the best checkpoint, {best}, and writes the last weights instead."
                f" The reason: {error}"
            )
            self._write(pl_module.state_dict(), "model", "the last weights")
            return
        self._write(tensors, os.path.splitext(os.path.basename(best))[0], "the best checkpoint", os.path.dirname(best))
        callback = _with_target(trainer)
        target = getattr(callback, "target_sparsity", None)
        of_groups = getattr(getattr(callback, "penalty", None), "coupled", False)  # of which a share says nothing here
        if target is not None and not of_groups:
            sparsity = _sparsity(_watched(trainer, pl_module), pl_module, tensors)
            if sparsity < target - _CLOSE_TO_TARGET:
                why = (
                    "it was written before the target was reached. Use"
                    f" CompressedCheckpoint(min_sparsity={target - _CLOSE_TO_TARGET:g}) for the best weights that are"
                    " sparse enough."
                )
                if average := _averages(trainer):
                    why = f"it has the weights that {average} averaged. Leave {average} out."
                rank_zero_warn(
                    f"The best checkpoint, {best}, has a sparsity of {sparsity:.1%}, and target_sparsity={target} asks"
                    f" for more: {why}"
                )

    def _write_last_of_none(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sparsity = _sparsity(_watched(trainer, pl_module), pl_module)
        if sparsity < (self.min_sparsity or 0.0):
            rank_zero_warn(
                f"No weights that were compared reached min_sparsity={self.min_sparsity}. `CompressedCheckpoint` writes"
                f" the last ones, with a sparsity of {sparsity:.1%}."
            )
        self._write(pl_module.state_dict(), "model", "the last weights")

    def _write(
        self, tensors: Mapping[str, Tensor], name: str, what: str, folder: Union[str, os.PathLike[str]] = ""
    ) -> None:
        """Write the file and set ``path``; after a failure warn, and ``path`` is that of a file that is there."""
        folder = self.dirpath or folder or self._folder
        path = os.path.join(folder, (self.filename or name).removesuffix(".safetensors") + ".safetensors")
        try:
            os.makedirs(folder, exist_ok=True)
            save_compressed(tensors, path)
        except Exception as error:  # such as a full disk: the training and its checkpoints must not be lost
            rank_zero_warn(f"`CompressedCheckpoint` cannot write {path}. The reason: {error}")
            self.path = self.path if self.path is not None and os.path.isfile(self.path) else None
            return
        self.path = path
        size, dense = os.path.getsize(path), sum(t.nbytes for t in distinct_tensors(tensors.items()).values())
        rank_zero_info(
            f"CompressedCheckpoint: {path}, {size:,} bytes, {size / max(1, dense):.1%} of the {dense:,} bytes of"
            f" {what}."
        )

    def __getstate__(self) -> dict[str, Any]:
        return state_to_copy(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.min_sparsity is None:
            return {}
        return {"score": self._kept_score, "trained": self._kept_trained, "path": self.path}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":  # Lightning hands over the state of a checkpoint that is validated or tested, too
            return
        path = state_dict.get("path")
        if self.min_sparsity is not None and path is not None and os.path.isfile(path):
            self.path, self._kept_score, self._kept_trained = path, state_dict["score"], state_dict["trained"]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = "fit"


def _averages(trainer: Trainer) -> Optional[str]:
    """The name of a callback that puts averaged weights into the module for validation and checkpoints."""
    return next((type(c).__name__ for c in trainer_callbacks(trainer) if is_a(c, "WeightAveraging")), None)


def _model_checkpoint(trainer: Trainer) -> Any:
    """The Trainer's first ``ModelCheckpoint``, if it has one."""
    return next(iter(checkpoint_callbacks(trainer)), None)


def _with_target(trainer: Trainer) -> Any:
    """The first callback with a ``target_sparsity``, or ``None``."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
    return next((callback for callback in callbacks if getattr(callback, "target_sparsity", None) is not None), None)


def _watched(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The parameters that a sparsity is about: those that the target is for, else those that penalties reach."""
    callback = _with_target(trainer)
    return dict(select_parameters(module, getattr(callback, "include", None), getattr(callback, "exclude", None)))


def _sparsity(
    parameters: Mapping[str, Any], module: LightningModule, tensors: Optional[Mapping[str, Tensor]] = None
) -> float:
    """The sparsity of the trained ones of these parameters, or of their values in a state dict."""
    if tensors is None:
        return totals(count_tensors(counted_weights(module, parameters).trained)).sparsity
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad] or parameters.values()
    wanted = {id(parameter) for parameter in trained}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in wanted]
    names += [f"{name.removesuffix('_orig')}_mask" for name in names if name.endswith("_orig")]
    return totals(count_tensors({name: tensors[name] for name in names if name in tensors})).sparsity


def _weights(trainer: Trainer, path: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint, read as the Trainer's ``CheckpointIO`` has written it."""
    plugin: Any = trainer.strategy.checkpoint_io
    innermost = plugin
    while getattr(innermost, "checkpoint_io", None) is not None:  # such as that of AsyncCheckpointIO
        innermost = innermost.checkpoint_io
    if type(innermost).__name__ == "TorchCheckpointIO" and "://" not in path:
        return read_weights(path).tensors
    weights: dict[str, Tensor] = plugin.load_checkpoint(path)["state_dict"]
    return weights
