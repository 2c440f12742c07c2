"""The callback that reports sparsity and compression while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_gcsr.callbacks.support import check_trainer, completes_step, log_metrics, logs_now
from lightning_gcsr.messages import check_finite_number
from lightning_gcsr.selection import check_patterns, select_parameters
from lightning_gcsr.sparsity import count_tensors, module_bytes

__all__ = ["CompressionMonitor"]


class CompressionMonitor(Callback):
    r"""Logs how sparse the model is and what it takes to store.

    *Weights* are, as for :class:`~lightning_gcsr.GradientCoherentRegularization`, the parameters with two or more
    dimensions outside norm layers, unless ``include`` and ``exclude`` say otherwise; tied weights count once.

    **Hooks used.** ``on_train_batch_end`` on the Trainer's ``log_every_n_steps``, ``on_train_epoch_end``, and
    ``on_validation_start``, so that ``ModelCheckpoint(monitor="sparsity/model")`` and ``EarlyStopping`` find present
    numbers. It changes nothing in the training. **State saved.** None.

    **Strategies tested.** A single device, DDP, ``ModelParallelStrategy`` (FSDP2, tensor parallelism, both), on CPU.

    **Keys logged.**

    ============================ =================================================================================
    ``sparsity/model``           the share of weights with \|w\| ≤ ``zero_threshold``, in [0, 1]
    ``sparsity/{parameter}``     the same for each parameter, unless ``per_parameter=False``
    ``compression/ratio``        weights ÷ weights that are not zero; infinite when all are zero
    ``compression/stored_ratio`` bytes of all parameters, biases and norms too, ÷ their bytes when each is stored in
                                 the smallest of three forms, see :mod:`lightning_gcsr.sparsity`
    ============================ =================================================================================

    Args:
        zero_threshold: The magnitude up to which a weight counts as zero. The gradient update of L1 gives no exact
            zeros; a threshold shows what there would be to gain.
        per_parameter: Whether to log the sparsity of each parameter.
        histograms: Whether TensorBoard gets a histogram of each parameter's finite weights at the end of each epoch.
        include: Regular expressions of the parameters to count, instead of the weights.
        exclude: Regular expressions of parameters to leave out.

    Raises:
        ValueError: If an argument breaks its rule; at the start of ``fit``, if a pattern matches nothing.
        MisconfigurationException: Before the first step, if strategy or precision are not supported.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_gcsr import CompressionMonitor
        >>> sparsest = ModelCheckpoint(monitor="sparsity/model", mode="max")
        >>> trainer = Trainer(callbacks=[CompressionMonitor(zero_threshold=1e-3), sparsest], accelerator="cpu")
    """

    def __init__(
        self,
        zero_threshold: float = 0.0,
        per_parameter: bool = True,
        histograms: bool = False,
        include: Optional[Sequence[str]] = None,
        exclude: Optional[Sequence[str]] = None,
    ) -> None:
        super().__init__()
        check_finite_number("zero_threshold", zero_threshold, minimum=0.0)
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        self.zero_threshold = zero_threshold
        self.per_parameter = per_parameter
        self.histograms = histograms
        self.include = include
        self.exclude = exclude
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._logged_step = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_trainer(trainer, type(self).__name__)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._weights = select_parameters(pl_module, self.include, self.exclude)
        self._logged_step = -1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # While micro-batches are accumulated the weights do not change, and Lightning does not log.
        if logs_now(trainer) and completes_step(trainer):
            self._log(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in self._metrics(pl_module).items()})

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Like Lightning's own end-of-epoch numbers, these belong to the last step that was made.
        step = max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        if step != self._logged_step:
            self._log(trainer, pl_module, step)
        if self.histograms:
            self._log_histograms(trainer, step)

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        log_metrics(trainer, self._metrics(pl_module), step)
        self._logged_step = step

    def _metrics(self, pl_module: LightningModule) -> dict[str, float]:
        counts = count_tensors(self._weights, self.zero_threshold)
        total, zeros = sum(count.entries for count in counts), sum(count.near_zeros for count in counts)
        dense, stored = module_bytes(pl_module, self.zero_threshold)
        metrics = {
            "sparsity/model": zeros / max(1, total),
            "compression/ratio": total / (total - zeros) if zeros < total else float("inf"),
            "compression/stored_ratio": dense / max(1, stored),
        }
        if self.per_parameter:
            metrics |= {f"sparsity/{count.name}": count.near_zeros / max(1, count.entries) for count in counts}
        return metrics

    def _log_histograms(self, trainer: Trainer, step: int) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            for name, parameter in self._weights.items():
                weights = parameter.detach().float()
                weights = weights[weights.isfinite()]
                if weights.numel() > 0:  # TensorBoard raises on a histogram of nothing
                    logger.experiment.add_histogram(f"weights/{name}", weights, step)
