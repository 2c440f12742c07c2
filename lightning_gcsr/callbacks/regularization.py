"""The callback that imposes strong regularization where the gradients stay coherent in its presence."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional, Union

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_gcsr.callbacks.reporting.tensorboard_layout import Charts, write_layout
from lightning_gcsr.callbacks.support import check_trainer, completes_step, log_metrics, logs_now, total_steps
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.old_gate import CoherenceMeasure, Gate, MeasureName, ScopeName
from lightning_gcsr.core.optimizers import check_optimizer, is_sgd, proximal_step_size
from lightning_gcsr.core.parameter_selection import StrengthScale
from lightning_gcsr.core.penalties import Penalty, PenaltyName, resolve_penalty
from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.core.settings import Settings, UpdateName
from lightning_gcsr.core.sparsity_controller import SparsityController, check_target_sparsity, dissolving_strength
from lightning_gcsr.sparsity.counting import zero_counts
from lightning_gcsr.validation import argument_error

__all__ = ["GradientCoherentRegularization"]


class GradientCoherentRegularization(Callback):
    r"""Strong regularization that is imposed only where the gradients stay coherent in its presence.

    Attach it to any ``Trainer``; the model, its loss and its optimizer stay as they are. With λ the strength, g the
    loss gradient of the whole optimizer step (accumulated, averaged over processes, without loss scale) and r the
    (sub)gradient of the penalty, the penalty is injected where the coherence is at least ``threshold`` and suppressed
    elsewhere. The rule is this project's reading of the abstract of *Gradient-coherent strong regularization*
    (arXiv:1811.08056); ``coherence="direction", scope="model", update="gradient"`` is the literal reading. The default
    asks at each weight whether it is worth a tenth of the penalty to the loss, by the gradients of the last 50 steps.

    **Hooks used.** Under automatic optimization the gradients are measured and changed in ``on_after_backward`` of
    the backward that completes the optimizer step. Where that hook cannot know the step (manual optimization, a
    closing micro-batch whose ``training_step`` returned ``None``), the same is done in ``on_before_optimizer_step``;
    once for each optimizer step in either case, and before gradient clipping, which therefore clips the sum of both
    gradients. The proximal map follows the optimizer's step in its step-post hook.

    **State saved.** Optimizer-step counts, the count of non-finite steps, and the norms of the weights at the start;
    with ``averaging`` the averaged gradients, but for those of sharded weights; with ``target_sparsity`` the strength.
    After a resume ``"temporal"`` has no predecessor and suppresses once.

    **Strategies tested.** A single device, DDP, ``ModelParallelStrategy`` (FSDP2, tensor parallelism, both), on CPU.

    **Keys logged**, to every logger on the Trainer's ``log_every_n_steps``, for the last step made:

    ============================= ================================================================================
    ``{name}/coherence``          the coherence over all regularized weights, in [−1, 1]; not with ``coherence=None``
    ``{name}/threshold``          the coherence from which on the penalty is injected; not at element scope
    ``{name}/injected``           the share of the regularized weights that got the penalty, in [0, 1]
    ``{name}/strength``           the strength after delay, warm-up and stop; the largest where a dict gives several
    ``{name}/grad_norm``          ‖g‖ over the regularized weights, without loss scale and penalty
    ``{name}/penalty_grad_norm``  ‖λr‖, as it would be injected with every gate open
    ``{name}/penalty``            the penalty Σ Ω(w), without strength
    ``{name}/nonfinite_steps``    the number of steps so far whose loss gradient was not finite
    ============================= ================================================================================

    With several optimizers that step regularized weights, the first five begin with ``{name}/optimizer_0/`` and so on.
    TensorBoard's Custom Scalars show them in groups, beside those of :class:`~lightning_gcsr.CompressionMonitor`.
    With ``log_per_parameter=True``, ``{name}/coherence/{parameter}`` and ``{name}/injected/{parameter}`` as well.

    Args:
        penalty: ``"l1"``, ``"l2"``, ``"elastic_net"``, ``"group_lasso"``, or a :class:`~lightning_gcsr.Penalty`.
        strength: λ ≥ 0, per weight and optimizer step of the loss gradient. There is no default: it depends on the
            model; :func:`~lightning_gcsr.find_strength` finds one. Or a dict from regular expressions on parameter
            names to strengths, first match wins; parameters that none matches are not regularized.
        target_sparsity: Instead of a strength, the share of the regularized weights that shall be zero at the end, in
            (0, 1): the strength is adapted during training, see :class:`~lightning_gcsr.SparsityController`. For
            ``update="proximal"`` and a penalty that makes zeros. The training must last long enough, and its learning
            rate must not have fallen to nothing when seven tenths of it are over. Takes the number of zeros, which is
            a pass over the weights and a synchronization with the host, every fourth step.
        coherence: ``"direction"``: cos(g, g+λr); ``"agreement"``: cos(g, r); ``"temporal"``: cos(g, g of the last
            step); a :class:`~lightning_gcsr.CoherenceMeasure` of your own; ``None``: always inject, which is plain
            strong regularization.
        scope: What one decision covers: ``"model"``, ``"parameter"`` (a tensor), ``"element"`` (a weight).
        threshold: The least coherence, in [−1, 1], at which the penalty is injected. ``None`` chooses 0.1 for
            ``"direction"`` and 0 for the others. At element scope, where coherence is a sign, it must be ``None``.
        tolerance: c in [0, 1], for ``"agreement"`` at element scope: a loss gradient that opposes the penalty at a
            weight by no more than the share c of it still counts as coherent: cos(g+c·λr, r). ``None`` chooses 0.1
            there where gradients are averaged, and 0 elsewhere. Where the optimizer rescales gradients (Adam) and the
            update is proximal, λ is not of their scale: with such an optimizer ``None`` is 0 for all of tolerance,
            averaging and warm-up.
        averaging: β in [0, 1): coherence is measured on a running average of the loss gradients that looks back over
            about 1/(1−β) steps, for ``"agreement"`` and ``"direction"``; costs one copy of the gradients. 0 is this
            step's gradient alone. ``None`` chooses 0.98 for ``"agreement"`` at element scope and 0 elsewhere.
        strength_scale: ``"uniform"``, or ``"fan_in"``: each tensor's strength is multiplied by its fan-in over the
            mean fan-in, because thin layers carry more per weight.
        update: ``"proximal"``: the proximal map of step size lr·λ after the optimizer's step, which gives exact zeros
            for L1 and group lasso. ``"gradient"``: ``g += λ·r`` before the optimizer sees the gradient. Under SGD
            λ means the same in both; under adaptive optimizers the proximal step is decoupled, as AdamW's decay is,
            and a useful strength is larger; so large that ``"direction"`` at model or parameter scope stays shut there.
        include: Regular expressions of the parameters to regularize, instead of all with two or more dimensions
            outside norm layers.
        exclude: Regular expressions of parameters to leave out.
        delay_steps: Optimizer steps without penalty at the start (delayed strong regularization). An integer is a
            number of steps; a float in [0, 1], here and below, is a share of ``trainer.estimated_stepping_batches``.
        warmup_steps: Optimizer steps after the delay over which the strength rises linearly. ``None`` chooses 0.3 where
            there is a tolerance, which needs it at strong strengths, and 0 elsewhere.
        stop_steps: The optimizer step from which on there is no penalty; ``None`` for never. With
            :class:`~lightning_gcsr.KeepZeros` the zeros stay.
        name: The prefix of the logged keys and part of the state's key. Several callbacks with distinct names work
            side by side, on different weights, or on the same ones with ``update="proximal"``.
        log_per_parameter: Whether coherence and injected share are logged for each parameter too.

    Raises:
        ValueError: If an argument breaks its rule.
        TypeError: If an argument has the wrong type.
        MisconfigurationException: Before the first step, if strategy, precision or optimizer are not supported, if two
            callbacks have one name, or if another callback injects into the gradients that this one measures.

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
        >>> regularization = GradientCoherentRegularization("l1", strength=0.1, update="proximal")
        >>> trainer = Trainer(max_epochs=2, callbacks=[regularization], barebones=True, accelerator="cpu")
        >>> trainer.fit(Regression(), torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8))
        >>> regularization.regularizer.state_dict()["steps"]
        {'layer.weight': 8}
    """

    def __init__(
        self,
        penalty: Union[Penalty, PenaltyName] = "l1",
        *,
        strength: Union[float, dict[str, float], None] = None,
        target_sparsity: Optional[float] = None,
        coherence: Union[CoherenceMeasure, MeasureName, None] = "agreement",
        scope: ScopeName = "element",
        threshold: Optional[float] = None,
        tolerance: Optional[float] = None,
        averaging: Optional[float] = None,
        strength_scale: StrengthScale = "uniform",
        update: UpdateName = "proximal",
        include: Optional[Sequence[str]] = None,
        exclude: Optional[Sequence[str]] = None,
        delay_steps: Union[int, float] = 0,
        warmup_steps: Union[int, float, None] = None,
        stop_steps: Union[int, float, None] = None,
        name: str = "gcsr",
        log_per_parameter: bool = False,
    ) -> None:
        super().__init__()
        self._arguments: dict[str, Any] = {
            "penalty": penalty,
            "strength": strength,
            "target_sparsity": target_sparsity,
            "coherence": coherence,
            "scope": scope,
            "threshold": threshold,
            "tolerance": tolerance,
            "averaging": averaging,
            "strength_scale": strength_scale,
            "update": update,
            "include": include,
            "exclude": exclude,
            "delay_steps": delay_steps,
            "warmup_steps": warmup_steps,
            "stop_steps": stop_steps,
            "name": name,
            "log_per_parameter": log_per_parameter,
        }
        if strength is None and target_sparsity is None:
            advice = "`find_strength` finds one; or give `target_sparsity`, the share of weights that shall be zero."
            raise argument_error("strength", None, "must be given", advice, TypeError)
        # What the study found best, where it has a meaning; see `Args`.
        self._left_open = [name for name in ("averaging", "tolerance", "warmup_steps") if self._arguments[name] is None]
        if averaging is None:
            averaging = 0.98 if coherence == "agreement" and scope == "element" else 0.0
        if tolerance is None:
            tolerance = 0.1 if coherence == "agreement" and scope == "element" and averaging != 0 else 0.0
        if warmup_steps is None:
            warmup_steps = 0.3 if tolerance != 0 and target_sparsity is None else 0
        chosen = {"averaging": averaging, "tolerance": tolerance, "warmup_steps": warmup_steps}
        own = ("target_sparsity", "name", "log_per_parameter")
        settings = {argument: value for argument, value in self._arguments.items() if argument not in own}
        self.settings = Settings(**settings | chosen | {"strength": 1.0 if strength is None else strength})
        if target_sparsity is not None:
            check_target_sparsity(target_sparsity, resolve_penalty(penalty), update)
            if strength is not None:
                advice = "Give one of the two: with a target the strength is found during training."
                raise argument_error("strength", strength, "must be None where target_sparsity is given", advice)
            if warmup_steps != 0:
                advice = "Leave it out: the wanted sparsity rises gradually by itself."
                raise argument_error("warmup_steps", warmup_steps, "must be 0 where target_sparsity is given", advice)
        # MLflow would strip other characters from the logged keys, and two names might become one.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise argument_error("name", name, "must consist of letters, digits and '_', '.' or '-'")
        self.name = name
        self.log_per_parameter = log_per_parameter
        self.target_sparsity = target_sparsity
        self.regularizer: Optional[CoherentRegularizer] = None
        """The regularizer at work, from the start of ``fit`` on; it stays readable afterwards."""
        self.controller: Optional[SparsityController] = None
        """What adapts the strength to ``target_sparsity``, from the start of training on."""
        self.injected_by_parameter: Optional[tuple[int, dict[str, float]]] = None
        """The last step that was logged, and for each parameter the share that got the penalty in it."""
        self._gate = Gate(coherence, scope, threshold, tolerance)
        self._stage = "fit"
        self._loaded_state: Optional[dict[str, Any]] = None
        self._handles: list[RemovableHandle] = []
        self._regularized_in_backward = False
        self._saw_backward = False
        self._saw_step = False
        self._reports: dict[int, GateReport] = {}
        self._warned: set[str] = set()

    def with_changes(self, **changes: Any) -> GradientCoherentRegularization:
        """A new callback with the arguments of this one but for the changes; it knows nothing of any training.

        Example:
            >>> stronger = GradientCoherentRegularization("l1", strength=0.01).with_changes(strength=0.1)
            >>> stronger.settings.strength
            0.1
        """
        return type(self)(**copy.deepcopy(self._arguments | changes))

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    # -- before the first step -------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage != "fit":
            return
        check_trainer(trainer, type(self).__name__)
        if trainer.global_step == 0:  # what is there is of an earlier fit, if Tuner brought it along or not
            self.regularizer = self.controller = self._loaded_state = (
                None  # that of a checkpoint to resume from comes after this hook
            )
        write_layout(trainer)
        namesakes = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
            if other.state_key == self.state_key
        ]
        if len(namesakes) > 1:
            raise MisconfigurationException(
                f"Every `{type(self).__name__}` must have a name of its own, got {len(namesakes)} with"
                f" name={self.name!r}. Give each another `name`."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now are the parameters there that `configure_model` makes, and the weights that a checkpoint brings.
        previous = self.regularizer
        settings = self._settings_for(trainer)
        if settings.has_shares:  # of a length that may be asked for in `on_train_start`
            settings = replace(settings, delay_steps=0, warmup_steps=0, stop_steps=None)
        self.regularizer = CoherentRegularizer(pl_module, **vars(settings))
        if self._loaded_state:
            self.regularizer.load_state_dict(self._loaded_state)
        elif previous is not None and trainer.global_step > 0:  # `fit` goes on where an earlier `fit` ended
            self.regularizer.load_state_dict(previous.state_dict())
        self._saw_backward = self._saw_step = self._regularized_in_backward = False
        self.injected_by_parameter = None
        self._reports.clear()
        self._warned.clear()
        self._check_neighbours(trainer, self.regularizer)
        self._check_optimizers(trainer, pl_module, self.regularizer)

    def _settings_for(self, trainer: Trainer) -> Settings:
        """The settings for this Trainer's optimizers.

        A tolerance compares λ with the gradient. Where the proximal step is decoupled from gradients that the optimizer
        rescales, a useful λ is so much larger that the gate would be open everywhere.
        """
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self.settings.update == "gradient" or all(is_sgd(group) for group in groups):
            return self.settings
        averaging = 0.0 if "averaging" in self._left_open else self.settings.averaging
        tolerance = 0.0 if "tolerance" in self._left_open else self.settings.tolerance
        warmup_steps = 0 if "warmup_steps" in self._left_open and tolerance == 0 else self.settings.warmup_steps
        return replace(self.settings, averaging=averaging, tolerance=tolerance, warmup_steps=warmup_steps)

    def _check_neighbours(self, trainer: Trainer, regularizer: CoherentRegularizer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self:
                return  # later ones look back at this one
            if not isinstance(other, GradientCoherentRegularization) or other.settings.update == "proximal":
                continue
            assert other.regularizer is not None
            if shared := [name for name in regularizer.parameters if name in other.regularizer.parameters]:
                raise MisconfigurationException(
                    f"{self.name!r} would measure gradients into which {other.name!r} has injected its penalty already,"
                    f" on {len(shared)} parameters, {shared[0]!r} first. Give {other.name!r} update='proximal', which"
                    " leaves gradients alone, or keep the parameters of the two apart with `include` and `exclude`."
                )

    def _check_optimizers(self, trainer: Trainer, pl_module: LightningModule, regularizer: CoherentRegularizer) -> None:
        stepped: set[str] = set()
        stepping = [optimizer for optimizer in trainer.optimizers if regularizer.stepped_by(optimizer)]
        if self.target_sparsity is not None and len(stepping) > 1:
            raise MisconfigurationException(
                f"{self.name}: target_sparsity={self.target_sparsity} needs one optimizer that steps all of the"
                f" weights, and {len(stepping)} do. Give each a callback of its own, with `include` and a `name`."
            )
        for optimizer in trainer.optimizers:
            try:
                check_optimizer(optimizer)
            except ValueError as error:
                raise MisconfigurationException(f"`{type(self).__name__}`: {error}") from error
            stepped.update(regularizer.stepped_by(optimizer))
            if decayed := regularizer.decayed_by(optimizer):
                rank_zero_warn(
                    f"The optimizer {type(optimizer).__name__} has a weight_decay of its own on {len(decayed)} of the"
                    f" parameters that {self.name!r} regularizes with {regularizer.penalty!r}, {decayed[0]!r} first."
                    " Both shrink the weights. Set weight_decay=0 unless that is what you want."
                )
        count = f"{len(stepped)} tensor{'s' * (len(stepped) != 1)}"
        weights = sum(regularizer.parameters[name].numel() for name in stepped)
        everything = sum(parameter.numel() for parameter in pl_module.parameters())
        if not stepped:
            rank_zero_warn(
                f"No optimizer holds a parameter that {self.name!r} regularizes, so nothing will be regularized."
                f" It regularizes {list(regularizer.parameters)[:3]}; see `include` and `exclude`."
            )
        aim = f"strength {regularizer.strength:g}"
        if self.target_sparsity is not None:
            aim = f"a strength that makes {100 * self.target_sparsity:g} % of the weights zero,"
        rank_zero_info(
            f"{self.name}: {regularizer.penalty!r} of {aim} on {weights:,} of {everything:,} parameters, in {count}."
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded_state = self._loaded_state, None
        settings = self._settings_for(trainer)
        assert self.regularizer is not None
        if settings.has_shares:
            # Asked for any earlier, Lightning would not restore the position of a stateful dataloader.
            shares = {name: getattr(settings, name) for name in ("delay_steps", "warmup_steps", "stop_steps")}
            named = [f"{name}={share}" for name, share in shares.items() if isinstance(share, float)]
            if "warmup_steps" in self._left_open:
                named = [f"{share}, the default," if "warmup" in share else share for share in named]
            total = total_steps(trainer, f"{self.name}: {' and '.join(named)}")
            self.regularizer.settings = settings.in_steps(total)
        if self.target_sparsity is not None:
            self._start_control(trainer, self.regularizer, (loaded or {}).get("controller"))
        self._remove_hooks()
        if self.settings.update == "proximal":
            for optimizer in trainer.optimizers:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _start_control(self, trainer: Trainer, regularizer: CoherentRegularizer, state: dict[str, Any] | None) -> None:
        assert self.target_sparsity is not None
        first = int(regularizer.settings.delay_steps)
        stop = regularizer.settings.stop_steps
        try:
            total = total_steps(trainer, f"{self.name}: the way to target_sparsity={self.target_sparsity}")
        except MisconfigurationException:
            if stop is None:
                raise
            total = int(stop)  # which is end enough
        last = max(first + 1, min(total, int(total if stop is None else stop)))
        if state is None and self.controller is not None:  # `fit` goes on where an earlier `fit` ended
            state = self.controller.state_dict()
        # A schedule may begin with a learning rate near 0; the strength it is begun with need not be right.
        path = {
            parameter: float(
                proximal_step_size({**group, "lr": max(group["lr"], group.get("initial_lr", 0.0))}, last - first)
            )
            for optimizer in trainer.optimizers
            for parameter, group in regularizer.groups_of(optimizer).items()
        }
        strength = dissolving_strength(regularizer.spans(), path)
        self.controller = SparsityController(self.target_sparsity, strength, first, last)
        if state is not None:
            self.controller.load_state_dict(state)

    # -- around each optimizer step --------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._regularized_in_backward = False

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saw_backward = True
        # By hand, a backward may be followed by a step or not, and nobody can tell: `on_before_optimizer_step` can.
        if pl_module.automatic_optimization and completes_step(trainer):
            optimizer = trainer.optimizers[0]
            self._before_step(trainer, optimizer, _loss_scale(trainer, pl_module.device))
            self._regularized_in_backward = True

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._saw_step = True
        if self._regularized_in_backward:
            self._regularized_in_backward = self._saw_backward = False
            return
        if pl_module.automatic_optimization:
            saw_backward, self._saw_backward = self._saw_backward, False
            if not saw_backward:
                # Gradients are those of an earlier step, if any; StochasticWeightAveraging ends with such a step.
                return
            if trainer.scaler is not None:
                # The closing micro-batch returned None; then Lightning neither unscales the gradients nor steps.
                return
        # Gradients are unscaled here, except for the fused optimizers that do it within their step.
        still_scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._before_step(trainer, optimizer, _loss_scale(trainer, pl_module.device) if still_scaled else 1.0)

    def _before_step(self, trainer: Trainer, optimizer: Optimizer, loss_scale: float | Tensor) -> None:
        assert self.regularizer is not None  # made in `on_fit_start`
        if self.controller is not None and self.regularizer.stepped_by(optimizer):
            step = self.regularizer.steps_of(optimizer)
            if self.controller.due(step):
                self.controller.adapt(step, self._sparsity(trainer))
            self.regularizer.strength = self.controller.strength
        # By hand, nobody knows which step is the last one before Lightning logs.
        wanted = logs_now(trainer) or not trainer.lightning_module.automatic_optimization
        report = self.regularizer.before_step(optimizer, loss_scale, report=wanted)
        if report is not None and report.names:
            self._reports[trainer.optimizers.index(optimizer)] = report

    def _sparsity(self, trainer: Trainer) -> float:
        """The share of exact zeros in the regularized weights that are trained. Synchronizes with the host.

        Weights that are frozen, or that no optimizer holds, never become zero: to count them would ask for more zeros
        of the others.
        """
        assert self.regularizer is not None
        stepped = {name for optimizer in trainer.optimizers for name in self.regularizer.stepped_by(optimizer)}
        every = self.regularizer.parameters.items()
        parameters = [parameter for name, parameter in every if name in stepped and parameter.requires_grad]
        if not parameters:
            return 0.0
        zeros = torch.stack([counts[0].to(parameters[0].device) for counts in zero_counts(parameters)]).sum()
        return float(zeros) / sum(parameter.numel() for parameter in parameters)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self.regularizer is not None
        self.regularizer.after_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # By hand, a batch may pass without a step: then the last one made is logged, once, when Lightning logs next.
        due = logs_now(trainer) and completes_step(trainer)
        if self._reports and due:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            metrics, shares = self._metrics(trainer)
            self.injected_by_parameter = step, shares
            log_metrics(trainer, metrics, step)
            self._warn_of_trouble(trainer, step)
        if due or pl_module.automatic_optimization:
            self._reports.clear()

    def _metrics(self, trainer: Trainer) -> tuple[dict[str, float], dict[str, float]]:
        """The numbers of the last step and the injected shares by parameter, with one transfer from the device."""
        assert self.regularizer is not None
        regularized = [optimizer for optimizer in trainer.optimizers if self.regularizer.stepped_by(optimizer)]
        numbers: dict[str, Tensor] = {}
        reports = {index: report.reduced() for index, report in self._reports.items()}
        for index, report in reports.items():
            prefix = self.name if len(regularized) == 1 else f"{self.name}/optimizer_{index}"
            if self.settings.coherence is not None:
                numbers[f"{prefix}/coherence"] = report.coherence
            numbers[f"{prefix}/injected"] = report.injected
            numbers[f"{prefix}/strength"] = report.strength
            numbers[f"{prefix}/grad_norm"] = report.grad_norm
            numbers[f"{prefix}/penalty_grad_norm"] = report.penalty_grad_norm
            if self.log_per_parameter:
                for i, parameter in enumerate(report.names):
                    if self.settings.coherence is not None:
                        numbers[f"{self.name}/coherence/{parameter}"] = report.coherence_by_parameter[i]
                    numbers[f"{self.name}/injected/{parameter}"] = report.injected_by_parameter[i]
        numbers[f"{self.name}/penalty"] = self.regularizer.penalty_value()
        numbers[f"{self.name}/nonfinite_steps"] = self.regularizer.nonfinite_steps
        wanted = next(iter(numbers.values()))
        shares = [report.injected_by_parameter.to(wanted) for report in reports.values()]
        values = torch.cat([torch.stack([number.to(wanted) for number in numbers.values()]), *shares]).tolist()
        names = [name for report in reports.values() for name in report.names]
        shares_by_name = dict(zip(names, values[len(numbers) :], strict=True))
        return dict(zip(numbers, values[: len(numbers)], strict=True)) | self._threshold(), shares_by_name

    def _threshold(self) -> dict[str, float]:
        """Logged at each step, so that a chart can show the coherence against it."""
        return {f"{self.name}/threshold": self._gate.threshold} if self._gate.needs_sums else {}

    def hyperparameters(self, trainer: Trainer) -> dict[str, Any]:
        """The settings at work, for loggers."""
        settings = vars(self._settings_for(trainer)) | {"target_sparsity": self.target_sparsity}
        settings["strength"] = self._arguments["strength"]  # None where there is a target
        plain = (bool, int, float, str)
        return {
            f"{self.name}/{name}": value if isinstance(value, plain) else repr(value)
            for name, value in settings.items()
            if value is not None
        }

    def compared_metrics(self) -> list[str]:
        """The keys by which runs are compared."""
        return [f"{self.name}/{key}" for key in ("injected", "strength", "penalty")]

    def tensorboard_charts(self) -> Charts:
        """The keys that belong together, for TensorBoard's Custom Scalars."""
        name, optimizer = re.escape(self.name), "(optimizer_[0-9]+/)?"
        gate = {f"{self.name}: share of weights that got the penalty": [f"{name}/{optimizer}injected"]}
        if self.settings.coherence is not None:
            about = {
                "model": "and its threshold",
                "parameter": "over all weights, and the threshold of each tensor",
                "element": "over all weights, each of which has its own gate",
            }
            title = f"{self.name}: coherence {about[self.settings.scope]}"
            gate[title] = [f"{name}/{optimizer}coherence", *[re.escape(key) for key in self._threshold()]]
        charts = {
            "gate": gate,
            "strength": {
                f"{self.name}: strength": [f"{name}/{optimizer}strength"],
                f"{self.name}: norms of the two gradients": [
                    f"{name}/{optimizer}grad_norm",
                    f"{name}/{optimizer}penalty_grad_norm",
                ],
                f"{self.name}: penalty": [f"{name}/penalty"],
            },
        }
        if self.log_per_parameter:
            charts["layers"] = {f"{self.name}: share that got the penalty, by layer": [f"{name}/injected/.+"]}
        return charts

    # -- warnings --------------------------------------------------------------------------------------------------

    def _warn_of_trouble(self, trainer: Trainer, step: int) -> None:
        assert self.regularizer is not None
        collapsed = self.regularizer.collapsed()
        if news := {name: norms for name, norms in collapsed.items() if name not in self._warned}:
            self._warned.update(news)
            (first, (norm, initial)), *others = news.items()
            rank_zero_warn(
                f"{self.name}: at step {step} the weights of {first!r} are as good as dead: their norm fell from"
                f" {initial:.3g} to {norm:.3g}"
                + (f"; likewise {', '.join(repr(name) for name, _ in others)}" if others else "")
                + f". That makes {len(collapsed)} of {len(self.regularizer.parameters)} tensors."
                + (
                    " Use a smaller target_sparsity"
                    if self.controller
                    else f" Use a smaller strength than {self.regularizer.strength:g}"
                )
                + (", or coherence='agreement'." if self.settings.coherence is None else ".")
            )
        # A GradScaler finds its scale by overflowing now and then, which is nothing to be alarmed at.
        if trainer.scaler is None and (nonfinite := int(self.regularizer.nonfinite_steps)) > 0:
            self._warn_once(
                "non-finite",
                f"{self.name}: until step {step} the loss gradient was not finite in {nonfinite} step(s); nothing was"
                f" injected there. The count is logged as {self.name}/nonfinite_steps.",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        manual = not pl_module.automatic_optimization
        if manual and not self._saw_step and trainer.fit_loop.epoch_loop.batch_progress.current.completed > 0:
            self._warn_once(
                "no step",
                f"{self.name}: an epoch passed without an optimizer step that Lightning knows of, so nothing was"
                " regularized. With manual optimization, step the optimizers that `self.optimizers()` returns and use"
                " `self.manual_backward(loss)`.",
            )

    # -- the end, however it comes ---------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        if self._saw_step:
            self._warn_of_trouble(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        if self.controller is not None and self._saw_step:
            self._warn_of_missed_target(trainer)

    def _warn_of_missed_target(self, trainer: Trainer) -> None:
        assert self.controller is not None
        sparsity, target = self._sparsity(trainer), self.controller.target
        if trainer.should_stop or abs(sparsity - target) <= 0.01:  # who stops early has not asked to arrive
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's `_init_debugging_flags`
            return
        why = "Train for longer, or keep the learning rate up until 70 % of the training."
        if self.controller.at_its_end and sparsity > target:
            why = f"The strength may not fall below {self.controller.strength:.3g}: zeros stay zero there."
        elif self.controller.at_its_end:
            why = (
                f"The strength may not go further than {self.controller.strength:.3g}: no weight gives way there. See"
                f" whether the learning rate is still up, and {self.name}/injected above 0."
            )
        elif self.settings.stop_steps is not None and sparsity < target:
            why += " After stop_steps, zeros stay zero only where `KeepZeros` keeps them."
        rank_zero_warn(
            f"{self.name}: {100 * sparsity:.1f} % of the weights are zero at the end, and target_sparsity={target}"
            f" asked for {100 * target:g} %. {why}"
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
        state = self.regularizer.state_dict() if self.regularizer is not None else {}
        return state if self.controller is None else state | {"controller": self.controller.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":  # Lightning hands over the state of a checkpoint that is validated or tested, too
            return
        # Most strategies restore before `on_fit_start`, which makes the regularizer, and sharded ones after it.
        self._loaded_state = state_dict
        if self.regularizer is not None and state_dict:
            self.regularizer.load_state_dict(state_dict)


def _loss_scale(trainer: Trainer, device: torch.device) -> float | Tensor:
    """What gradients are multiplied by after a backward, without asking the device for it."""
    scaler = trainer.scaler
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))
