"""The callback that reports sparsity and compression while a model trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from typing_extensions import override

from lightning_gcsr._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check_trainer,
    completes_step,
    is_fast_dev_run,
    logged_step,
    logs_now,
    state_to_copy,
    trainer_callbacks,
    trainer_loggers,
)
from lightning_gcsr.callbacks.reporting.curves import Curves
from lightning_gcsr.callbacks.reporting.hparams import settings_of, write_at_end, write_at_first_step, write_at_start
from lightning_gcsr.callbacks.reporting.images import Injecting, LayerImages
from lightning_gcsr.callbacks.reporting.loggers import (
    log_metrics,
    log_settings,
    log_summary,
    show_metrics,
    takes_images,
)
from lightning_gcsr.callbacks.reporting.tensorboard_layout import Charts, write_layout
from lightning_gcsr.core.parameter_selection import check_patterns, select_parameters
from lightning_gcsr.sparsity.computed_weights import computed_weights
from lightning_gcsr.sparsity.summary import CompressionSummary, print_table, summarize
from lightning_gcsr.validation import argument_error, call_repr, check_finite_number, check_integer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CompressionMonitor"]

_MOST_LINES = 24
"""The most layers that a chart shows as a line for each; the heat map shows more."""


class CompressionMonitor(Callback):
    r"""Logs how sparse the model is and what it takes to store.

    *Weights* are, as for :class:`~lightning_gcsr.GradientCoherentRegularization`, the weights of layers outside norms,
    unless ``include`` and ``exclude`` say otherwise; tied weights count once. Frozen ones are not counted in the
    numbers of the model, unless nothing is trained. Masks of :mod:`torch.nn.utils.prune` and parametrizations are
    applied: the weights are those that the model computes with.

    **Hooks used.** ``on_train_batch_end`` on the Trainer's ``log_every_n_steps``, ``on_train_epoch_end``, and
    ``on_validation_start``, so that ``ModelCheckpoint(monitor="sparsity/model", mode="max")`` and ``EarlyStopping``
    find current numbers; ``on_validation_end`` for :meth:`plot`; ``on_fit_start`` and ``on_fit_end`` for
    hyperparameters and the summary. It does not change the training. **State saved.** The history that :meth:`plot` and
    the heat maps show, at most 256 steps.

    **Strategies tested.** A single device, DDP, ``ModelParallelStrategy`` (FSDP2, tensor parallelism, both), on CPU.

    **Keys logged.**

    ================================== ===========================================================================
    ``sparsity/model``                 weights with \|w\| ≤ ``zero_threshold`` ÷ weights, in [0, 1]
    ``sparsity/parameter/{parameter}`` the same for each parameter, unless ``per_parameter=False``
    ``compression/ratio``              weights ÷ weights that are not zero; infinite if all are zero
    ``compression/stored_ratio``       bytes of all parameters, biases and norms too, ÷ their bytes with each in its
                                       smallest encoding, see :mod:`lightning_gcsr.storage.encodings`
    ================================== ===========================================================================

    TensorBoard's Custom Scalars show them in groups, beside those of
    :class:`~lightning_gcsr.GradientCoherentRegularization`. A layout of your own, written with
    ``logger.experiment.add_custom_scalars`` before ``fit`` or in a hook of the module, is shown instead.

    At the end of ``fit`` loggers that take images get ``layers/sparsity`` and, for each regularization,
    ``layers/{name}/injected``, heat maps of the layers over the steps that were logged, and ``layers/weights``,
    histograms of magnitudes on a log scale with the zeros beside them. With ``log_summary``, ``summary`` as well.

    Args:
        zero_threshold: The magnitude up to which a weight counts as zero. The gradient update of L1 gives no exact
            zeros; a threshold shows how many weights are nearly zero.
        per_parameter: Whether to log the sparsity of each parameter.
        histograms: Whether TensorBoard gets a histogram of each parameter's finite weights at the end of each epoch.
        include: Regular expressions of the parameters to count, instead of the weights.
        exclude: Regular expressions of parameters to leave out.
        prog_bar: Whether Lightning's progress bar shows ``sparsity`` and ``compression``, the values of
            ``sparsity/model`` and ``compression/ratio``.
        verbose: Whether the first process prints a table of the layers at the end of ``fit``, with rich if it is
            installed: the 20 largest, and the others in one row. Not after an exception, in ``fast_dev_run`` or under
            ``barebones``.
        images_every_n_steps: Draw the images every so many optimizer steps, and at the end. ``None``: only at the end,
            if matplotlib is installed. 0: never. TensorBoard, MLflow and Weights & Biases take them.
        log_summary: Whether loggers get the table of the layers as text at the end of ``fit``, and the settings of the
            callbacks as hyperparameters. TensorBoard's HParams show these beside those of ``save_hyperparameters`` and
            the logged metrics; CSV loggers get a file ``summary.md``.

    Raises:
        ModuleNotFoundError: If ``images_every_n_steps`` is given and matplotlib is not installed.
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
        prog_bar: bool = False,
        verbose: bool = True,
        images_every_n_steps: Optional[int] = None,
        log_summary: bool = True,
    ) -> None:
        super().__init__()
        check_finite_number("zero_threshold", zero_threshold, minimum=0.0)
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        if images_every_n_steps is not None:
            check_integer("images_every_n_steps", images_every_n_steps, 0, "Use 0 for no images.")
            if images_every_n_steps and importlib.util.find_spec("matplotlib") is None:
                advice = "Install matplotlib."
                rule = "must be None or 0 where matplotlib is not installed"
                raise argument_error("images_every_n_steps", images_every_n_steps, rule, advice, ModuleNotFoundError)
        self.zero_threshold = zero_threshold
        self.per_parameter = per_parameter
        self.histograms = histograms
        self.include = include
        self.exclude = exclude
        self.prog_bar = prog_bar
        self.verbose = verbose
        self.images_every_n_steps = images_every_n_steps
        self.log_summary = log_summary
        self.summary: Optional[CompressionSummary] = None
        """What was counted at the end of the last ``fit``."""
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._frozen_weights = 0
        self._images = LayerImages()
        self._curves = Curves()
        self._draws = bool(images_every_n_steps)
        self._stage = "fit"
        self._logged_step = -1

    def __repr__(self) -> str:
        return call_repr(type(self).__name__, CompressionMonitor, vars(self))

    def plot(self, metric: Optional[str] = None) -> Figure:
        """A figure of the last ``fit``: a validation metric and the sparsity over the optimizer steps.

        Args:
            metric: The logged name of the metric. By default one with "acc" in its name, else one that begins with
                "val"; if there is neither, the figure shows only the sparsity.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If nothing was logged yet, or the metric was not.
        """
        return self._curves.plot(metric, "CompressionMonitor.plot")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "fit":
            check_trainer(trainer, type(self).__name__)
            if trainer.global_step == 0:  # what is there is of an earlier fit; a checkpoint comes after this hook
                self._images, self._curves = LayerImages(), Curves()
            self._draws = self._draws_for(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_layout(trainer)
        self._select(pl_module)
        self._logged_step = -1
        self.summary = None
        if self.log_summary and not is_fast_dev_run(trainer):
            log_settings(trainer, settings_of(trainer))
            write_at_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # While micro-batches are accumulated the weights do not change, and Lightning does not log.
        if not completes_step(trainer):
            return
        step = logged_step(trainer)
        if logs_now(trainer):
            self._log(trainer, pl_module, step)
        if self.images_every_n_steps and (step + 1) % self.images_every_n_steps == 0:
            self._images.draw(trainer, step, computed_weights(pl_module, self._weights))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            show_metrics(trainer, self._metrics(self._summarize(pl_module)), self._in_bar)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        ours = [f"{other.name}/" for other in trainer_callbacks(trainer) if isinstance(other, Injecting)]
        prefixes = ("sparsity/", "compression/", *ours)
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if value.numel() == 1 and not name.startswith(prefixes)
        }
        if metrics:
            self._curves.metrics.record(logged_step(trainer), metrics)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Like Lightning's own end-of-epoch numbers, these belong to the last step that was made.
        step = max(0, logged_step(trainer) - 1)
        if step != self._logged_step:
            self._log(trainer, pl_module, step)
        if self.histograms:
            self._log_histograms(trainer, pl_module, step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In `on_train_end` the callbacks that average weights put them into the model, some of them after our turn.
        if self._logged_step < 0 or trainer.barebones or is_fast_dev_run(trainer):
            return
        self.summary = self._summarize(pl_module)
        if self.verbose and trainer.is_global_zero:
            frozen = f" {self._frozen_weights:,} frozen weights are not counted." if self._frozen_weights else ""
            print_table(self.summary.rows(), self.summary.sentence() + frozen)
        if self._draws:
            self._images.draw(trainer, self._logged_step, computed_weights(pl_module, self._weights))
        if self.log_summary:
            log_summary(trainer, self.summary, settings_of(trainer), self._logged_step)
            write_at_end(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        summary = self._summarize(pl_module)
        log_metrics(trainer, self._metrics(summary), step, self._in_bar)
        self._curves.sparsity.record(step, {"sparsity/model": summary.sparsity})
        if self._draws:
            self._images.record(trainer, step, summary.sparsity_by_parameter)
        if self._logged_step < 0 and self.log_summary and not is_fast_dev_run(trainer):
            write_at_first_step(trainer, pl_module)
        self._logged_step = step

    def _draws_for(self, trainer: Trainer) -> bool:
        """Whether images are drawn: on request, or at the end, where a logger takes them and matplotlib is there."""
        if self.images_every_n_steps is not None:
            return self.images_every_n_steps > 0
        return any(map(takes_images, trainer.loggers)) and importlib.util.find_spec("matplotlib") is not None

    def _select(self, pl_module: LightningModule) -> None:
        """Find the weights: each time, because layers may join the training, and Parameters may be replaced."""
        selected = select_parameters(pl_module, self.include, self.exclude)
        trained = {name: parameter for name, parameter in selected.items() if parameter.requires_grad}
        self._weights = trained or selected
        self._frozen_weights = sum(p.numel() for name, p in selected.items() if name not in self._weights)

    def _summarize(self, pl_module: LightningModule) -> CompressionSummary:
        self._select(pl_module)
        return summarize(pl_module, self._weights, self.zero_threshold)

    @property
    def _in_bar(self) -> Mapping[str, str]:
        """Short names for the progress bar, and the keys that they stand for."""
        return {"sparsity": "sparsity/model", "compression": "compression/ratio"} if self.prog_bar else {}

    def _metrics(self, summary: CompressionSummary) -> dict[str, float]:
        return summary.metrics(self.per_parameter)

    def tensorboard_charts(self, module: LightningModule) -> Charts:
        """The keys that belong together, for TensorBoard's Custom Scalars. Each layer has a line if they are few."""
        charts = {
            "sparsity": {
                "sparsity": ["sparsity/model"],
                "compression, and dense ÷ stored size": ["compression/ratio", "compression/stored_ratio"],
            }
        }
        if self.per_parameter and len(select_parameters(module, self.include, self.exclude)) <= _MOST_LINES:
            charts["layers"] = {"sparsity, by layer": ["sparsity/parameter/.+"]}
        return charts

    def hyperparameters(self, trainer: Trainer) -> dict[str, Any]:
        """What the numbers depend on, for loggers."""
        return {"sparsity/zero_threshold": self.zero_threshold}

    def compared_metrics(self) -> list[str]:
        """The keys by which runs are compared."""
        return ["sparsity/model", "compression/ratio", "compression/stored_ratio"]

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds the weights of its own module, and plain values can be loaded where no class of ours may be.
        plain = {"_images": self._images.state_dict(), "_curves": self._curves.state_dict()}
        return state_to_copy(self) | {"_weights": {}} | plain

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images, self._curves = LayerImages(), Curves()
        self._images.load_state_dict(state["_images"])
        self._curves.load_state_dict(state["_curves"])

    @override
    def state_dict(self) -> dict[str, Any]:
        images = self._images.state_dict() if self._draws else {}
        return images | self._curves.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":  # Lightning hands over the state of a checkpoint that is validated or tested, too
            self._curves.load_state_dict(state_dict)
            of_curves = self._curves.state_dict()  # by its keys: a regularization may be called "plot"
            self._images.load_state_dict({key: state_dict[key] for key in state_dict if key not in of_curves})

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = "fit"

    def _log_histograms(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        for logger in trainer_loggers(trainer, "TensorBoardLogger"):
            for name, weights in computed_weights(pl_module, self._weights).items():
                weights = weights.float()
                weights = weights[weights.isfinite()]
                if weights.numel() > 0:  # TensorBoard raises on a histogram of nothing
                    logger.experiment.add_histogram(f"weights/{name}", weights, step)
