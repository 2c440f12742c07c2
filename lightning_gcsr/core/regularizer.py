"""The regularizer: one optimizer step as measure, gate, and inject or shrink. Plain torch, no Trainer needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Optional, Union, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gcsr.core.coherence import GradientStatistics
from lightning_gcsr.core.coupled_selection import select_for
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.numerics import on_device
from lightning_gcsr.core.optimizers import check_optimizer, stepped_parameters
from lightning_gcsr.core.parameter_selection import parameter_aliases
from lightning_gcsr.core.penalties import L2, ElasticNet, Penalty, PenaltyName, resolve_penalty
from lightning_gcsr.core.pull import Pull
from lightning_gcsr.core.regularized_weights import RegularizedWeights
from lightning_gcsr.core.schedule import Clock, Schedule
from lightning_gcsr.core.settings import UpdateName, check_aim, check_layers, check_rule, default_schedule
from lightning_gcsr.core.sharded_state import gather_state, spread_state
from lightning_gcsr.core.sharding import is_sharded
from lightning_gcsr.core.sparsity_controller import SparsityController, check_only_optimizer
from lightning_gcsr.core.step_plan import StepPlan
from lightning_gcsr.core.step_plans import StepPlans
from lightning_gcsr.core.strengths import StrengthScale, assign_strengths
from lightning_gcsr.core.weight_counts import counts_after_step
from lightning_gcsr.validation import call_repr

__all__ = ["CoherentRegularizer"]


class CoherentRegularizer(RegularizedWeights):
    r"""Strong regularization that is applied only where the gradients stay coherent in its presence.

    With λ the strength, g the gradient of the loss and r the (sub)gradient of the penalty, each optimizer step measures
    the coherence (see :class:`~lightning_gcsr.Gate`) and acts where the gate is open:

    ==================== ========================================================================================
    ``update``           where the gate is open
    ==================== ========================================================================================
    ``"proximal"``       after the optimizer's step w ← prox(w) with the step size lr·λ·κ: exact zeros for L1 and
                         group lasso
    ``"dual_averaging"`` the optimizer trains dense latent weights z, the network computes with w = prox(z, T), and
                         the threshold T of a weight grows by lr·λ·κ: exact zeros, from which a weight can come back.
                         It takes the memory of two copies of the weights
    ``"gradient"``       g ← g + λ·r before the optimizer sees the gradient
    ==================== ========================================================================================

    Under every optimizer, λ is the factor of the penalty in *loss + λ · penalty*. κ is the distance by which a steady
    gradient of size 1 moves a weight, per unit of the learning rate: (1 − dampening)/(1 − momentum) under SGD, and one
    over the running root mean square of the tensor's gradient under optimizers that rescale gradients, such as Adam.

    The rule is this project's reading of the abstract of *Gradient-coherent strong regularization*
    (arXiv:1811.08056). Use this class in a training loop of your own; with a Lightning ``Trainer`` use
    :class:`~lightning_gcsr.GradientCoherentRegularization`, which takes the same arguments.

    Without a target, a step never synchronizes with the host. It communicates with other processes only if parameters
    are sharded (``DTensor`` of FSDP2 or tensor parallelism): once, and twice if averages decide at tensor or model
    scope. Under data parallelism call it on the reduced gradients, which are the same on every process.

    Args:
        module: The module whose parameters are regularized.
        penalty: ``"l1"``, ``"l2"``, ``"elastic_net"``, ``"group_lasso"``, or a :class:`~lightning_gcsr.Penalty`.
        strength: λ ≥ 0, the factor of the penalty in the loss; or a mapping from regular expressions on parameter
            names to strengths, first match wins, and parameters that none matches are not regularized.
        target_sparsity: Instead of a strength, the sparsity at the end, in (0, 1). A
            :class:`~lightning_gcsr.SparsityController` chooses how fast the thresholds of ``"dual_averaging"`` grow;
            the schedule then needs the progress of the training, and one optimizer must step all weights. Every fourth
            step synchronizes with the host.
        gate: The rule for applying the penalty; ``None`` for plain strong regularization.
        schedule: When the penalty acts.
        update: How the penalty acts where the gate is open; see the table.
        strength_scale: ``"uniform"``, or ``"fan_in"``: each tensor's strength is multiplied by its fan-in over the
            mean fan-in, because each weight of a thin layer matters more.
        include: Regular expressions of the parameters to regularize, instead of the default selection.
        exclude: Regular expressions of parameters to leave out.

    Raises:
        ValueError: If an argument breaks its rule, a pattern matches nothing, or nothing is left to regularize.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> regularizer = CoherentRegularizer(model, "l1", strength=0.05, schedule=Schedule(warmup=0))
        >>> model(torch.ones(4, 2)).square().mean().backward()
        >>> report = regularizer.before_step(optimizer)
        >>> optimizer.step()
        >>> regularizer.after_step(optimizer)
        >>> report.names, report.strength
        (('weight',), tensor(0.0500, dtype=torch.float64))
    """

    def __init__(
        self,
        module: nn.Module,
        penalty: Union[Penalty, PenaltyName] = "l1",
        *,
        strength: Union[float, Mapping[str, float], None] = None,
        target_sparsity: Optional[float] = None,
        gate: Optional[Gate] = Gate(),  # noqa: B008  # immutable
        schedule: Schedule = Schedule(),  # noqa: B008
        update: UpdateName = "dual_averaging",
        strength_scale: StrengthScale = "uniform",
        include: Union[Sequence[str], None] = None,
        exclude: Union[Sequence[str], None] = None,
    ) -> None:
        self._call = call_repr(type(self).__name__, CoherentRegularizer, locals())
        check_rule(gate, schedule, update)
        penalty = resolve_penalty(penalty)
        check_aim(
            penalty,
            strength=strength,
            target_sparsity=target_sparsity,
            gate=gate,
            update=update,
            schedule=schedule,
            strength_scale=strength_scale,
        )
        self.gate, self.update = gate, update
        self.controller = None if target_sparsity is None else SparsityController(target_sparsity)
        """What chooses how fast the thresholds grow, where there is a target sparsity."""
        self.schedule = default_schedule(gate, schedule if self.controller is None else schedule.with_default_warmup(0))
        strength = 1.0 if strength is None else strength
        self._module, self._selection = module, (include, exclude)
        penalty, selected = select_for(penalty, module, include, exclude)
        aliases = parameter_aliases(module)
        strengths = assign_strengths(selected, strength, strength_scale, aliases)
        self.strength: float = max(assign_strengths(selected, strength, aliases=aliases).values())
        """The strength; the largest one where a mapping gives several. Before schedule and scaling."""
        relative = {name: value / self.strength if self.strength else 1.0 for name, value in strengths.items()}
        super().__init__({name: selected[name] for name in strengths}, penalty, relative)
        check_layers(module, self.parameters, penalty, update)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._steps: dict[str, int] = {}
        self._began: Optional[Clock] = None
        self._nonfinite_steps: Tensor | int = 0
        self._plans = StepPlans(self.penalty, gate, update)
        self._pending: dict[str, tuple[StepPlan, float]] = {}

    # -- around each optimizer step ----------------------------------------------------------------------------------

    @overload
    def before_step(
        self, optimizer: Optimizer, loss_scale: float | Tensor = 1.0, *, clock: Optional[Clock] = None
    ) -> GateReport: ...

    @overload
    def before_step(
        self, optimizer: Optimizer, loss_scale: float | Tensor = 1.0, *, clock: Optional[Clock] = None, report: bool
    ) -> GateReport | None: ...

    @torch.no_grad()
    def before_step(
        self,
        optimizer: Optimizer,
        loss_scale: float | Tensor = 1.0,
        *,
        clock: Optional[Clock] = None,
        report: bool = True,
    ) -> GateReport | None:
        """Measure, decide, and with ``update="gradient"`` inject. Call it once, right before ``optimizer.step()``.

        With ``update="dual_averaging"`` the parameters hold the latent weights from here to :meth:`after_step`.

        Args:
            optimizer: The optimizer about to step. Only its parameters with a gradient take part.
            loss_scale: The factor in the gradients (a ``GradScaler``'s scale before ``unscale_``), a float or a 0-dim
                tensor.
            clock: The progress of the training. By default the number of steps of this optimizer so far, without a
                fraction; then the schedule may not have fractions either.
            report: Whether to return a report. A step without a report does the same and is cheaper.

        Returns:
            The measurements and decisions, without parameters if no regularized parameter has a gradient. ``None`` with
            ``report=False``.

        Raises:
            ValueError: If the optimizer is not supported, if with a target another one has stepped other weights, if
                the schedule has a fraction and the clock no progress, if ``"temporal"`` meets a sparse gradient, whose
                rows change from step to step, or a gradient is sparse in more than its rows.
        """
        check_optimizer(optimizer, self.update, has_target=self.controller is not None)
        key = self._key(optimizer)
        self._adopt(key)
        if self.controller is not None and (others := [other for other in self._steps if other != key]):
            check_only_optimizer(self.controller.target, others, self.stepped_by(optimizer))
        clock = clock or Clock(self._steps.get(key, 0))
        # What needs the progress comes first: a step that is refused leaves everything as it was.
        acts = self.schedule.acts(clock)
        began = clock if acts and self._began is None else self._began
        phase = self.schedule.phase(clock, began) if acts and self.controller is not None else 0.0
        self._began = began
        self._steps[key] = self._steps.get(key, 0) + 1
        self._pending.pop(key, None)
        plan = self._plans.of(optimizer, self._names, self._relative)
        pull = self._pull(clock, acts, plan)
        if plan is None:
            return self._empty_report(pull.strength) if report else None
        result, finite = plan.before(pull, loss_scale, report)
        if self.update != "gradient":
            self._pending[key] = plan, phase
        if isinstance(self._nonfinite_steps, Tensor):  # optimizers may step weights of different devices
            finite = on_device(finite, self._nonfinite_steps.device)
        self._nonfinite_steps = self._nonfinite_steps + (finite == 0)
        return result

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *, skipped: bool = False) -> None:
        """Shrink the weights where the gate was open. Call it right after ``optimizer.step()``.

        With ``update="gradient"`` there is nothing to do. Where a ``GradScaler`` made a fused optimizer skip the step
        because of an infinite gradient, nothing is shrunk.

        Args:
            optimizer: The optimizer that has stepped.
            skipped: Whether it did not step after :meth:`before_step`, as where a ``GradScaler`` skipped the step.
                Then weights, latent weights and thresholds are as they were before.
        """
        plan, phase = self._pending.pop(self._key(optimizer), (None, 0.0))
        if plan is None:
            return
        plan.after(skipped, getattr(optimizer, "found_inf", None))
        if self.controller is not None and plan.grows and not skipped and self.controller.due(phase):
            self.controller.adapt(phase, partial(counts_after_step, plan))

    def _pull(self, clock: Clock, acts: bool, plan: StepPlan | None) -> Pull:
        """How hard the penalty pulls in this step."""
        if self.controller is None:
            return Pull(self.strength * self.schedule.factor(clock, self._began))
        if not acts or plan is None:
            return Pull(0.0)
        growth, moves_zeros, rate = self.controller.growth, self.controller.moves_zeros, plan.learning_rate
        self.strength = growth / rate if rate > 0 and not moves_zeros else 0.0  # the λ of which a step would go as far
        return Pull(self.strength, growth, moves_zeros, self.controller.tolerance)

    def _empty_report(self, strength: float) -> GateReport:
        nothing = torch.zeros(0, dtype=torch.float64)
        sums = GradientStatistics(*[nothing] * len(GradientStatistics._fields))
        return GateReport((), (), sums, nothing, strength, self.gate is not None)

    def acts_in_full(self, clock: Clock) -> bool:
        """Whether the penalty has its full strength at this moment: delay and warm-up are over, the stop is to come."""
        return self.schedule.factor(clock, self._began) == 1.0

    # -- what is known of the optimizers -------------------------------------------------------------------------------

    def stepped_by(self, optimizer: Optimizer) -> list[str]:
        """The names of the regularized parameters that this optimizer steps, in its order."""
        return [name for name, _, _ in stepped_parameters(optimizer, self._names)]

    def decayed_by(self, optimizer: Optimizer) -> list[str]:
        """The names of those on which an L2 penalty comes on top of the optimizer's own ``weight_decay``."""
        if not (isinstance(self.penalty, L2) or (isinstance(self.penalty, ElasticNet) and self.penalty.l1_ratio < 1)):
            return []
        return [name for name, _, group in stepped_parameters(optimizer, self._names) if group.get("weight_decay", 0)]

    def step_sizes(self, optimizer: Optimizer) -> dict[str, float]:
        """lr·κ by name: what the strength is multiplied by in a proximal step. Synchronizes with the host.

        0 where it is not known yet, as before the first step under an optimizer that rescales gradients.
        """
        return {name: self._plans.step_size(name) for name in self.stepped_by(optimizer)}

    @property
    def unaveraged(self) -> set[str]:
        """The parameters with sparse gradients, which the gate measures without averaging."""
        return self._plans.unaveraged

    def refresh(self) -> list[str]:
        """Find the regularized parameters in the module again; the names of those that another Parameter has replaced.

        What is known of a replaced parameter stays, unless its shape has changed.
        """
        _, selected = select_for(self.penalty, self._module, *self._selection)
        replaced = [n for n, parameter in self.parameters.items() if n in selected and selected[n] is not parameter]
        if replaced:
            state = self._plans.state_dict()
            changed = {name for name in replaced if selected[name].shape != self.parameters[name].shape}
            self.parameters |= {name: selected[name] for name in replaced}
            self._names = {id(parameter): name for name, parameter in self.parameters.items()}
            self._pending.clear()
            kept = {name: parameter for name, parameter in self.parameters.items() if name not in changed}
            self._plans.load_state_dict(spread_state(state, kept))
        return replaced

    def _key(self, optimizer: Optimizer) -> str:
        """What an optimizer is known by: its first regularized parameter.

        The name holds after a resume, and is the same for an optimizer and for what Lightning or Fabric wraps around
        it. Steps are counted for each optimizer apart, since in a GAN they may step unequally often.
        """
        return next((name for name, _, _ in stepped_parameters(optimizer, self._names)), "")

    def _adopt(self, key: str) -> None:
        """Count on where the state that was loaded knows the optimizer by a parameter that is now left out."""
        left_out = [known for known in self._steps if known and known not in self.parameters]
        if key and left_out:
            counts = [self._steps.pop(known) for known in left_out]
            if len(counts) == 1 and key not in self._steps:
                self._steps[key] = counts[0]

    @property
    def nonfinite_steps(self) -> Tensor:
        """The number of steps so far in which the loss gradient was not finite, a 0-dim integer tensor."""
        return torch.as_tensor(self._nonfinite_steps)

    # -- state ---------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: of the plans only what they know of the weights, without optimizers and gradients."""
        state = {key: value for key, value in vars(self).items() if key not in {"_names", "_pending"}}
        return state | {"_plans": (self._plans.state_dict(), set(self.unaveraged))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied or unpickled together with its module, it regularizes the copy."""
        self.__dict__.update(state)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._pending = {}
        self._plans = StepPlans(self.penalty, self.gate, self.update)
        known, self._plans.unaveraged = state["_plans"]
        self._plans.load_state_dict(known)

    def state_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """What a resumed run needs to decide as the uninterrupted one: numbers and tensors, loadable weights-only.

        The last gradient of ``"temporal"`` is not in it: the first step after a resume has no predecessor.

        Args:
            whole: Whether averages, latent weights and thresholds of sharded parameters are gathered, on the CPU; then
                all processes must call this. Otherwise they are ``DTensor``s, as ``module.state_dict()`` has them.
        """
        known = self._plans.state_dict()
        return {
            "steps": dict(self._steps),
            "began": None if self._began is None else list(self._began),
            "nonfinite_steps": int(self.nonfinite_steps),
            "initial_norms": dict(self._initial_norms),
            **({} if self.controller is None else {"controller": self.controller.state_dict()}),
            **(gather_state(known) if whole else known),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. Settings are not part of it: a changed strength takes effect.

        Where parameters are sharded, all processes must call this. The state may come from any number of processes.
        """
        self._steps = dict(state["steps"])
        self._began = None if state.get("began") is None else Clock(*state["began"])
        self._nonfinite_steps = state["nonfinite_steps"]
        self._initial_norms |= state["initial_norms"]
        if self.controller is not None and "controller" in state:
            self.controller.load_state_dict(state["controller"])
        self._pending.clear()
        self._plans.load_state_dict(spread_state(state, self.parameters))

    @property
    def forgotten(self) -> list[str]:
        """The sharded parameters of which nothing is known, though averages or latent weights were kept of them."""
        averages = self.gate is not None and bool(self.gate.averaging)
        kept = averages or (self.update == "dual_averaging" and self._began is not None)
        sharded = [name for name, parameter in self.parameters.items() if is_sharded(parameter)]
        known = {name for values in self._plans.state_dict().values() for name in values}
        return sharded if kept and any(self._steps.values()) and known.isdisjoint(sharded) else []
