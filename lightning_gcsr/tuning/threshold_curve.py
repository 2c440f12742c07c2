"""The validation metric against the magnitude below which weights are set to zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch
from lightning.pytorch import LightningDataModule
from tqdm.auto import tqdm

from lightning_gcsr._lightning import Callback, LightningModule, Trainer, misconfiguration, overrides
from lightning_gcsr.callbacks.reporting.drawing import new_figure
from lightning_gcsr.core.numerics import wide
from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.sparsity.computed_weights import counted_weights
from lightning_gcsr.sparsity.counting import count_tensors, module_bytes
from lightning_gcsr.sparsity.magnitude_pruning import prune_small
from lightning_gcsr.storage.tensor_memory import distinct_tensors
from lightning_gcsr.tuning.isolated_runs import Trials, unknown_metric, untouched
from lightning_gcsr.validation import (
    argument_error,
    check_choice,
    check_finite_number,
    check_integer,
    moved_arguments,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ThresholdCurve", "ThresholdPoint", "threshold_curve"]

_FEWEST, _MOST = 0.01, 0.999  # shares of the nonzero weights that the smallest and the largest default threshold zero
_SAMPLE = 10_000_000


@dataclass(frozen=True)
class ThresholdPoint:
    """One threshold, and the model with all weights up to it set to zero."""

    threshold: float
    metric: float
    weights: int
    """The number of trained weights among those that a threshold is applied to; of all where none is trained."""
    zeros: int
    """How many of them are zero."""
    stored_bytes: int
    """The bytes of all parameters, each in its smallest encoding."""

    @property
    def sparsity(self) -> float:
        """Zeros ÷ weights, in [0, 1]."""
        return self.zeros / max(1, self.weights)

    @property
    def compression(self) -> float:
        """Weights ÷ nonzeros; infinite where all are zero."""
        return self.weights / (self.weights - self.zeros) if self.zeros < self.weights else math.inf


@dataclass(frozen=True)
class ThresholdCurve:
    """What :func:`~lightning_gcsr.threshold_curve` found.

    Example:
        >>> points = [ThresholdPoint(0.0, 0.31, 1000, 0, 4000), ThresholdPoint(1e-3, 0.31, 1000, 900, 525)]
        >>> curve = ThresholdCurve("val_loss", "min", 0.0, [*points, ThresholdPoint(1e-2, 0.34, 1000, 980, 205)])
        >>> curve.suggestion, curve.largest_threshold(max_metric_drop=0.05)
        (0.001, 0.01)
    """

    metric: str
    mode: Literal["min", "max"]
    max_metric_drop: float
    points: Sequence[ThresholdPoint]
    """By growing threshold, that at 0 first."""

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row for each threshold; ``pandas.DataFrame(curve.table)`` takes it as it is."""
        return [
            {
                "threshold": point.threshold,
                self.metric: point.metric,
                "zeros": point.zeros,
                "sparsity": point.sparsity,
                "compression": point.compression,
                "stored_bytes": point.stored_bytes,
            }
            for point in self.points
        ]

    @property
    def suggestion(self) -> float:
        """The largest threshold whose metric is no more than ``max_metric_drop`` worse than at threshold 0."""
        return self.largest_threshold()

    def largest_threshold(self, max_metric_drop: Optional[float] = None) -> float:
        """The largest threshold within another drop, without validating anew.

        A smaller threshold may be worse: the metric goes up and down a little before it falls.

        Args:
            max_metric_drop: How much worse than at threshold 0 the metric may be; that of the curve by default.

        Raises:
            ValueError: If the metric is NaN at threshold 0, or ``max_metric_drop`` is negative or not finite.
        """
        drop = self.max_metric_drop if max_metric_drop is None else max_metric_drop
        check_finite_number("max_metric_drop", drop, minimum=0.0)
        sign = 1 if self.mode == "min" else -1
        bound = sign * self.points[0].metric + drop
        within = [point.threshold for point in self.points if sign * point.metric <= bound]
        if not within:
            raise ValueError(f"{self.metric!r} is NaN at threshold 0, with which every threshold is compared.")
        return within[-1]

    def plot(self) -> Figure:
        """A figure: metric and sparsity against threshold, with the suggestion; threshold 0 is a line in grey.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        figure = new_figure("ThresholdCurve.plot", 8, 6.5)
        above, below = figure.subplots(2, 1, sharex=True)
        rows = [point for point in self.points if point.threshold > 0]
        thresholds = [point.threshold for point in rows]
        sparsities = [100 * point.sparsity for point in rows]
        for panel, values, unpruned in (
            (above, [point.metric for point in rows], self.points[0].metric),
            (below, sparsities, 100 * self.points[0].sparsity),
        ):
            panel.axhline(unpruned, color="tab:gray", linewidth=1, label="threshold 0")
            panel.plot(thresholds, values, color="tab:red", marker="o", markersize=4, linewidth=1.5)
            if not math.isnan(self.points[0].metric) and self.suggestion > 0:
                label = f"suggested: {self.suggestion:.3g}"
                panel.axvline(self.suggestion, color="black", linestyle="--", label=label)
            panel.legend(fontsize="small")
        above.set(ylabel=self.metric)
        below.set(xlabel="threshold", ylabel="sparsity in %", ylim=(-3, 103))
        if rows:
            below.set_xscale("log")
        return figure


@moved_arguments({"num_thresholds": "thresholds={}"})
def threshold_curve(
    trainer: Trainer,
    model: LightningModule,
    dataloaders: Any = None,
    datamodule: Optional[LightningDataModule] = None,
    *,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    thresholds: Union[int, Sequence[float]] = 20,
    max_metric_drop: float = 0.0,
    include: Optional[Sequence[str]] = None,
    exclude: Optional[Sequence[str]] = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> ThresholdCurve:
    r"""Validate copies of the model, in each of which all weights with \|w\| ≤ a threshold are set to zero.

    This turns near zeros, which the gradient update of L1 leaves everywhere, into zeros with the loss in view:
    ``prune_small(model, curve.suggestion)``. **The model, the Trainer, its callbacks and loggers and the random state
    are as before** when this returns or raises, after Ctrl-C too: copies are validated, one by one, and nothing is
    logged. The Trainer may have trained or not. None of its callbacks takes part; name those that log the metric in
    ``callbacks``.

    **Strategies tested.** A single device and DDP, on CPU. On several processes all call this together, on models that
    are the same; metrics are averaged over them, and each gets the same result.

    Args:
        trainer: The Trainer that validates.
        model: The model, with a ``validation_step`` that logs the metric.
        dataloaders: The validation data, as ``trainer.validate`` takes them; those of the model by default.
        datamodule: Or a data module.
        metric: What is logged of the quality of a model.
        mode: Whether the metric is better when it is smaller, ``"min"``, or larger, ``"max"``.
        thresholds: The magnitudes to try, in any order; or how many to try, at least 2, with threshold 0, which is
            always tried: those that zero shares s of the nonzero weights, evenly spaced in log(s/(1−s)) from 1 % to
            99.9 %, fine where the first and where the last weights go.
        max_metric_drop: How much worse than at threshold 0 the metric may be at the suggestion, in its own unit. The
            default takes no loss at all.
        include: Regular expressions of the parameters to prune, instead of the weights that the penalties reach.
        exclude: Regular expressions of parameters to leave out.
        callbacks: Callbacks that the validation depends on; copied for each.
        progress: Whether to show a bar over the thresholds, on the first process.

    Returns:
        A row for each threshold, the suggestion, and a figure.

    Raises:
        ValueError: If an argument breaks its rule, or if the validation does not log the metric.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: If there is no validation, or if Trainer or strategy are not supported.

    Example:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(8, 1)
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", (self.layer(batch) - batch[:, :1]).square().mean())
        >>> data = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8)
        >>> model, trainer = Regression(), Trainer(accelerator="cpu", logger=False)
        >>> curve = threshold_curve(trainer, model, data, thresholds=[0.1, 1e9], progress=False)
        >>> [(row["threshold"], row["zeros"] == 8) for row in curve.table]
        [(0.0, False), (0.1, False), (1000000000.0, True)]
    """
    if not isinstance(metric, str):
        raise argument_error("metric", metric, "must be a string", "Give the name under which it is logged.", TypeError)
    check_choice("mode", mode, ["min", "max"])
    check_finite_number("max_metric_drop", max_metric_drop, minimum=0.0)
    thresholds = _checked(thresholds)
    trials = Trials(trainer, model, None, dataloaders, datamodule, callbacks, wanted_by="threshold_curve")
    trials.check_copies()
    _check_validation(trainer, model, dataloaders, datamodule)
    if isinstance(thresholds, int):
        thresholds = _spread(model, thresholds, include, exclude)
    points: list[ThresholdPoint] = []
    show = progress and trainer.is_global_zero
    with (
        untouched(dataloaders, datamodule),
        tqdm([0.0, *thresholds], "Validating", unit="threshold", disable=not show) as bar,
    ):
        for threshold in bar:
            sizes: dict[str, int] = {}

            def change(copy: LightningModule, threshold: float = threshold, sizes: dict[str, int] = sizes) -> None:
                prune_small(copy, threshold, include, exclude)
                counts = count_tensors(counted_weights(copy, select_parameters(copy, include, exclude)).trained)
                sizes["weights"] = sum(count.entries for count in counts)
                sizes["zeros"] = sum(count.zeros for count in counts)
                sizes["stored_bytes"] = module_bytes(copy)[1]

            metrics = trials.validate_changed(change)
            trials.quiet = True
            if metric not in metrics:
                raise unknown_metric(metric, list(metrics), "the validation")
            points.append(ThresholdPoint(threshold, metrics[metric], **sizes))
            bar.set_postfix_str(f"{metric} {metrics[metric]:.4g} at a sparsity of {100 * points[-1].sparsity:.3g} %")
    return ThresholdCurve(metric, mode, float(max_metric_drop), points)


def _checked(thresholds: Union[int, Sequence[float]]) -> Union[int, list[float]]:
    if isinstance(thresholds, (str, bytes)) or not hasattr(thresholds, "__iter__"):
        check_integer("thresholds", thresholds, minimum=2, advice="One of them is 0. Or give a list: [1e-4, 1e-3].")
        return int(thresholds)
    values = list(thresholds)
    if not values:
        raise argument_error("thresholds", thresholds, "must have at least one number", "Leave it out for a choice.")
    for value in values:
        check_finite_number("thresholds", value, minimum=0.0, advice="Thresholds are magnitudes.")
    return sorted({float(value) for value in values} - {0.0})


def _check_validation(
    trainer: Trainer, model: LightningModule, dataloaders: Any, datamodule: Optional[LightningDataModule]
) -> None:
    if not overrides(model, "validation_step"):
        raise misconfiguration(
            trainer,
            f"`threshold_curve` validates, and {type(model).__name__} has no `validation_step`. Write one that logs a"
            " metric.",
        )
    if dataloaders is None and not any(
        holder is not None and overrides(holder, "val_dataloader") for holder in (datamodule, model)
    ):
        raise misconfiguration(
            trainer,
            "`threshold_curve` needs validation data, and there are none. Pass `dataloaders`, or a `datamodule` with a"
            " `val_dataloader`.",
        )


@torch.no_grad()
def _spread(
    model: LightningModule, count: int, include: Optional[Sequence[str]], exclude: Optional[Sequence[str]]
) -> list[float]:
    """Thresholds that zero evenly spread shares of the nonzero weights; of very many weights a sample decides."""
    weights = distinct_tensors(select_parameters(model, include, exclude).items()).values()
    step = -(-sum(weight.numel() for weight in weights) // _SAMPLE) or 1
    magnitudes = torch.cat([wide(weight.detach().flatten()[::step]).abs().cpu() for weight in weights])
    magnitudes = magnitudes[magnitudes.isfinite() & (magnitudes > 0)].sort().values
    if not len(magnitudes):
        return []
    low, high = (math.log(share / (1 - share)) for share in (_FEWEST, _MOST))
    shares = [1 / (1 + math.exp(-(low + (high - low) * i / max(1, count - 2)))) for i in range(count - 1)]
    return sorted({float(magnitudes[max(0, math.ceil(share * len(magnitudes)) - 1)]) for share in shares})
