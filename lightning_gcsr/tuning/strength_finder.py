"""Find the strength: short trainings at many strengths, of copies of the model, and a suggestion from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch import LightningDataModule
from tqdm.auto import tqdm

from lightning_gcsr._lightning import Callback, LightningModule, Trainer, is_a, trainer_callbacks
from lightning_gcsr.callbacks import GradientCoherentRegularization
from lightning_gcsr.core.strengths import dissolving_strength
from lightning_gcsr.sparsity.counting import zero_counts
from lightning_gcsr.tuning.isolated_runs import Trials, metrics_of, unknown_metric, untouched
from lightning_gcsr.tuning.strength_result import Method, StrengthFinderResult, Trial
from lightning_gcsr.tuning.trial_monitor import Watch, Yardstick
from lightning_gcsr.validation import argument_error, check_choice, check_finite_number, check_integer

__all__ = ["find_strength"]

BELOW, ABOVE = 1 / 30, 100.0
_NO_VALIDATION = "There is no validation data: pass `val_dataloaders`, or name a metric of the training."


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
    min_strength: Optional[float] = None,
    max_strength: Optional[float] = None,
    num_strengths: int = 9,
    num_bisections: int = 3,
    max_steps: Optional[int] = None,
    max_epochs: Optional[int] = None,
    compare_plain: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> StrengthFinderResult:
    r"""Train copies of the model at growing strengths, and report what each costs and gains.

    First without a penalty, then at ``num_strengths`` strengths, evenly spaced in their logarithm, until one fails;
    between the last that learned and the first that failed ``num_bisections`` more narrow down the tolerance level.
    Each trial starts from the same weights, data order and random state, with an optimizer that
    ``configure_optimizers`` makes. **The model, the Trainer, their optimizers, callbacks and loggers, the folder of
    checkpoints and the random state are as before** when this returns or raises, after Ctrl-C too: all that trains are
    copies, nothing is logged or saved. Of the Trainer's callbacks only those take part that shape the training (weight
    averaging, finetuning, accumulation schedules, :class:`~lightning_gcsr.KeepZeros`, other penalties); name further
    ones in ``callbacks``.

    **A trial has learned** if its metric gets at least half as far from that of a model that knows nothing as training
    without penalty does: one with all regularized weights at zero, so that a model may be trained already; of a metric
    of the training alone, and where that is not finite, the model as it is given. A trial has failed otherwise, and is
    cut short as soon as a weight is not finite, all of them are dead (shrunk below 1e-6 of their norm), or, at a
    validation, the metric says so and a layer is dead or half of the trial is over.

    **The range** when none is given is centred on the strength at which the proximal steps of the trial would dissolve
    the median tensor, were there no loss to hold against it: the median over tensors of ⟨w,w⟩/⟨w,r⟩ ÷ Σ lr·κ,
    with the learning rates and gradients of the trial without penalty and the share of the strength that delay and
    warm-up leave. It goes from a thirtieth of it, where hardly a weight can reach zero, to a hundred times as much.
    Under an optimizer that rescales gradients, with ``update="gradient"``, nothing tells the scale, and the range must
    be given.

    **Strategies tested.** A single device and DDP, on CPU. On several processes all call this together; metrics are
    averaged over them, and each gets the same result.

    Args:
        trainer: The Trainer that will train the model; it must not have trained yet.
        model: The model.
        train_dataloaders: The data, as ``trainer.fit`` takes them.
        val_dataloaders: The same for the validation.
        datamodule: Or a data module.
        regularization: The penalty, the gate and the rest; its strength is ignored (of a dict the proportions are
            kept). By default the Trainer's own callback, and where it has none ``"l1"`` with the defaults.
        metric: What is logged of the quality of a model, in the validation or in the training.
        mode: Whether the metric is better when it is smaller, ``"min"``, or larger, ``"max"``.
        min_strength: The smallest strength to try, > 0.
        max_strength: The largest.
        num_strengths: How many to try, evenly spaced in their logarithm.
        num_bisections: How many more between the last that learned and the first that failed.
        max_steps: Optimizer steps of a trial, which is never longer than the Trainer trains and by default as long.
            Fractions in the schedule are of a trial.
        max_epochs: Epochs of a trial, likewise.
        compare_plain: Whether to try the same penalty without a gate too (``gate=None``).
        callbacks: Further callbacks that the training depends on; copied for each trial.
        progress: Whether to show a bar over the trials, on the first process, and a line on each.

    Returns:
        All trials, with :meth:`~lightning_gcsr.StrengthFinderResult.suggestion`, tolerance levels, table and figure.

    Raises:
        ValueError: If an argument breaks its rule, if nothing logs the metric, if the model does not learn without a
            penalty, or if the smallest strength fails already.
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
        >>> result = find_strength(trainer, Regression(), data, data, num_strengths=3, num_bisections=0, progress=False)
        >>> len(result.trials)
        4
    """
    _check_arguments(metric, mode, min_strength, max_strength, num_strengths, num_bisections, max_steps, max_epochs)
    if is_a(callbacks, "Callback"):
        raise argument_error("callbacks", callbacks, "must be a sequence of callbacks", "Put it in a list.", TypeError)
    wanted = _regularization(trainer, regularization)
    trials = Trials(trainer, model, train_dataloaders, val_dataloaders, datamodule, callbacks, max_steps, max_epochs)
    trials.check()
    with untouched(train_dataloaders, val_dataloaders, datamodule):
        search = _Search(trials, wanted, metric, mode, progress and trainer.is_global_zero)
        try:
            search.reference("min_strength" if min_strength is None else "max_strength" if max_strength is None else "")
            strengths = search.strengths(min_strength, max_strength, num_strengths)
            for method in ("coherent", "plain") if compare_plain else ("coherent",):
                search.ascend(method, strengths, num_bisections)
        finally:
            search.bar.close()
    return StrengthFinderResult(metric, mode, search.yardstick.baseline, search.done)


class _Search:
    """The trials made so far, and what is known from those without a penalty."""

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

    def reference(self, missing: str) -> None:
        """What is logged, the metric of a model that knows nothing, and what is learned without a penalty.

        Args:
            missing: The end of the range that is not given; empty if both are.
        """
        self.bar.set_postfix_str("no penalty")
        metric = self.yardstick.metric
        # One step, in which all that this package refuses is refused, and which shows what is logged.
        watch = self._reference_watch()
        first = self.trials.fit([watch, watch.regularization], only_one_step=True)
        if missing and not watch.knows_step_size:
            rule = "must be given with update='gradient' under an optimizer that rescales gradients"
            raise argument_error(missing, None, rule, "Use update='proximal', or give the range.")
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
        watch = self._reference_watch()
        trial = self._train(watch, "none", 0.0)
        self.spans, self.paths = watch.spans, watch.paths
        self.yardstick.set_reference(trial.metric, trial.steps)
        self.trials.quiet = True
        self._take_down(trial)

    def _reference_watch(self) -> Watch:
        return Watch(self._with_strength("coherent", 1.0), self.yardstick)  # which sets the strength to 0

    def strengths(self, smallest: Optional[float], largest: Optional[float], count: int) -> list[float]:
        """The strengths to try, evenly spaced in their logarithm."""
        if smallest is None or largest is None:
            centre = dissolving_strength(self.spans, self.paths)
            smallest = BELOW * centre if smallest is None else smallest
            largest = ABOVE * centre if largest is None else largest
            if smallest >= largest:
                rule = f"must leave a range: without the other end it would go from {smallest:.3g} to {largest:.3g}"
                raise argument_error("min_strength", smallest, rule, "Give both `min_strength` and `max_strength`.")
        ratio = (largest / smallest) ** (1 / max(1, count - 1))
        return [smallest * ratio**i for i in range(count)]

    # -- with one --------------------------------------------------------------------------------------------------

    def ascend(self, method: Method, strengths: list[float], bisections: int) -> None:
        """Try growing strengths until one fails, then narrow down where."""
        self.bar.total = self.bar.n + len(strengths) + bisections
        learned: Optional[float] = None
        failed: Optional[float] = None
        for strength in strengths:
            if not self._try(method, strength).learned:
                failed = strength
                break
            learned = strength
        if learned is None and method == "coherent":
            raise ValueError(
                f"Every trial failed: already at min_strength={strengths[0]:.3g}: {self.done[-1].reason}."
                f" Look at the lower end: give a smaller `min_strength`, {strengths[0] / 100:.3g} say."
            )
        if learned is not None and failed is not None:
            for _ in range(bisections):
                middle = math.sqrt(learned * failed)
                if self._try(method, middle).learned:
                    learned = middle
                else:
                    failed = middle
        self.bar.total = self.bar.n

    def _try(self, method: Method, strength: float) -> Trial:
        self.bar.set_postfix_str(f"{method}, strength {strength:.3g}")
        trial = self._train(Watch(self._with_strength(method, strength), self.yardstick), method, strength)
        self._take_down(trial)
        return trial

    def _with_strength(self, method: Method, strength: float) -> GradientCoherentRegularization:
        changes: dict[str, Any] = {"strength": _scaled(self.wanted.strength or 1.0, strength)}
        if method == "plain":
            changes["gate"] = None
        return self.wanted.with_changes(**changes)

    def _train(self, watch: Watch, method: Method, strength: float) -> Trial:
        trainer = self.trials.fit([watch, watch.regularization])
        metrics = metrics_of(trainer)
        if self.yardstick.in_validation and watch.failure is None and watch.validated_at != watch.steps:
            metrics |= self.trials.validate(trainer)
        metric = metrics.get(self.yardstick.metric, math.nan)
        learned, reason = watch.verdict(metric)
        parameters = list(watch.regularizer.parameters.values())
        weights = sum(parameter.numel() for parameter in parameters)
        name = watch.regularization.name
        injected = [metrics[key] for key in metrics if key.startswith(f"{name}/") and key.endswith("/injected")]
        return Trial(
            method=method,
            strength=strength,
            metric=metric,
            weights=weights,
            nonzeros=weights - sum(int(zeros) for zeros, _ in zero_counts(parameters)),
            injected=sum(injected) / len(injected) if injected and strength > 0 else 0.0,
            weight_norm=math.hypot(*watch.regularizer.weight_norms().values()),
            steps=watch.steps,
            learned=learned,
            reason=reason,
        )

    def _take_down(self, trial: Trial) -> None:
        self.done.append(trial)
        self.bar.update()
        what = "no penalty" if trial.method == "none" else f"{trial.method:8} {trial.strength:10.3g}"
        size = f"{trial.compression:8.4g}×" if trial.nonzeros else "all zero"
        verdict = "learned" if trial.learned else "failed "
        if not self.bar.disable:
            self.bar.write(f"{what:20} {verdict}  {self.yardstick.metric} {trial.metric:.4g}  {size}  {trial.reason}")


def _regularization(
    trainer: Trainer, given: Optional[GradientCoherentRegularization]
) -> GradientCoherentRegularization:
    if given is None:
        present = [
            callback for callback in trainer_callbacks(trainer) if isinstance(callback, GradientCoherentRegularization)
        ]
        if len(present) > 1:
            rule = f"must be given where the Trainer has {len(present)} of them"
            raise argument_error("regularization", None, rule, "Name the one whose strength is wanted.")
        given = present[0] if present else GradientCoherentRegularization("l1", strength=1.0)
    if not isinstance(given, GradientCoherentRegularization):
        rule = "must be a GradientCoherentRegularization"
        raise argument_error("regularization", given, rule, "Its strength is ignored.", TypeError)
    if given.target_sparsity is not None:
        return given.with_changes(target_sparsity=None, strength=1.0)
    return given


def _scaled(strength: Union[float, Mapping[str, float]], largest: float) -> Union[float, dict[str, float]]:
    """The strength, or where there are several the same proportions with this one as the largest."""
    if not isinstance(strength, Mapping):
        return largest
    known = max(strength.values())
    return {pattern: largest * value / known if known else largest for pattern, value in strength.items()}


def _check_arguments(
    metric: str,
    mode: str,
    min_strength: Optional[float],
    max_strength: Optional[float],
    num_strengths: int,
    num_bisections: int,
    max_steps: Optional[int],
    max_epochs: Optional[int],
) -> None:
    if not isinstance(metric, str):
        raise argument_error("metric", metric, "must be a string", "Give the name under which it is logged.", TypeError)
    check_choice("mode", mode, ["min", "max"])
    for name, value in (("min_strength", min_strength), ("max_strength", max_strength)):
        if value is not None:
            check_finite_number(name, value, 0.0, advice="Leave it out for a range that fits the training.")
            if value == 0:
                raise argument_error(
                    name, value, "must be greater than 0", "The trial without a penalty is made anyway."
                )
    if min_strength is not None and max_strength is not None and min_strength >= max_strength:
        rule = f"must be less than max_strength={max_strength!r}"
        raise argument_error("min_strength", min_strength, rule, "Exchange the two, or leave one out.")
    check_integer("num_strengths", num_strengths, minimum=2, advice="Nine over three orders of magnitude is usual.")
    check_integer("num_bisections", num_bisections, minimum=0)
    for name, steps in (("max_steps", max_steps), ("max_epochs", max_epochs)):
        if steps is not None:
            check_integer(name, steps, minimum=1, advice="Leave it out for trials as long as the Trainer trains.")
