"""The callback that keeps zeros zero while training goes on without penalty: the polish after regularization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_gcsr.callbacks.regularization import GradientCoherentRegularization
from lightning_gcsr.callbacks.support import check_trainer, total_steps
from lightning_gcsr.core.optimizers import check_optimizer, stepped_parameters
from lightning_gcsr.core.parameter_selection import check_patterns, select_parameters
from lightning_gcsr.core.settings import check_steps, in_steps
from lightning_gcsr.core.sharding import is_sharded, local_part, replication_factors, sum_over_processes

__all__ = ["KeepZeros"]


class KeepZeros(Callback):
    """Keeps weights that are zero at zero, from one optimizer step on: weight, gradient and optimizer state.

    A penalty that makes a network small also holds its surviving weights back. Let the penalty stop
    (``GradientCoherentRegularization(stop_steps=...)``) and this callback keep the zeros, and the rest of the training
    gives back the accuracy that the penalty took, at the same sparsity.

    **Hooks used.** ``on_before_optimizer_step``, before gradient clipping, and the optimizer's step-post hook. Nothing
    is changed before the zeros are kept.

    **State saved.** Which weights are zero (one byte per weight), and optimizer-step counts. Of sharded parameters the
    zeros are not saved but found again in the weights.

    **Strategies tested.** A single device, DDP, and ``ModelParallelStrategy`` with FSDP2, on CPU.

    **Keys logged.** None; the number of zeros goes to the log of the console when they are taken down.

    Args:
        start_steps: The optimizer step from which on zeros stay zero; a float in [0, 1] is a share of
            ``trainer.estimated_stepping_batches``. ``None``: where the penalty of the Trainer's
            :class:`~lightning_gcsr.GradientCoherentRegularization` callbacks stops, the last of them if they differ.
        include: Regular expressions of the parameters to keep, instead of all with two or more dimensions outside
            norm layers.
        exclude: Regular expressions of parameters to leave out.

    Raises:
        ValueError: If an argument breaks its rule; at the start of ``fit``, if a pattern matches nothing.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: Before the first step, if strategy, precision or optimizer are not supported, if no
            penalty ever stops where ``start_steps=None``, or if a share is given of a training without an end.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gcsr import GradientCoherentRegularization, KeepZeros
        >>> regularization = GradientCoherentRegularization("l1", strength=0.01, update="proximal", stop_steps=0.5)
        >>> trainer = Trainer(max_epochs=10, callbacks=[regularization, KeepZeros()], accelerator="cpu")
    """

    def __init__(
        self,
        start_steps: Union[int, float, None] = None,
        *,
        include: Optional[Sequence[str]] = None,
        exclude: Optional[Sequence[str]] = None,
    ) -> None:
        super().__init__()
        if start_steps is not None:
            check_steps("start_steps", start_steps, advice="Use None to start where the penalty stops.")
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        self.start_steps, self.include, self.exclude = start_steps, include, exclude
        self._start = 0
        self._saw_backward = False
        self._stage = "fit"
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._steps: dict[str, int] = {}
        self._zeros: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    # -- before the first step -------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "fit":
            check_trainer(trainer, type(self).__name__)
            if trainer.global_step == 0:  # what is there is of an earlier fit
                self._steps, self._zeros = {}, {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parameters = select_parameters(pl_module, self.include, self.exclude)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        for optimizer in trainer.optimizers:
            try:
                check_optimizer(optimizer)
            except ValueError as error:
                raise MisconfigurationException(f"`{type(self).__name__}`: {error}") from error

    def _first_step(self, trainer: Trainer) -> int:
        if self.start_steps is not None:
            share = isinstance(self.start_steps, float)
            return in_steps(self.start_steps, total_steps(trainer, "KeepZeros: start_steps") if share else 0)
        penalties = [
            callback.settings
            for callback in trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
            if isinstance(callback, GradientCoherentRegularization) and callback.settings.stop_steps is not None
        ]
        if not penalties:
            raise MisconfigurationException(
                "`KeepZeros` with start_steps=None starts where a penalty stops, and none of the Trainer's callbacks is"
                " a `GradientCoherentRegularization` with `stop_steps`. Give it `stop_steps`, or `KeepZeros` a"
                " `start_steps`."
            )
        total = 0
        if any(isinstance(penalty.stop_steps, float) for penalty in penalties):
            total = total_steps(trainer, "KeepZeros: the stop_steps it follows")
        return max(int(penalty.in_steps(total).stop_steps or 0) for penalty in penalties)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        self._saw_backward = False
        # Not in `on_fit_start`: where Lightning is asked for the length too early, it does not restore the position of
        # a stateful dataloader.
        self._start = self._first_step(trainer)
        # A checkpoint brings them on the CPU, after `on_fit_start` where parameters are sharded.
        self._zeros = {
            name: zeros.to(self._parameters[name].device)
            for name, zeros in self._zeros.items()
            if name in self._parameters
        }
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    # -- around each optimizer step --------------------------------------------------------------------------------

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saw_backward = True

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if pl_module.automatic_optimization:
            saw_backward, self._saw_backward = self._saw_backward, False
            if not saw_backward:
                return
        parameters = list(stepped_parameters(optimizer, self._names))
        if not parameters:
            return
        key = parameters[0][0]  # what an optimizer is known by, as in the regularizer; it holds after a resume
        step = self._steps.get(key, 0)
        self._steps[key] = step + 1
        if step < self._start:
            return
        if any(name not in self._zeros for name, _, _ in parameters):
            self._find_zeros(optimizer, step)
        for name, parameter, _ in parameters:
            if parameter.grad is not None:
                parameter.grad = self._cleared(name, parameter.grad)

    def _find_zeros(self, optimizer: Optimizer, step: int) -> None:
        """Take the zeros down, and clear what the optimizer remembers of these weights."""
        counts = []
        parameters = [parameter for _, parameter, _ in stepped_parameters(optimizer, self._names)]
        for parameter, share in zip(parameters, replication_factors(parameters), strict=True):
            name = self._names[id(parameter)]
            zeros = self._zeros.setdefault(name, local_part(parameter) == 0)
            counts.append(torch.stack([zeros.sum(), torch.tensor(zeros.numel(), device=zeros.device)]) * share)
            state = optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = self._cleared(name, value)
        total = torch.stack([count.to(counts[0].device) for count in counts]).sum(0)
        zero, weights = (sum_over_processes(total) if any(map(is_sharded, parameters)) else total).tolist()
        rank_zero_info(f"KeepZeros: from step {step} on, {zero:,.0f} of {weights:,.0f} weights are zero and stay so.")

    def _cleared(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with zeros where they are kept: itself, or of a sparse one its coalesced form."""
        if tensor.is_sparse:
            tensor = tensor.coalesce()
            tensor.values().masked_fill_(self._zeros[name][tensor.indices()[0]], 0)
        else:
            local_part(tensor).masked_fill_(self._zeros[name], 0)
        return tensor

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # With gradient and state cleared most optimizers leave a zero alone; this makes sure of the others.
        for name, parameter, _ in stepped_parameters(optimizer, self._names):
            if name in self._zeros:
                self._cleared(name, parameter)

    # -- the end, however it comes ---------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        if self._steps and not self._zeros:
            rank_zero_warn(
                f"KeepZeros: the training ended after {max(self._steps.values())} steps, before step {self._start} from"
                " which on zeros were to be kept. Let the penalty stop earlier, or train for longer."
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()
        self._stage = "fit"

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- state -----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        whole = {name for name, parameter in self._parameters.items() if not is_sharded(parameter)}
        zeros = {name: mask.clone() for name, mask in self._zeros.items() if name in whole}
        return {"steps": dict(self._steps), "zeros": zeros}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":  # Lightning hands over the state of a checkpoint that is validated or tested, too
            return
        self._steps, self._zeros = dict(state_dict["steps"]), dict(state_dict["zeros"])
