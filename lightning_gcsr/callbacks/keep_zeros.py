"""The callback that keeps zeros zero while training goes on without penalty: the polish after regularization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gcsr._lightning import (
    LightningModule,
    Trainer,
    check_trainer,
    clock,
    misconfiguration,
    rank_zero_info,
    rank_zero_warn,
    trainer_callbacks,
)
from lightning_gcsr.callbacks.preconditions import check_hooks, check_length
from lightning_gcsr.callbacks.regularization import GradientCoherentRegularization
from lightning_gcsr.callbacks.step_callback import StepCallback
from lightning_gcsr.core.optimizers import check_optimizer, stepped_parameters
from lightning_gcsr.core.parameter_selection import check_patterns, select_parameters
from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.core.schedule import Moment, check_moment
from lightning_gcsr.core.sharded_state import spread_state
from lightning_gcsr.core.sharding import is_sharded, local_part, replication_factors, sharded_like, sum_over_processes
from lightning_gcsr.validation import call_repr, moved_arguments

__all__ = ["KeepZeros"]


class KeepZeros(StepCallback):
    """Keeps zero weights at zero from a given point of the training on, with their gradients and optimizer state.

    A penalty also shrinks the weights that survive it. Stop the penalty early (``schedule=Schedule(stop=0.5)``) and let
    this callback keep the zeros: the rest of the training recovers accuracy at the same sparsity.

    **Hooks used.** ``on_train_batch_start`` to find the zeros, ``on_before_optimizer_step``, before gradient clipping,
    and the optimizer's step-post hook. Nothing is changed before the zeros are kept.

    **State saved.** Which weights are zero (one byte per weight).

    **Strategies tested.** A single device, DDP, and ``ModelParallelStrategy`` with FSDP2, on CPU.

    **Keys logged.** None; the number of zeros is printed to the console when they are found.

    Args:
        start: When to begin: an integer is a number of optimizer steps, a float in [0, 1] a fraction of the training's
            progress, as in :class:`~lightning_gcsr.Schedule`. ``None``: when the penalties of the Trainer's
            :class:`~lightning_gcsr.GradientCoherentRegularization` callbacks have stopped.
        include: Regular expressions of the parameters to keep, instead of the weights of all layers but norms.
        exclude: Regular expressions of parameters to leave out.

    Raises:
        ValueError: If an argument breaks its rule; at the start of ``fit``, if a pattern matches nothing.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: Before the first step, if strategy, precision or optimizer are not supported, if no
            penalty stops and ``start=None``, or if ``start`` is a fraction and the training has no end.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gcsr import GradientCoherentRegularization, KeepZeros, Schedule
        >>> regularization = GradientCoherentRegularization("l1", strength=0.01, schedule=Schedule(stop=0.5))
        >>> trainer = Trainer(max_epochs=10, callbacks=[regularization, KeepZeros()], accelerator="cpu")
    """

    # Gradients are cleared as late as possible, after other callbacks have changed them.
    acts_in_backward = False

    @moved_arguments({"start_steps": "start={}"})
    def __init__(
        self,
        start: Union[int, float, None] = None,
        *,
        include: Optional[Sequence[str]] = None,
        exclude: Optional[Sequence[str]] = None,
    ) -> None:
        super().__init__()
        if start is not None:
            check_moment("start", start, advice="Use None to start where the penalty stops.")
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        self.start, self.include, self.exclude = start, include, exclude
        self._moments: list[Moment] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._zeros: dict[str, Tensor] = {}
        self._grouped: dict[str, CoherentRegularizer] = {}
        """By the name of a bias or norm, the regularizer of the coupled groups that it belongs to."""

    def __repr__(self) -> str:
        return call_repr(type(self).__name__, KeepZeros, vars(self))

    # -- before the first step -------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_trainer(trainer, type(self).__name__)
            if trainer.global_step == 0:  # what is there is of an earlier fit
                self._zeros = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._select(pl_module)
        self._moments = self._find_moments(trainer)
        for optimizer in trainer.optimizers:
            try:
                check_optimizer(optimizer)  # with gradient, state and weight at 0 all is well
            except ValueError as error:
                raise misconfiguration(trainer, f"`{type(self).__name__}`: {error}") from error
            check_hooks(trainer, type(self).__name__, optimizer)

    def _select(self, module: LightningModule) -> None:
        selected = select_parameters(module, self.include, self.exclude)
        self._parameters = dict(selected)
        self._grouped = {}
        for penalty in trainer_callbacks(module.trainer):  # the biases and norms of coupled groups
            if isinstance(penalty, GradientCoherentRegularization) and penalty.regularizer and penalty.penalty.coupled:
                others = {n: p for n, p in penalty.regularizer.parameters.items() if n not in selected and p.dim() < 2}
                self._parameters |= others
                self._grouped |= dict.fromkeys(others, penalty.regularizer)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}

    def _find_moments(self, trainer: Trainer) -> list[Moment]:
        """All that must have come for zeros to be kept."""
        if self.start is not None:
            return [self.start]
        penalties = [c for c in trainer_callbacks(trainer) if isinstance(c, GradientCoherentRegularization)]
        stops = [penalty.schedule.stop for penalty in penalties if penalty.schedule.stop is not None]
        if not stops:
            raise misconfiguration(
                trainer,
                "`KeepZeros` with start=None starts where a penalty stops, and none of the Trainer's callbacks is a"
                " `GradientCoherentRegularization` whose schedule has a `stop`. Give it schedule=Schedule(stop=...), or"
                " `KeepZeros` a `start`.",
            )
        return stops

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._select(pl_module)  # again, since a callback after this one may have found its coupled groups meanwhile
        what = "KeepZeros: start" if self.start is not None else "KeepZeros: the stop it follows"
        fractions = [moment for moment in self._moments if isinstance(moment, float) and moment > 0]
        check_length(trainer, {what: fractions[0]} if fractions else {})
        # A checkpoint brings them on the CPU, after `on_fit_start` where parameters are sharded.
        self._zeros = {
            name: zeros.to(self._parameters[name].device)
            for name, zeros in self._zeros.items()
            if name in self._parameters
        }

    # -- around each optimizer step --------------------------------------------------------------------------------

    @override
    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._has_begun(trainer):
            return
        if batch_idx == 0:  # other code may have replaced Parameters
            self._select(pl_module)
            kept = self._zeros.items()
            self._zeros = {n: z for n, z in kept if z.shape == local_part(self._parameters[n]).shape}
        # Here, because within a step the parameters may hold latent weights, which are not zero.
        for optimizer in trainer.optimizers:
            if any(name not in self._zeros for name, _, _ in stepped_parameters(optimizer, self._names)):
                self._find_zeros(optimizer, trainer.global_step)

    def _has_begun(self, trainer: Trainer) -> bool:
        now = clock(trainer)
        return all(not moment or now.reached(moment) for moment in self._moments)

    def _find_zeros(self, optimizer: Optimizer, step: int) -> None:
        """Record which weights are zero, and clear what the optimizer remembers of these weights."""
        counts = []
        parameters = [parameter for _, parameter, _ in stepped_parameters(optimizer, self._names)]
        names = [self._names[id(parameter)] for parameter in parameters]
        # Of a bias or norm only the coupled groups that are zero as a whole; to look at all groups takes a while.
        regularizers = {self._grouped[name] for name in names if name in self._grouped and name not in self._zeros}
        zero_groups = {regularizer: regularizer.zero_groups() for regularizer in regularizers}
        for name, parameter, factor in zip(names, parameters, replication_factors(parameters), strict=True):
            if name not in self._zeros:
                grouped = self._grouped.get(name)
                self._zeros[name] = zero_groups[grouped][name] if grouped else local_part(parameter) == 0
            zeros = self._zeros[name]
            count = torch.stack([zeros.sum(), torch.tensor(zeros.numel(), device=zeros.device)]) * factor
            parts = [torch.zeros_like(count), count] if name in self._grouped else [count, torch.zeros_like(count)]
            counts.append(torch.cat(parts))
            state = optimizer.state.get(parameter, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    self._clear_state(name, value)
        total = torch.stack([count.to(counts[0].device) for count in counts]).sum(0)
        total = sum_over_processes(total) if any(map(is_sharded, parameters)) else total
        zero, weights, zero_others, others = total.tolist()
        also = f", as do {zero_others:,.0f} of {others:,.0f} biases and entries of norms" if others else ""
        rank_zero_info(
            f"KeepZeros: from step {step} on, {zero:,.0f} of {weights:,.0f} weights are zero and stay so{also}."
        )

    def _clear_state(self, name: str, value: Tensor) -> None:
        """Clear what an optimizer remembers of weights that stay zero, in place.

        Quantized states are tensors of classes of their own, which know few operations, or integers that stand for
        other numbers. The latter stay as they are: weight and gradient are cleared at every step all the same.
        """
        if not (value.is_floating_point() or value.is_complex()):
            return
        if type(value) in (Tensor, nn.Parameter, nn.Buffer) or is_sharded(value):
            self._cleared(name, value)
        elif hasattr(value, "dequantize"):
            value.copy_(value.dequantize().masked_fill(self._zeros[name], 0))

    def _cleared(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with zeros where they are kept: itself, or of a sparse one its coalesced form."""
        if tensor.is_sparse:
            tensor = tensor.coalesce()
            tensor.values().masked_fill_(self._zeros[name][tensor.indices()[0]], 0)
        else:
            local_part(tensor).masked_fill_(self._zeros[name], 0)
        return tensor

    @override
    @torch.no_grad()
    def before_step(self, trainer: Trainer, optimizer: Optimizer, loss_scale: float | Tensor) -> None:
        for name, parameter, _ in stepped_parameters(optimizer, self._names):
            if parameter.grad is not None and name in self._zeros:
                parameter.grad = self._cleared(name, parameter.grad)

    @override
    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, skipped: bool) -> None:
        # With gradient and state cleared most optimizers leave a zero alone; this makes sure of the others.
        for name, parameter, _ in stepped_parameters(optimizer, self._names):
            if name in self._zeros:
                self._cleared(name, parameter)

    @override
    def after_unannounced_step(self, optimizer: Optimizer) -> None:
        self.after_step(optimizer, skipped=False)

    # -- the end, and state ----------------------------------------------------------------------------------------

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_parameters": {}, "_names": {}, "_grouped": {}}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.global_step > 0 and not self._zeros:
            moment = self.start if self.start is not None else max(self._moments, key=float)
            when = f"{moment:.0%} of its progress" if isinstance(moment, float) else f"step {moment}"
            rank_zero_warn(
                f"KeepZeros: the training ended after {trainer.global_step} steps, before {when}, from which on zeros"
                " were to be kept. Let the penalty stop earlier, or train for longer."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        own = self._parameters
        kept = {name: zeros.clone() for name, zeros in self._zeros.items() if name in own}
        return {"zeros": {name: sharded_like(zeros, own[name]) for name, zeros in kept.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":  # Lightning hands over the state of a checkpoint that is validated or tested, too
            self._zeros = dict(state_dict["zeros"])
            if self._parameters:  # sharded ones are restored after `on_fit_start`
                zeros = spread_state(state_dict, self._parameters)["zeros"]
                self._zeros = {name: local_part(mask) for name, mask in zeros.items()}
