"""The callback that imposes strong regularization where the gradients stay coherent in its presence."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Optional, Union

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gcsr._lightning import (
    LightningModule,
    Trainer,
    check_trainer,
    clock,
    completes_step,
    logged_step,
    logs_now,
)
from lightning_gcsr.callbacks.coupled import with_groups
from lightning_gcsr.callbacks.diagnostics import Watchdog
from lightning_gcsr.callbacks.preconditions import (
    MOVED,
    check_arguments,
    check_length,
    check_names,
    check_neighbours,
    check_optimizers,
    describe_start,
    fractions_of,
)
from lightning_gcsr.callbacks.reporting.gate_logging import GateLog, settings_by_name
from lightning_gcsr.callbacks.reporting.loggers import log_metrics
from lightning_gcsr.callbacks.reporting.tensorboard_layout import Charts, write_layout
from lightning_gcsr.callbacks.step_callback import StepCallback
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.penalties import Penalty, PenaltyName, resolve_penalty
from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.core.schedule import Schedule
from lightning_gcsr.core.settings import UpdateName, default_schedule
from lightning_gcsr.core.sparsity_controller import SparsityController
from lightning_gcsr.core.strengths import StrengthScale
from lightning_gcsr.validation import call_repr, moved_arguments

__all__ = ["GradientCoherentRegularization"]


class GradientCoherentRegularization(StepCallback):
    r"""Strong regularization that is applied only where the gradients stay coherent in its presence.

    Pass it to any ``Trainer``, of ``lightning.pytorch`` or of ``pytorch_lightning``; the model, its loss and its
    optimizer stay as they are. The penalty acts where the ``gate`` is open. The rule is this project's reading of the
    abstract of *Gradient-coherent strong regularization* (arXiv:1811.08056);
    ``gate=Gate("direction", scope="model"), update="gradient"`` is the literal reading.

    **Hooks used.** The gradients are measured and changed once for each optimizer step, before gradient clipping: in
    ``on_after_backward`` of the backward that completes the step, or in ``on_before_optimizer_step`` if that backward
    cannot be known (manual optimization, an ``optimizer_step`` of the module's own). Weights are shrunk in the
    optimizer's step-post hook. If an optimizer or a ``Parameter`` is replaced during ``fit``, the new one is
    regularized. **State saved.** Everything that a resumed run needs to make the same decisions as an uninterrupted
    one, except that ``"temporal"`` has no previous gradient and suppresses once.

    **Strategies tested.** A single device, DDP, ``ModelParallelStrategy`` (FSDP2, tensor parallelism, both), on CPU.

    **Keys logged**, to every logger on the Trainer's ``log_every_n_steps``, for the last step made:
    ``{name}/coherence``, ``{name}/threshold``, ``{name}/injected``, ``{name}/strength``, ``{name}/grad_norm``,
    ``{name}/penalty_grad_norm``, ``{name}/penalty`` and ``{name}/nonfinite_steps``; see
    :class:`~lightning_gcsr.callbacks.reporting.gate_logging.GateLog`.

    Args:
        penalty: ``"l1"``, ``"l2"``, ``"elastic_net"``, ``"group_lasso"``, or a :class:`~lightning_gcsr.Penalty`.
        strength: λ ≥ 0, the factor of the penalty in the loss, the same under every optimizer. There is no default: it
            depends on the model; :func:`~lightning_gcsr.find_strength` finds one. Or a dict from regular expressions
            on parameter names to strengths, first match wins; parameters that none matches are not regularized.
        target_sparsity: Instead of a strength, the sparsity of the trained weights at the end, in (0, 1): the strength
            is adapted during training, see :class:`~lightning_gcsr.SparsityController`. It needs
            ``update="dual_averaging"``, a penalty that makes zeros, one optimizer, and a training of known length or an
            integer ``stop`` in the schedule. Every fourth step synchronizes with the host.
        gate: The :class:`~lightning_gcsr.Gate`: where the penalty is injected and where it is suppressed. ``None``
            always injects, which is plain strong regularization.
        schedule: The :class:`~lightning_gcsr.Schedule`: when the penalty acts. Its ``warmup`` is by default 0.3 of the
            training if the gate has a tolerance and no target is given, else 0.
        update: ``"proximal"``: the proximal map after the optimizer's step, which gives exact zeros for L1 and group
            lasso. ``"dual_averaging"``: exact zeros from which weights can come back. ``"gradient"``: ``g += λ·r``
            before the optimizer sees the gradient. See :class:`~lightning_gcsr.CoherentRegularizer`.
        strength_scale: ``"uniform"``, or ``"fan_in"``: each tensor's strength is multiplied by its fan-in over the
            mean fan-in, because each weight of a thin layer matters more.
        include: Regular expressions of the parameters to regularize, instead of the weights of all layers but norms.
        exclude: Regular expressions of parameters to leave out.
        name: The prefix of the logged keys and part of the state's key. Several callbacks with distinct names work
            side by side, on different weights, or on the same ones with ``update="proximal"``.
        log_per_parameter: Whether coherence and injected fraction are logged for each parameter too.

    Raises:
        ValueError: If an argument breaks its rule.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: Before the first step, if strategy, precision or optimizer are not supported, if the
            schedule has fractions of a training whose length is not known, if two callbacks have one name, or if
            another callback injects into the gradients that this one measures.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from lightning_gcsr import GradientCoherentRegularization
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(8, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> regularization = GradientCoherentRegularization("l1", strength=0.1)
        >>> trainer = Trainer(max_epochs=2, callbacks=[regularization], barebones=True, accelerator="cpu")
        >>> trainer.fit(Regression(), torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8))
        >>> regularization.regularizer.state_dict()["steps"]
        {'layer.weight': 8}
    """

    @moved_arguments(MOVED)
    def __init__(
        self,
        penalty: Union[Penalty, PenaltyName] = "l1",
        *,
        strength: Union[float, dict[str, float], None] = None,
        target_sparsity: Optional[float] = None,
        gate: Optional[Gate] = Gate(),  # noqa: B008  # immutable
        schedule: Schedule = Schedule(),  # noqa: B008
        update: UpdateName = "dual_averaging",
        strength_scale: StrengthScale = "uniform",
        include: Optional[Sequence[str]] = None,
        exclude: Optional[Sequence[str]] = None,
        name: str = "gcsr",
        log_per_parameter: bool = False,
    ) -> None:
        super().__init__()
        given = locals()
        names = inspect.signature(GradientCoherentRegularization).parameters
        self._arguments: dict[str, Any] = {key: given[key] for key in names}
        self.penalty = resolve_penalty(penalty)
        check_arguments(self._arguments, self.penalty)
        own = default_schedule(gate, schedule)
        self.schedule = own if target_sparsity is None else schedule.with_default_warmup(0)
        self.strength, self.target_sparsity, self.strength_scale = strength, target_sparsity, strength_scale
        self.gate, self.update, self.include, self.exclude = gate, update, include, exclude
        self.name, self.log_per_parameter = name, log_per_parameter
        self.acts_after_step = update != "gradient"
        self.regularizer: Optional[CoherentRegularizer] = None
        """The regularizer at work, from the start of ``fit`` on; it stays readable afterwards."""
        self.injected_by_parameter: Optional[tuple[int, dict[str, float]]] = None
        """The last step that was logged, and for each parameter the share that got the penalty in it."""
        self._loaded_state: Optional[dict[str, Any]] = None
        self._log = GateLog(name, gate, log_per_parameter, self.penalty.coupled)
        self._watchdog: Optional[Watchdog] = None  # as the regularizer, from `on_fit_start` on
        self._stepping = 0  # the index of the optimizer that steps
        self._measure_shrinking = False
        self._shrunk: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return call_repr(type(self).__name__, GradientCoherentRegularization, self._arguments)

    def with_changes(self, **changes: Any) -> GradientCoherentRegularization:
        """A new, untrained callback with the arguments of this one, except for the changes.

        Example:
            >>> stronger = GradientCoherentRegularization("l1", strength=0.01).with_changes(strength=0.1)
            >>> stronger.strength
            0.1
        """
        return type(self)(**copy.deepcopy(self._arguments | changes))

    @property
    def controller(self) -> Optional[SparsityController]:
        """What adapts the strength to ``target_sparsity``, from the first step with a penalty on."""
        return None if self.regularizer is None else self.regularizer.controller

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    # -- before the first step -------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_trainer(trainer, type(self).__name__)
        if trainer.global_step == 0:  # what is there is of an earlier fit, if Tuner brought it along or not
            # The state of a checkpoint to resume from comes after this hook.
            self.regularizer = self._loaded_state = None
        check_names(trainer, self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_layout(trainer)
        # Only now are the parameters there that `configure_model` makes, and the weights that a checkpoint brings.
        previous = self.regularizer
        self.regularizer = CoherentRegularizer(
            pl_module,
            with_groups(self.penalty, trainer, pl_module),
            strength=self.strength,
            target_sparsity=self.target_sparsity,
            gate=self.gate,
            schedule=self.schedule,
            update=self.update,
            strength_scale=self.strength_scale,
            include=self.include,
            exclude=self.exclude,
        )
        if self._loaded_state:
            self.regularizer.load_state_dict(self._loaded_state)
        elif previous is not None and trainer.global_step > 0:  # `fit` goes on where an earlier `fit` ended
            self.regularizer.load_state_dict(previous.state_dict(whole=False))
        self.injected_by_parameter, self._shrunk = None, {}
        self._log.clear()
        self._watchdog = Watchdog(self, self.regularizer)
        check_neighbours(trainer, self)
        check_optimizers(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self._watchdog is not None  # made in `on_fit_start`
        self._watchdog.check_parameters(trainer, 0)
        self._watchdog.check_resumed(bool(self._loaded_state))
        self._loaded_state = None
        check_length(trainer, fractions_of(self, left_open=self._arguments["schedule"].warmup is None))
        describe_start(trainer, self)

    # -- around each optimizer step --------------------------------------------------------------------------------

    @override
    def before_step(self, trainer: Trainer, optimizer: Optimizer, loss_scale: float | Tensor) -> None:
        assert self.regularizer is not None
        assert self._watchdog is not None
        now = clock(trainer)
        logs = logs_now(trainer)
        # By hand, nobody knows which step is the last one before Lightning logs.
        wanted = logs or not trainer.lightning_module.automatic_optimization
        report = self.regularizer.before_step(optimizer, loss_scale, clock=now, report=wanted)
        self._measure_shrinking = logs and self.update == "proximal" and bool(report and report.names)
        self._watchdog.count_step(self.regularizer.acts_in_full(now))
        self._stepping = _index(trainer, optimizer)
        if report is not None and report.names:
            self._log.keep(self._stepping, report)

    @override
    def after_step(self, optimizer: Optimizer, skipped: bool) -> None:
        assert self.regularizer is not None
        measures = self._measure_shrinking and not skipped
        self._shrunk = {"before": self.regularizer.penalty_value()} if measures else self._shrunk
        self.regularizer.after_step(optimizer, skipped=skipped)
        if measures:
            self._shrunk["after"] = self.regularizer.penalty_value()
        found_inf = getattr(optimizer, "found_inf", None)  # of a fused optimizer under a loss scaler
        self._log.mark_done(self._stepping, float(not skipped) if found_inf is None else found_inf == 0)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0 and self._watchdog is not None:  # after the hooks that may exchange Parameters
            self._watchdog.check_parameters(trainer, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # By hand, a batch may pass without a step: then the last one made is logged, once, when Lightning logs next.
        due = logs_now(trainer) and completes_step(trainer)
        if self._log and due:
            self._log_step(trainer, logged_step(trainer))
        if due or pl_module.automatic_optimization:
            self._log.clear()

    def _log_step(self, trainer: Trainer, step: int) -> None:
        assert self.regularizer is not None
        assert self._watchdog is not None
        stepping = [optimizer for optimizer in trainer.optimizers if self.regularizer.stepped_by(optimizer)]
        shrunk, self._shrunk = self._shrunk, {}
        metrics, by_parameter, shrunk_from = self._log.numbers(self.regularizer, len(stepping) > 1, shrunk)
        self.injected_by_parameter = step, by_parameter
        log_metrics(trainer, metrics, step)
        self._watchdog.check_step(trainer, step, self._log.last_injected, shrunk_from)

    # -- what loggers show -----------------------------------------------------------------------------------------

    def hyperparameters(self, trainer: Trainer) -> dict[str, Any]:
        """The settings at work, for loggers; those of gate and schedule by their fields, ``{name}/gate.scope``."""
        left_out = ("name", "log_per_parameter")
        settings = {name: value for name, value in self._arguments.items() if name not in left_out}
        return settings_by_name(self.name, settings | {"schedule": self.schedule})

    def compared_metrics(self) -> list[str]:
        """The keys by which runs are compared."""
        return [f"{self.name}/{key}" for key in ("injected", "strength", "penalty")]

    def tensorboard_charts(self, module: LightningModule) -> Charts:
        """The keys that belong together, for TensorBoard's Custom Scalars."""
        return self._log.charts()

    # -- the end, however it comes ---------------------------------------------------------------------------------

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watchdog is not None:
            self._watchdog.check_epoch(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watchdog is not None:  # here, for callbacks that average weights put these in at `on_train_end`
            self._watchdog.check_end(trainer, logged_step(trainer) - 1)

    # -- state -----------------------------------------------------------------------------------------------------

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in super().__getstate__().items() if key not in ("_log", "_shrunk")}
        return state | {"regularizer": None, "_watchdog": None, "_loaded_state": self.state_dict() or None}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shrunk = {}
        self._log = GateLog(self.name, self.gate, self.log_per_parameter, self.penalty.coupled)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict(whole=False) if self.regularizer is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":  # Lightning hands over the state of a checkpoint that is validated or tested, too
            return
        # Most strategies restore before `on_fit_start`, which makes the regularizer, and sharded ones after it.
        self._loaded_state = state_dict
        if self.regularizer is not None and state_dict:
            self.regularizer.load_state_dict(state_dict)


def _index(trainer: Trainer, optimizer: Optimizer) -> int:
    """The optimizer's place in the Trainer; one that is not there, or not yet, counts as the first."""
    return next((i for i, known in enumerate(trainer.optimizers) if known is optimizer), 0)
