"""Find the strength: trainings of copies of the model under more and more of a penalty, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch import LightningDataModule
from tqdm.auto import tqdm

from lightning_gcsr._lightning import Callback, LightningModule, Trainer, is_a
from lightning_gcsr.callbacks import GradientCoherentRegularization
from lightning_gcsr.core.strengths import collapsing_strength
from lightning_gcsr.sparsity.counting import zero_counts
from lightning_gcsr.tuning.isolated_runs import Trials, metrics_of, unknown_metric, untouched
from lightning_gcsr.tuning.strength_result import StrengthFinderResult
from lightning_gcsr.tuning.trade_off import Trial
from lightning_gcsr.tuning.trial_monitor import Watch, Yardstick
from lightning_gcsr.tuning.trial_settings import (
    checked_strengths,
    checked_targets,
    regularization_of,
    scaled_strength,
    with_target,
)
from lightning_gcsr.validation import argument_error, check_choice, moved_arguments

__all__ = ["find_strength"]

BELOW, ABOVE = 1 / 30, 100.0
_NO_VALIDATION = "There is no validation data: pass `val_dataloaders`, or name a metric of the training."
_MOVED = {
    "min_strength": "strengths=[{}, ...]",
    "max_strength": "strengths=[..., {}]",
    "num_strengths": "strengths={}",
    "num_bisections": "strengths=[...] with the strengths to narrow down",
    "max_steps": "a Trainer with max_steps={}",
    "max_epochs": "a Trainer with max_epochs={}",
    "compare_plain": "a second call with a regularization that has gate=None",
}


@moved_arguments(_MOVED)
def find_strength(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Optional[LightningDataModule] = None,
    *,
    regularization: Optional[GradientCoherentRegularization] = None,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    target_sparsities: Optional[Sequence[float]] = None,
    strengths: Union[int, Sequence[float], None] = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> StrengthFinderResult:
    r"""Train copies of the model with stronger and stronger penalties, and report the metric and sparsity of each.

    A training without a penalty comes first, then one for each of ``target_sparsities``, or of ``strengths``, from the
    smallest on until one fails. Each trial is a full training by the Trainer: it starts from the same weights, data
    order and random state, with the optimizer and the learning-rate schedules of ``configure_optimizers``. Pass a
    Trainer with fewer epochs for shorter trials; schedules that take their length from the Trainer then fit the trial.
    **The model, the Trainer, their optimizers, callbacks and loggers, the checkpoint folder and the random state are
    unchanged** when this returns or raises, also after Ctrl-C: only copies train, and nothing is logged or saved. Of
    the Trainer's callbacks, only those that shape the training take part (weight averaging, finetuning, accumulation
    schedules, :class:`~lightning_gcsr.KeepZeros`, other penalties); pass further ones as ``callbacks``.

    **A trial has learned** if its metric at the end has improved at least half as much as without a penalty. The
    improvement is measured from the model with all regularized weights set to zero, so the model may be trained
    already; from the model as given if the metric is one of the training alone, or is not finite there. A trial is
    stopped before its end only if it cannot recover: if a weight is not finite or, with a strength, if all layers have
    collapsed (their norms are below 1e-6 of those at the start).

    **If only the number of strengths is given**, they are evenly spaced in their logarithm, over a range based on the
    strength at which the proximal steps of the trial would bring the median tensor to zero if there were no loss: the
    median over tensors of ⟨w,w⟩/⟨w,r⟩ ÷ Σ lr·κ, with the learning rates and gradients of the trial without a penalty,
    and with delay and warm-up applied. The range goes from a thirtieth of this strength, where hardly any weight can
    reach zero, to a hundred times this strength. With ``update="gradient"`` under an optimizer that rescales gradients
    the scale is not known, so the strengths must be given.

    **Strategies tested.** A single device and DDP, on CPU. On several processes all call this together; metrics are
    averaged over them, and each gets the same result.

    Args:
        trainer: The Trainer that would train the model; it must not have trained yet.
        model: The model.
        train_dataloaders: The data, as ``trainer.fit`` takes them.
        val_dataloaders: The validation data, likewise.
        datamodule: A data module, instead of the loaders.
        regularization: The penalty, the gate and the rest; its strength or target is ignored (of a dict the proportions
            are kept). By default the Trainer's own callback, and where it has none ``"l1"`` with the defaults.
        metric: The name of a logged metric of quality, from the validation or the training, such as the accuracy.
        mode: Whether the metric is better when it is smaller, ``"min"``, or larger, ``"max"``.
        target_sparsities: The sparsities to try, each in (0, 1). By default 50, 75, 90, 95 and 98 %, unless
            ``strengths`` are given. They need an update and a penalty that support a target, see
            :class:`~lightning_gcsr.GradientCoherentRegularization`.
        strengths: Instead, the strengths to try, each > 0; or how many to try, at least 2, evenly spaced in their
            logarithm over a range that fits the training.
        callbacks: Further callbacks that the training depends on; copied for each trial.
        progress: Whether to show a bar over the trials, on the first process, and a line on each.

    Returns:
        All trials, with a trade-off to choose from, :meth:`~lightning_gcsr.StrengthFinderResult.suggestion`, table and
        figure.

    Raises:
        ValueError: If an argument breaks its rule, if the metric is not logged, if the model does not learn without a
            penalty, or if the first trial with a penalty fails.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: If Trainer, strategy or optimizer are not supported.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(8, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return (self.layer(batch) - batch[:, :1]).square().mean()
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", self.training_step(batch, batch_idx))
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8)
        >>> trainer = Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> result = find_strength(trainer, Regression(), data, data, target_sparsities=[0.5, 0.75], progress=False)
        >>> [trial.setting for trial in result.trials]
        ['no penalty', 'target_sparsity=0.5', 'target_sparsity=0.75']
    """
    if not isinstance(metric, str):
        raise argument_error("metric", metric, "must be a string", "Give the name under which it is logged.", TypeError)
    check_choice("mode", mode, ["min", "max"])
    if is_a(callbacks, "Callback"):
        raise argument_error("callbacks", callbacks, "must be a sequence of callbacks", "Put it in a list.", TypeError)
    strengths, targets = checked_strengths(strengths), checked_targets(target_sparsities, strengths)
    wanted = regularization_of(trainer, regularization)
    if targets:
        with_target(wanted, targets[0])  # raises where penalty or update can have no target
    trials = Trials(trainer, model, train_dataloaders, val_dataloaders, datamodule, callbacks)
    trials.check()
    with untouched(train_dataloaders, val_dataloaders, datamodule):
        search = _Search(trials, wanted, metric, mode, progress and trainer.is_global_zero)
        try:
            search.reference(targets, strengths if isinstance(strengths, int) else None)
            search.ascend(targets or search.spread(strengths), by_target=bool(targets))
        finally:
            search.bar.close()
    return StrengthFinderResult(metric, mode, search.yardstick.baseline, search.done)


class _Search:
    """The trials made so far, and what is known from the one without a penalty."""

    def __init__(
        self,
        trials: Trials,
        wanted: GradientCoherentRegularization,
        metric: str,
        mode: Literal["min", "max"],
        show: bool,
    ) -> None:
        self.trials, self.wanted = trials, wanted
        self.yardstick = Yardstick(metric, mode)
        self.done: list[Trial] = []
        self.spans: dict[str, float] = {}
        self.paths: dict[str, float] = {}
        self.bar = tqdm(desc="Finding the strength", unit=" trials", disable=not show)

    # -- without a penalty -----------------------------------------------------------------------------------------

    def reference(self, targets: Sequence[float], count: Optional[int]) -> None:
        """What is logged, the metric of a model that knows nothing, and what is learned without a penalty.

        Args:
            targets: The target sparsities to try after it; empty for strengths.
            count: The number of strengths to try, where they are to be found.
        """
        self.bar.set_postfix_str("no penalty")
        metric = self.yardstick.metric
        # One step, in which all that this package refuses is refused, and which shows what is logged.
        watch = Watch(self._with(targets[0], by_target=True) if targets else self._with(1.0), self.yardstick)
        first = self.trials.fit([watch, watch.regularization], only_one_step=True)
        if count is not None and not watch.knows_step_size:
            rule = "must be numbers with update='gradient' under an optimizer that rescales gradients"
            raise argument_error("strengths", count, rule, "Use update='proximal', or give a list of strengths.")
        known = metrics_of(first)
        if first.enable_validation:
            with torch.no_grad():
                for parameter in watch.regularizer.parameters.values():
                    parameter.zero_()
            validated = self.trials.validate(first)
            self.yardstick.in_validation = metric in validated
            known |= validated
        if metric not in known:
            advice = "" if first.enable_validation else _NO_VALIDATION
            raise unknown_metric(metric, sorted(known), "the model", advice)
        self.yardstick.baseline = known[metric]
        if self.yardstick.in_validation and not math.isfinite(known[metric]):  # it cannot do without weights
            self.yardstick.baseline = self.trials.validate()[metric]
        watch = Watch(self._with(1.0), self.yardstick)  # which sets the strength to 0
        trial = self._train(watch, strength=0.0)
        self.spans, self.paths = watch.spans, watch.paths
        self.yardstick.set_reference(trial.metric, trial.steps)
        self.trials.quiet = True
        self._take_down(trial)

    def spread(self, strengths: Union[int, Sequence[float], None]) -> Sequence[float]:
        """The strengths to try: those given, or so many, evenly spaced in their logarithm."""
        if not isinstance(strengths, int):
            return strengths or ()
        centre = collapsing_strength(self.spans, self.paths)
        ratio = (ABOVE / BELOW) ** (1 / (strengths - 1))
        return [BELOW * centre * ratio**i for i in range(strengths)]

    # -- with one --------------------------------------------------------------------------------------------------

    def ascend(self, settings: Sequence[float], by_target: bool) -> None:
        """Try growing targets or strengths until one fails."""
        self.bar.total = self.bar.n + len(settings)
        for setting in settings:
            given: dict[str, Any] = {"target_sparsity" if by_target else "strength": setting}
            self.bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in given.items()))
            self._take_down(self._train(Watch(self._with(setting, by_target), self.yardstick), **given))
            if not self.done[-1].learned:
                break
        self.bar.total = self.bar.n
        if len(self.done) == 2 and not (first := self.done[-1]).learned:
            less = f"target_sparsities=[{first.asked / 2:.3g}]" if by_target else f"strengths=[{first.asked / 100:.3g}]"
            raise ValueError(
                f"The first trial with a penalty failed already: {first.setting}: {first.reason}. Try less of it,"
                f" {less} say, or train for longer."
            )

    def _with(self, setting: float, by_target: bool = False) -> GradientCoherentRegularization:
        if by_target:
            return with_target(self.wanted, setting)
        strength = scaled_strength(self.wanted.strength or 1.0, setting)
        return self.wanted.with_changes(strength=strength, target_sparsity=None)

    def _train(self, watch: Watch, strength: Optional[float] = None, target_sparsity: Optional[float] = None) -> Trial:
        trainer = self.trials.fit([watch, watch.regularization])
        metrics = metrics_of(trainer)
        if self.yardstick.in_validation and watch.failure is None and watch.validated_at != watch.steps:
            metrics |= self.trials.validate(trainer)
        metric = metrics.get(self.yardstick.metric, math.nan)
        learned, reason = watch.verdict(metric)
        parameters = list(watch.regularizer.trained.values())
        weights = sum(parameter.numel() for parameter in parameters)
        name = watch.regularization.name
        injected = [metrics[key] for key in metrics if key.startswith(f"{name}/") and key.endswith("/injected")]
        return Trial(
            strength=strength,
            target_sparsity=target_sparsity,
            metric=metric,
            weights=weights,
            nonzeros=weights - sum(int(zeros) for zeros, _ in zero_counts(parameters)),
            injected=sum(injected) / len(injected) if injected and strength != 0 else 0.0,
            weight_norm=math.hypot(*watch.regularizer.weight_norms().values()),
            steps=watch.steps,
            learned=learned,
            reason=reason,
        )

    def _take_down(self, trial: Trial) -> None:
        self.done.append(trial)
        self.bar.update()
        size = f"{trial.compression:8.4g}×" if trial.nonzeros else "all zero"
        verdict = "learned" if trial.learned else "failed "
        if not self.bar.disable:
            line = f"{trial.setting:20} {verdict}  {self.yardstick.metric} {trial.metric:.4g}  {size}  {trial.reason}"
            self.bar.write(line)
