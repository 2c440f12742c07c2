"""The callback that leaves the small model in a small file, at the end of the training."""

from __future__ import annotations

import os
import pickle
from typing import Optional, Union

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_gcsr.callbacks.support import check_trainer
from lightning_gcsr.sparsity.counting import distinct_tensors
from lightning_gcsr.storage.compressed_file import save_compressed, storable_tensors

__all__ = ["CompressedCheckpoint"]


class CompressedCheckpoint(Callback):
    """Writes the compressed weights beside the best checkpoint, at the end of ``fit``.

    They are those of the ``state_dict`` in the best checkpoint of the Trainer's ``ModelCheckpoint``, the first one if
    there are several, and the file has its name with the suffix ``.safetensors``. Where there is no best checkpoint,
    they are the weights at the end of the training, in ``model.safetensors`` where the checkpoints would be: in the
    folder of the ``ModelCheckpoint``, else of the logger, else in the Trainer's ``default_root_dir``.
    :func:`~lightning_gcsr.load_compressed` loads them for ``load_state_dict``.

    **Hooks used.** ``on_fit_end``, when every checkpoint is written. It changes nothing in the training. After an
    exception or an interrupt, in ``fast_dev_run`` and under ``barebones`` nothing is written. **State saved.** None.

    **Strategies tested.** A single device and DDP, on CPU; the first process writes. ``ModelParallelStrategy`` is
    refused, for its weights lie on several processes. **Keys logged.** None; path, bytes and ratio go to the log of
    the console.

    Args:
        dirpath: The folder to write to, instead. It is created.
        filename: The name of the file, instead, with or without its suffix.

    Raises:
        MisconfigurationException: Before the first step, if strategy or precision are not supported, if the module's
            state dict holds something other than plain tensors (such as an ``_extra_state``), or if the checkpoints
            are not on a file system and there is no ``dirpath``; at the end, if the best checkpoint has
            hyperparameters or states that torch does not load with ``weights_only=True``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_gcsr import CompressedCheckpoint
        >>> trainer = Trainer(
        ...     callbacks=[ModelCheckpoint(monitor="val_loss"), CompressedCheckpoint()], logger=False, accelerator="cpu"
        ... )
    """

    def __init__(self, dirpath: Union[str, os.PathLike[str], None] = None, filename: Optional[str] = None) -> None:
        super().__init__()
        self.dirpath, self.filename = dirpath, filename
        self.path: Optional[str] = None
        """The file that was written last; the same on all processes."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "`CompressedCheckpoint` does not support ModelParallelStrategy: no process has all of the weights."
                " After the training gather them, with torch.distributed.checkpoint.state_dict.get_model_state_dict or"
                " ModelParallelStrategy(save_distributed_checkpoint=False), and call save_compressed."
            )
        check_trainer(trainer, type(self).__name__)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            storable_tensors(pl_module)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"`CompressedCheckpoint`: {error}") from error
        checkpoints = _model_checkpoint(trainer)
        if self.dirpath is None and checkpoints is not None and "://" in str(checkpoints.dirpath):
            raise MisconfigurationException(
                "`CompressedCheckpoint` writes to file systems only, and the checkpoints go to"
                f" {checkpoints.dirpath}. Give it a `dirpath`."
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.barebones or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a function of Lightning's
            return
        checkpoints = _model_checkpoint(trainer)
        best = checkpoints.best_model_path if checkpoints is not None else ""
        folder: Union[str, os.PathLike[str]]
        if self.dirpath is not None:
            folder = self.dirpath
        elif best:
            folder = os.path.dirname(best)
        elif checkpoints is not None and checkpoints.dirpath is not None:
            folder = checkpoints.dirpath
        else:
            folder = trainer.log_dir or trainer.default_root_dir  # which all processes must ask for
        name = self.filename or (os.path.splitext(os.path.basename(best))[0] if best else "model")
        self.path = os.path.join(folder, name.removesuffix(".safetensors") + ".safetensors")
        if trainer.is_global_zero:
            os.makedirs(folder, exist_ok=True)
            tensors = storable_tensors(_weights(best) if best else pl_module)
            save_compressed(tensors, self.path)
            size, dense = os.path.getsize(self.path), sum(t.nbytes for t in distinct_tensors(tensors.items()).values())
            rank_zero_info(
                f"CompressedCheckpoint: {self.path}, {size:,} bytes, {size / max(1, dense):.1%} of the {dense:,} bytes"
                f" of {'the best checkpoint' if best else 'the last weights'}."
            )
        trainer.strategy.barrier()  # so that every process finds the file


def _model_checkpoint(trainer: Trainer) -> Optional[ModelCheckpoint]:
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)


def _weights(checkpoint: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint; its optimizer states stay on the disk."""
    try:
        weights: dict[str, Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)[
            "state_dict"
        ]
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"`CompressedCheckpoint` loads weights only, and the best checkpoint, {checkpoint}, holds more, such as"
            " objects among the hyperparameters. Leave them out with save_hyperparameters(ignore=[...]), or allow them"
            f" with torch.serialization.add_safe_globals. torch says: {error}"
        ) from error
    return weights
