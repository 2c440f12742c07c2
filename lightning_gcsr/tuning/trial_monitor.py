"""What watches a trial: it stops one that cannot recover, and says which have learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Optional

from torch.optim import Optimizer
from typing_extensions import override

from lightning_gcsr._lightning import Callback, LightningModule, Trainer, clock
from lightning_gcsr.callbacks import GradientCoherentRegularization
from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.core.schedule import Clock

__all__ = ["Watch", "Yardstick"]

# Half of what is learned without a penalty: collapsed networks still learn how frequent the classes are.
LEARNED = 0.5
CHECK_EVERY = 10


@dataclass
class Yardstick:
    """What a metric must reach for a trial to count as learned.

    Example:
        >>> yardstick = Yardstick("val_loss", "min", baseline=2.4)
        >>> yardstick.set_reference(0.4, steps=100)
        >>> yardstick.has_learned(1.0), yardstick.has_learned(2.3), yardstick.has_learned(float("nan"))
        (True, False, False)
        >>> yardstick.account(0.5)
        'learned 95 % of what is learned without penalty'
    """

    metric: str
    mode: Literal["min", "max"]
    baseline: float = math.nan
    """The metric of a model that knows nothing."""
    reference: Optional[float] = None
    """The metric of the training without penalty; unknown until that has been."""
    in_validation: bool = False
    """Whether it is a metric of the validation."""
    steps: int = 0
    """How many steps the training without penalty has made; so long is a trial that is not stopped."""

    def better(self, metric: float, than: float) -> bool:
        """Whether one value of the metric is better than another."""
        return metric < than if self.mode == "min" else metric > than

    def set_reference(self, metric: float, steps: int) -> None:
        """Take the metric of the training without penalty as what can be learned.

        Raises:
            ValueError: If it is no better than that of a model that knows nothing, or one of the two is not finite.
        """
        if not math.isfinite(metric - self.baseline) or not self.better(metric, self.baseline):
            raise ValueError(
                f"The model does not learn without a penalty: {self.metric} of a model that knows nothing is"
                f" {self.baseline:.4g}, and {metric:.4g} after {steps} steps, with mode={self.mode!r}. Check `mode`,"
                " train for longer, or mend the training first."
            )
        self.reference, self.steps = metric, steps

    def learned(self, metric: float) -> float:
        """The share that a training has learned of what is learned without penalty; NaN where that is not known yet."""
        if self.reference is None or not math.isfinite(metric):
            return math.nan
        return (metric - self.baseline) / (self.reference - self.baseline)

    def has_learned(self, metric: float) -> bool:
        """Whether the metric is finite and that of a training that counts as learned."""
        return self.learned(metric) >= LEARNED

    def account(self, metric: float) -> str:
        """What the metric says of a trial, in words."""
        if not math.isfinite(metric):
            return f"{self.metric} is not finite"
        return f"learned {round(100 * self.learned(metric))} % of what is learned without penalty"


class Watch(Callback):
    """Stops a trial that cannot recover. It stands before the penalty's callback in the Trainer.

    Trials are judged by their metric at the end alone: many gain most of it there, when the learning rate falls. What
    stops one before is a weight that is not finite, or that all layers have collapsed, from which nothing but a
    controller of the sparsity brings weights back.
    """

    def __init__(self, regularization: GradientCoherentRegularization, yardstick: Yardstick) -> None:
        self.regularization, self.yardstick = regularization, yardstick
        self.failure: Optional[str] = None
        self.validated_at = -1
        """The step of the last validation."""
        self.steps = 0
        self._began: Optional[Clock] = None
        self.knows_step_size = False
        """Whether a step has a size that tells the scale of a strength."""
        self.spans: dict[str, float] = {}
        """How far the penalty must carry each parameter to zero, at the start."""
        self.paths: dict[str, float] = {}
        """How far steps of strength 1 would have carried each."""

    @property
    def regularizer(self) -> CoherentRegularizer:
        """The regularizer at work."""
        assert self.regularization.regularizer is not None
        return self.regularization.regularizer

    @property
    def _is_reference(self) -> bool:
        return self.yardstick.reference is None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_reference:
            self.spans = self.regularizer.spans()
            self.regularizer.strength = 0.0  # only now: how strengths differ between tensors is in the spans
        else:
            trainer.log_every_n_steps = min(10, max(1, self.yardstick.steps))  # type: ignore[attr-defined]

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.steps += 1
        if self._is_reference:
            self._measure_path(trainer, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_reference:
            sizes = [
                size for optimizer in trainer.optimizers for size in self.regularizer.step_sizes(optimizer).values()
            ]
            self.knows_step_size |= any(size > 0 for size in sizes)
            return
        if self.steps % CHECK_EVERY:
            return
        broken = [name for name, norm in self.regularizer.weight_norms().items() if not math.isfinite(norm)]
        if broken:
            self._fail(trainer, f"the weights of {broken[0]!r} are not finite")
        elif self.regularizer.controller is None and self._all_collapsed():
            self._fail(trainer, "every layer has collapsed")

    def _all_collapsed(self) -> bool:
        return len(self.regularizer.collapsed()) == len(self.regularizer.parameters)

    def _measure_path(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Add what the coming step would move weights by at strength 1, were there a penalty.

        In manual optimization the size is that of the step before, and nothing is known of it in the first step.
        """
        now, schedule = clock(trainer), self.regularizer.schedule
        if self._began is None and schedule.acts(now):
            self._began = now
        factor = schedule.factor(now, self._began)
        for name, size in self.regularizer.step_sizes(optimizer).items():
            self.paths[name] = self.paths.get(name, 0.0) + factor * size

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.validated_at = self.steps

    def _fail(self, trainer: Trainer, reason: str) -> None:
        if self.failure is None:
            self.failure = f"{reason} at step {self.steps}"
        trainer.should_stop = True

    def verdict(self, metric: float) -> tuple[bool, str]:
        """Whether the trial learned, and why it counts so."""
        if self.failure is not None:
            return False, self.failure
        if self._is_reference:
            return True, "the reference"
        collapsed = [repr(name) for name in self.regularizer.collapsed()]
        account = self.yardstick.account(metric) + (f"; collapsed: {', '.join(collapsed)}" if collapsed else "")
        return self.yardstick.has_learned(metric), account
