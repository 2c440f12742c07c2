"""The base of callbacks that act around every optimizer step: which step it is, and which hooks see it."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_gcsr._lightning import (
    Callback,
    LightningModule,
    Trainer,
    completes_step,
    loss_scale,
    overrides,
    state_to_copy,
)
from lightning_gcsr.callbacks.sharded_checkpoint import put_sharded, take_sharded

__all__ = ["StepCallback", "calls_step_hooks"]


def calls_step_hooks(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer calls the hooks that torch lets one register on it.

    Wrappers that never call ``Optimizer.__init__``, as some Lookahead do, do not.

    Example:
        >>> import torch
        >>> calls_step_hooks(torch.optim.SGD([torch.ones(1)], lr=0.1))
        True
    """
    return bool(getattr(type(optimizer).step, "hooked", False)) and hasattr(optimizer, "_optimizer_step_post_hooks")


class StepCallback(Callback):
    """Calls :meth:`before_step` once before each optimizer step of a ``fit``, and :meth:`after_step` once after it.

    Before the step: in ``on_after_backward`` of the backward that completes it, where that is known (automatic
    optimization, no ``optimizer_step`` of the module's own), else in ``on_before_optimizer_step``, which Lightning
    calls once for every real step. After the step: in the optimizer's step-post hook, which is registered when training
    starts or when an optimizer is met for the first time, so that one made anew in mid-fit is followed, and removed
    however the training ends. For an optimizer that calls no hooks, ``on_train_batch_end`` takes its place.

    What is sharded in a subclass's ``state_dict`` is saved and restored with the shards of the weights.
    """

    acts_in_backward = True
    """Whether :meth:`before_step` may be called in ``on_after_backward``, before other callbacks see the gradients."""
    acts_after_step = True
    """Whether :meth:`after_step` is wanted at all."""

    def __init__(self) -> None:
        super().__init__()
        self.saw_step = False
        """Whether Lightning announced an optimizer step in this ``fit``."""
        self.unannounced: dict[str, int] = {}
        """The steps that optimizers made without Lightning announcing them, by the optimizer's class."""
        self.skipped_in_a_row = 0
        """How many of the last steps a loss scaler skipped, or seems to have skipped: no hook was called after them."""
        self._stage = "fit"
        self._hooks: dict[int, tuple[Optimizer, Optional[RemovableHandle]]] = {}
        self._at_hand: Optional[Optimizer] = None  # `before_step` was called, `after_step` was not
        self._announced = False  # and Lightning announced its step
        self._saw_backward = self._backward_in_batch = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: settings and what was learned of the weights, without module, optimizers and Trainer."""
        return {key: value for key, value in state_to_copy(self).items() if key not in ("_hooks", "_at_hand")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hooks, self._at_hand = {}, None

    # -- for subclasses --------------------------------------------------------------------------------------------

    def before_step(self, trainer: Trainer, optimizer: Optimizer, loss_scale: float | Tensor) -> None:
        """Called once before each step of an optimizer.

        Args:
            trainer: The Trainer.
            optimizer: The optimizer that is about to step.
            loss_scale: What its gradients are multiplied by at this moment.
        """
        raise NotImplementedError

    def after_step(self, optimizer: Optimizer, skipped: bool) -> None:
        """Called once after each step, or with ``skipped=True`` where the step did not happen."""

    def after_unannounced_step(self, optimizer: Optimizer) -> None:
        """Called after a step for which :meth:`before_step` was not called."""

    # -- the steps of a fit ----------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        self.saw_step = self._announced = self._saw_backward = self._backward_in_batch = False
        self.skipped_in_a_row, self._at_hand = 0, None
        self.unannounced = {}
        for optimizer in trainer.optimizers:
            self._follow(trainer, optimizer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._backward_in_batch = False

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saw_backward = self._backward_in_batch = True
        # By hand, nobody can tell whether a step follows a backward: `on_before_optimizer_step` can.
        known = pl_module.automatic_optimization and not overrides(pl_module, "optimizer_step")
        if self.acts_in_backward and known and completes_step(trainer):
            self._begin(trainer, trainer.optimizers[0], loss_scale(trainer, pl_module.device))
            self._announced = False

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.saw_step = True
        if self._at_hand is optimizer and not self._announced:  # begun in its backward
            self._announced, self._saw_backward = True, False
            return
        if pl_module.automatic_optimization:
            saw_backward, self._saw_backward = self._saw_backward, False
            if not saw_backward:
                # Gradients are those of an earlier step, if any; StochasticWeightAveraging ends with such a step.
                return
            if trainer.scaler is not None and not self._backward_in_batch:
                # The closing micro-batch returned None; then Lightning neither unscales the gradients nor steps.
                return
        # Gradients are unscaled here, except for the fused optimizers that do it within their step.
        still_scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._begin(trainer, optimizer, loss_scale(trainer, pl_module.device) if still_scaled else 1.0)
        self._announced = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._settle(trainer, stepped=True)

    def _begin(self, trainer: Trainer, optimizer: Optimizer, loss_scale: float | Tensor) -> None:
        # An optimizer with hooks that is still at hand has not stepped: a scaler skipped it, or it evaluates its
        # closure twice. Of one without hooks, only manual optimization begins another step in the same batch.
        manual = not trainer.lightning_module.automatic_optimization
        self._settle(trainer, stepped=manual and not calls_step_hooks(self._at_hand or optimizer))
        self._follow(trainer, optimizer)
        self._at_hand = optimizer
        self.before_step(trainer, optimizer, loss_scale)

    def _settle(self, trainer: Trainer, stepped: bool) -> None:
        """End a step after which no hook was called.

        Args:
            trainer: The Trainer.
            stepped: Whether the step has happened, if Lightning announced it and no scaler skipped it.
        """
        optimizer, self._at_hand = self._at_hand, None
        if optimizer is None or not self.acts_after_step:
            return
        skipped = not (stepped and self._announced and trainer.scaler is None)
        self.skipped_in_a_row += skipped
        self.after_step(optimizer, skipped)

    def _hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._at_hand is optimizer:
            self._at_hand, self.skipped_in_a_row = None, 0
            self.after_step(optimizer, skipped=False)
        else:
            name = type(optimizer).__name__
            self.unannounced[name] = self.unannounced.get(name, 0) + 1
            self.after_unannounced_step(optimizer)

    # -- the life of the hooks -------------------------------------------------------------------------------------

    def _follow(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if not self.acts_after_step or id(optimizer) in self._hooks:
            return
        for key, (known, handle) in list(self._hooks.items()):  # an optimizer that was replaced
            if handle is not None and all(known is not present for present in trainer.optimizers):
                handle.remove()
                del self._hooks[key]
        handle = optimizer.register_step_post_hook(self._hook) if calls_step_hooks(optimizer) else None
        self._hooks[id(optimizer)] = (optimizer, handle)

    def _remove_hooks(self) -> None:
        for _, handle in self._hooks.values():
            if handle is not None:
                handle.remove()
        self._hooks.clear()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        put_sharded(trainer, checkpoint, self.state_key)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._stage == "fit":
            take_sharded(trainer, checkpoint, self.state_key)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        optimizer, self._at_hand = self._at_hand, None
        if optimizer is not None:
            self.after_step(optimizer, skipped=True)
        self._remove_hooks()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()
        self._stage = "fit"
