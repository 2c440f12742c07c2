"""The watchdog of a regularization callback: it compares what the callback believes with what happened.

It checks that optimizers hold the parameters, that every step was seen, that the proximal map moved weights, that
weights live and that gradients are finite. Each finding is said once, with the step since when it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.optim import Optimizer

from lightning_gcsr._lightning import (
    Trainer,
    is_a,
    is_fast_dev_run,
    rank_zero_info,
    rank_zero_warn,
    trainer_callbacks,
)
from lightning_gcsr.callbacks.step_callback import StepCallback
from lightning_gcsr.core.coupled_penalty import CoupledGroupLasso
from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.validation import listed

__all__ = ["Watchdog"]

SKIPPED_TOO_OFTEN = 25
"""A GradScaler finds its scale by skipping a few steps; so many in a row mean something else."""
LEAST_STEPS_IN_FULL = 50
"""A training with fewer steps of full strength is too short to say that next to nothing became zero."""


class Watchdog:
    """Warns, once each, where training goes wrong or where the callback did not do what its numbers say.

    Args:
        callback: The callback that is watched; its ``name`` begins every warning.
        regularizer: Its regularizer.
    """

    def __init__(self, callback: StepCallback, regularizer: CoherentRegularizer) -> None:
        self.callback, self.regularizer, self.target = callback, regularizer, regularizer.controller
        self.name: str = callback.name  # type: ignore[attr-defined]
        self._said: set[str] = set()
        self._held: set[str] = set()
        self._unmoved: list[int] = []
        self._steps_in_full = 0
        self._injected_in_full: list[float] = []

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            rank_zero_warn(f"{self.name}: {message}")

    def count_step(self, in_full: bool) -> None:
        """Count a step, with or without the full strength."""
        self._steps_in_full += in_full

    def check_parameters(self, trainer: Trainer, step: int) -> None:
        """Follow parameters whose object was replaced, and warn of those that no optimizer holds any more."""
        held = self._held_by(trainer.optimizers)
        if self._held - held:
            self.regularizer.refresh()
            held = self._held_by(trainer.optimizers)
        if lost := sorted(self._held - held):
            self._warn_once(
                f"lost {lost}",
                f"since step {step} no optimizer holds {listed(lost)}, so that the penalty does not reach"
                " them any more. A Parameter that takes the place of another must be put into the optimizer too.",
            )
        self._held |= held

    def check_resumed(self, resumed: bool) -> None:
        """Warn where a checkpoint does not hold all that decides."""
        if resumed and (forgotten := self.regularizer.forgotten):
            self._warn_once(
                "resumed",
                f"averaged gradients and latent weights of {listed(forgotten)} begin anew: the weights are sharded,"
                " and this checkpoint holds neither. The first steps may decide otherwise than the uninterrupted run.",
            )

    def _held_by(self, optimizers: Iterable[Optimizer]) -> set[str]:
        return {name for optimizer in optimizers for name in self.regularizer.stepped_by(optimizer)}

    def check_step(self, trainer: Trainer, step: int, injected: float, shrunk: Mapping[str, float]) -> None:
        """Check what is known at a step that is logged.

        Args:
            trainer: The Trainer.
            step: The number of the step.
            injected: The fraction of the weights that got the penalty.
            shrunk: The penalty ``before`` and ``after`` the last proximal map; empty where there was none.
        """
        self.check_parameters(trainer, step)
        self.check_weights(trainer, step)
        if self._steps_in_full:
            self._injected_in_full.append(injected)
        if shrunk and injected > 0:
            stuck = 0 < shrunk["before"] <= shrunk["after"] and self._should_move(trainer, injected)
            self._unmoved = [*self._unmoved, step] if stuck else []
            if len(self._unmoved) >= 3:
                self._warn_once(
                    "unmoved",
                    f"since step {self._unmoved[0]} the proximal map has moved no weight, although the gate is open for"
                    f" {injected:.0%} of them. Its step, learning rate times strength, is lost in the rounding of the"
                    " weights' dtype, or other code writes the weights back. Keep the weights in float32, or use a"
                    " larger strength.",
                )
        gate = self.regularizer.gate
        if self.regularizer.unaveraged and gate is not None and vars(gate)["averaging"]:
            self._warn_once(
                "unaveraged",
                f"averaging={gate.averaging} has no effect on {listed(sorted(self.regularizer.unaveraged))}, whose"
                " gradients are sparse: the gate goes by the gradient of each step alone there. Use a dense gradient"
                " (sparse=False) for an average.",
            )
        if self.callback.skipped_in_a_row >= SKIPPED_TOO_OFTEN:
            self._warn_once(
                "skipped",
                f"the last {self.callback.skipped_in_a_row} optimizer steps until step {step} were skipped by the loss"
                " scaler, or the optimizer no longer calls its step hooks, and nothing was regularized in them. Use"
                " precision='bf16-mixed', or do not replace the optimizer's `step`.",
            )

    def _should_move(self, trainer: Trainer, injected: float) -> bool:
        """Whether the proximal map has a size, and is open for more than the weights that are zero anyway."""
        if self.regularizer.strength == 0 or injected <= self.regularizer.sparsity():
            return False
        sizes = (self.regularizer.step_sizes(optimizer) for optimizer in trainer.optimizers)
        return any(size > 0 for by_name in sizes for size in by_name.values())

    def check_weights(self, trainer: Trainer, step: int) -> None:
        """Warn of weights that have collapsed and of gradients that are not finite."""
        collapsed = self.regularizer.collapsed()
        if news := {name: norms for name, norms in collapsed.items() if f"collapsed {name}" not in self._said}:
            self._said.update(f"collapsed {name}" for name in news)
            (first, (norm, initial)), *others = news.items()
            smaller = f"strength than {self.regularizer.strength:g}" if self.target is None else "target_sparsity"
            rank_zero_warn(
                f"{self.name}: at step {step} the weights of {first!r} have collapsed: their norm fell from"
                f" {initial:.3g} to {norm:.3g}"
                + (f"; likewise {', '.join(repr(name) for name, _ in others)}" if others else "")
                + f". That makes {len(collapsed)} of {len(self.regularizer.parameters)} tensors."
                f" Use a smaller {smaller}"
                + (", or a gate" if self.regularizer.gate is None else "")
                + (", or leave it out with `exclude` if the model needs it." if len(collapsed) == 1 else ".")
            )
        # A GradScaler finds its scale by overflowing now and then, which is nothing to be alarmed at.
        if trainer.scaler is None and (nonfinite := int(self.regularizer.nonfinite_steps)) > 0:
            self._warn_once(
                "non-finite",
                f"until step {step} the loss gradient was not finite in {nonfinite} step(s); nothing was"
                f" injected there. The count is logged as {self.name}/nonfinite_steps.",
            )

    def check_epoch(self, trainer: Trainer) -> None:
        """Warn where batches passed, and no step that Lightning knows of, or some that it does not know of."""
        if trainer.lightning_module.automatic_optimization:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        sam = [type(o).__name__ for o in trainer.optimizers if hasattr(o, "first_step") and hasattr(o, "second_step")]
        advice = (
            f"Step {sam[0]} by `optimizer.step(closure)`, where the closure computes the loss and calls"
            " `self.manual_backward`, instead of `first_step` and `second_step`."
            if sam
            else "With manual optimization, step the optimizers that `self.optimizers()` returns and use"
            " `self.manual_backward(loss)`."
        )
        if not self.callback.saw_step and batches > 0:
            self._warn_once(
                "no step",
                "an epoch passed without an optimizer step that Lightning knows of, so nothing was regularized. "
                + advice,
            )
        elif self.callback.unannounced:
            name, count = next(iter(self.callback.unannounced.items()))
            self._warn_once(
                "unannounced",
                f"{name} made {count} step(s) that Lightning does not know of, and nothing was regularized in them. "
                + advice,
            )

    def check_end(self, trainer: Trainer, step: int) -> None:
        """What is to be said at the end: of a target that was missed, or a penalty that did next to nothing."""
        if not self.callback.saw_step:
            return
        self.check_parameters(trainer, step)
        self.check_weights(trainer, step)
        if is_fast_dev_run(trainer):
            return
        if groups := self._groups:
            zero = round(self.regularizer.sparsity() * groups)
            rank_zero_info(f"{self.name}: {zero:,} of {groups:,} groups are zero at the end.")
        if self.target is not None:
            averages = [
                c for c in trainer_callbacks(trainer) if is_a(c, "WeightAveraging", "StochasticWeightAveraging")
            ]
            self._check_target(self.target.target, trainer.should_stop, averages)
        elif not trainer.should_stop:
            self._check_zeros()

    def _check_target(self, target: float, stopped: bool, averages: Sequence[object]) -> None:
        sparsity = self.regularizer.sparsity()
        weights = self.regularizer.trained or self.regularizer.parameters
        counted = self._groups or sum(parameter.numel() for parameter in weights.values())
        missing = target - sparsity  # of a few weights, one is more than a point
        if -max(0.01, self.regularizer.penalty.at_once / counted) <= missing <= max(0.01, 1 / counted):
            return
        why = "Train for longer."
        if not self.regularizer.trained:
            why = "Its parameters are frozen."
        elif not self._held:
            why = "No optimizer holds its parameters."
        elif self.regularizer.controller is not None and self.regularizer.controller.phase == 0:
            why = "The training ended before the penalty began."
        elif averages:
            why = (
                f"{type(averages[0]).__name__} leaves averaged weights behind, of which only those are zero that have"
                " been zero in every average. `prune_small` sets the others to zero, or leave the averaging out."
            )
        elif stopped:
            why = (
                "The training was stopped early, and the target is reached at 80 % of its length. Give a smaller"
                " max_epochs or max_steps, or a Schedule(stop=...) that comes before the end."
            )
        elif idle := self._without_gradient():
            why = (
                f"No gradient ever reached {listed(idle)}, so that nothing could make their weights zero. Leave them"
                " out with `exclude`."
            )
        elif self.regularizer.schedule.stop is not None and sparsity > target:
            why = (
                "After the schedule's stop the thresholds stay as they are, and more weights fell below theirs. Give a"
                " slightly smaller target."
            )
        elif self.regularizer.schedule.stop is not None:
            why = "After the schedule's stop weights may come back, unless `KeepZeros` keeps the zeros."
        elif sparsity < target and self._injected_in_full and not any(self._injected_in_full):
            why = (
                f"{self.name}/injected was 0 in all logged steps: the gate keeps the weights that the loss holds on to."
            )
        rank_zero_warn(
            f"{self.name}: {100 * sparsity:.1f} % of the {'groups' if self._groups else 'weights'}"
            f" are zero at the end, and target_sparsity={target} asked for {100 * target:g} %. {why}"
        )

    @property
    def _groups(self) -> int:
        """The number of coupled groups; 0 where the penalty has none."""
        penalty = self.regularizer.penalty
        return len(penalty.groups or ()) if isinstance(penalty, CoupledGroupLasso) else 0

    def _without_gradient(self) -> list[str]:
        """The trained parameters of which no step knows anything."""
        known = self.regularizer.state_dict(whole=False).get("counts", {})
        return [name for name in self.regularizer.trained if name not in known] if known else []

    def _check_zeros(self) -> None:
        penalty, update = self.regularizer.penalty, self.regularizer.update
        no_zeros = update == "gradient" or not penalty.makes_zeros
        injected = self._injected_in_full[-1] if self._injected_in_full else 0.0
        if no_zeros or self._steps_in_full < LEAST_STEPS_IN_FULL or injected < 0.9:
            return
        if (sparsity := self.regularizer.sparsity()) < 0.1:
            self._warn_once(
                "few zeros",
                f"the penalty ran in full for {self._steps_in_full} steps, on {injected:.0%} of the weights in the last"
                f" one that was logged, and {sparsity:.1%} of them are zero. Use a larger strength than"
                f" {self.regularizer.strength:g}: `find_strength` finds one, or give target_sparsity instead.",
            )
