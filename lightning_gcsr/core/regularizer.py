"""The regularizer: one optimizer step as measure, gate, and inject or shrink. Plain torch, no Trainer needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Optional, Union, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gcsr.core.coherence import GradientStatistics
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.numerics import inner
from lightning_gcsr.core.optimizers import check_optimizer, stepped_parameters
from lightning_gcsr.core.parameter_selection import parameter_aliases, select_parameters
from lightning_gcsr.core.penalties import L2, ElasticNet, Penalty, PenaltyName, resolve_penalty
from lightning_gcsr.core.schedule import Clock, Schedule
from lightning_gcsr.core.sharding import local_part, sharded_dims, sum_over_weights
from lightning_gcsr.core.sparsity_controller import SparsityController, check_target_sparsity
from lightning_gcsr.core.step_plan import Pull, StepPlan
from lightning_gcsr.core.step_plans import StepPlans
from lightning_gcsr.core.strengths import StrengthScale, assign_strengths
from lightning_gcsr.validation import argument_error, check_choice

__all__ = ["CoherentRegularizer", "UpdateName", "check_rule", "default_schedule"]

UpdateName = Literal["gradient", "proximal", "dual_averaging"]


def default_schedule(gate: Optional[Gate], schedule: Schedule) -> Schedule:
    """The schedule with a warm-up of 0.3 where none was given and the gate has a tolerance, else with none.

    Example:
        >>> default_schedule(Gate(), Schedule()), default_schedule(None, Schedule())
        (Schedule(warmup=0.3), Schedule(warmup=0))
    """
    return schedule.with_default_warmup(0.3 if gate is not None and gate.tolerance else 0)


class CoherentRegularizer:
    r"""Strong regularization that is imposed only where the gradients stay coherent in its presence.

    With λ the strength, g the gradient of the loss and r the (sub)gradient of the penalty, each optimizer step measures
    the coherence (see :class:`~lightning_gcsr.Gate`) and acts where the gate is open:

    =================== =========================================================================================
    ``update``          where the gate is open
    =================== =========================================================================================
    ``"proximal"``      after the optimizer's step w ← prox(w) with the step size lr·λ·κ: exact zeros for L1 and
                        group lasso
    ``"dual_averaging"`` the optimizer trains dense latent weights z, the network computes with w = prox(z, T), and the
                        threshold T of a weight grows by lr·λ·κ: exact zeros, from which a weight can come back. It
                        takes the memory of two copies of the weights
    ``"gradient"``      g ← g + λ·r before the optimizer sees the gradient
    =================== =========================================================================================

    λ is the factor that would stand before the penalty in the loss, under every optimizer: κ is what a steady gradient
    of size 1 moves a weight by, per unit of the learning rate. That is (1 − dampening)/(1 − momentum) under SGD, and
    one over the running root mean square of the tensor's gradient under optimizers that rescale gradients, such as
    Adam.

    The rule is this project's reading of the abstract of *Gradient-coherent strong regularization*
    (arXiv:1811.08056). Use it around the step of a hand-written loop; with a Lightning ``Trainer`` use
    :class:`~lightning_gcsr.GradientCoherentRegularization`, which takes the same arguments.

    A step never synchronizes with the host. It talks to other processes only where parameters are sharded (``DTensor``
    of FSDP2 or tensor parallelism), once, and twice where averages decide at tensor or model scope. Under data
    parallelism call it on the reduced gradients, which are the same on every process.

    Args:
        module: The module whose parameters are regularized.
        penalty: ``"l1"``, ``"l2"``, ``"elastic_net"``, ``"group_lasso"``, or a :class:`~lightning_gcsr.Penalty`.
        strength: λ ≥ 0, the factor of the penalty in the loss; or a mapping from regular expressions on parameter
            names to strengths, first match wins, and parameters that none matches are not regularized.
        target_sparsity: Instead of a strength, the fraction of the weights that shall be zero at the end, in (0, 1). A
            :class:`~lightning_gcsr.SparsityController` chooses how fast the thresholds of ``"dual_averaging"`` grow;
            the schedule needs the progress of the training then. Every fourth step synchronizes with the host.
        gate: The rule by which the penalty is imposed; ``None`` for plain strong regularization.
        schedule: When the penalty acts.
        update: How the penalty acts where the gate is open; see the table.
        strength_scale: ``"uniform"``, or ``"fan_in"``: each tensor's strength is multiplied by its fan-in over the
            mean fan-in, because thin layers carry more per weight.
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
        check_rule(gate, schedule, update)
        self.penalty = resolve_penalty(penalty)
        check_aim(strength, target_sparsity, self.penalty, update, schedule)
        self.gate, self.update = gate, update
        self.controller = None if target_sparsity is None else SparsityController(target_sparsity)
        """What chooses how fast the thresholds grow, where there is a target sparsity."""
        self.schedule = default_schedule(gate, schedule if self.controller is None else replace(schedule, warmup=0))
        strength = 1.0 if strength is None else strength
        self._module = module
        self._selection = (include, exclude)
        selected = select_parameters(module, include, exclude)
        aliases = parameter_aliases(module)
        strengths = assign_strengths(selected, strength, strength_scale, aliases)
        self.parameters: dict[str, nn.Parameter] = {name: selected[name] for name in strengths}
        """The regularized parameters by name."""
        self.strength: float = max(assign_strengths(selected, strength, aliases=aliases).values())
        """The strength; the largest one where a mapping gives several. Before schedule and scaling."""
        # Measured and injected is λ·relative·r with one λ, so that a ramp or a strength of 0 leaves cos(g, r) alone.
        self._relative = {name: value / self.strength if self.strength else 1.0 for name, value in strengths.items()}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._check_parameters()
        self._initial_norms = self.weight_norms()
        self._steps: dict[str, int] = {}
        self._began: Optional[Clock] = None
        self._nonfinite_steps: Tensor | int = 0
        self._plans = StepPlans(self.penalty, gate, update)
        self._pending: dict[int, tuple[StepPlan, float]] = {}

    def _check_parameters(self) -> None:
        if self.penalty.elementwise:  # which fits every shape, however it is sharded
            return
        for name, parameter in self.parameters.items():
            self.penalty.value(local_part(parameter.detach()))  # a penalty that does not fit the shape says so
            if cut_ := [dim for dim in sharded_dims(parameter) if not self.penalty.splits_along(dim, parameter.dim())]:
                raise ValueError(
                    f"{self.penalty!r} does not fit {name!r}, which is sharded along dimension {cut_[0]}: what belongs"
                    " together lies on several processes. Shard along another dimension, use another penalty, or"
                    " `exclude` it."
                )

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
            loss_scale: What the gradients are multiplied by at this moment (a ``GradScaler``'s scale before
                ``unscale_``), a float or a 0-dim tensor.
            clock: How far the training is. By default the number of steps of this optimizer so far, with no
                progress: then the schedule may not have fractions.
            report: Whether a report is wanted. Not all that is reported is needed for the decision, so a step is
                cheaper without; what it does is the same.

        Returns:
            What was measured and decided; it names no parameters where none that is regularized has a gradient.
            ``None`` with ``report=False``.

        Raises:
            ValueError: If the optimizer is not supported, if the schedule has a fraction and the clock no progress, if
                ``"temporal"`` meets a sparse gradient, whose rows change from step to step, or a gradient is sparse
                in more than its rows.
        """
        check_optimizer(optimizer)
        key = self._key(optimizer)
        clock = clock or Clock(self._steps.get(key, 0))
        self._steps[key] = self._steps.get(key, 0) + 1
        acts = self.schedule.acts(clock)
        if acts and self._began is None:
            self._began = clock
        self._pending.pop(id(optimizer), None)
        plan = self._plans.of(optimizer, self._names, self._relative)
        pull = self._pull(clock, acts, plan)
        if plan is None:
            return self._empty_report(pull.strength) if report else None
        result, finite = plan.before(pull, loss_scale, report)
        if self.update != "gradient":
            phase = 0.0 if pull.growth is None else self.schedule.phase(clock, self._began)
            self._pending[id(optimizer)] = plan, phase
        skips = 1 - finite if isinstance(finite, bool) else (~finite).long()
        self._nonfinite_steps = self._nonfinite_steps + skips
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
        plan, phase = self._pending.pop(id(optimizer), (None, 0.0))
        if plan is None:
            return
        plan.after(skipped, getattr(optimizer, "found_inf", None))
        if self.controller is not None and plan.grows and not skipped and self.controller.due(phase):
            self.controller.adapt(phase, plan.count)

    def _pull(self, clock: Clock, acts: bool, plan: StepPlan | None) -> Pull:
        """How hard the penalty pulls in this step."""
        if self.controller is None:
            return Pull(self.strength * self.schedule.factor(clock, self._began))
        if not acts or plan is None:
            return Pull(0.0)
        growth, rate = self.controller.growth, plan.learning_rate
        self.strength = max(0.0, growth) / rate if rate > 0 else 0.0  # the λ of which a step would go as far
        return Pull(self.strength, growth, self.controller.tolerance)

    def _empty_report(self, strength: float) -> GateReport:
        nothing = torch.zeros(0, dtype=torch.float64)
        sums = GradientStatistics(*[nothing] * len(GradientStatistics._fields))
        return GateReport((), (), sums, nothing, strength, self.gate is not None)

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
        selected = select_parameters(self._module, *self._selection)
        replaced = [n for n, parameter in self.parameters.items() if n in selected and selected[n] is not parameter]
        if replaced:
            state = self._plans.state_dict(sharded=True)
            kept = {
                n for n in replaced if selected[n].shape == self.parameters[n].shape
            } | self.parameters.keys() - replaced
            self.parameters |= {name: selected[name] for name in replaced}
            self._names = {id(parameter): name for name, parameter in self.parameters.items()}
            self._pending.clear()
            self._plans.load_state_dict(
                {what: {n: value for n, value in values.items() if n in kept} for what, values in state.items()}
            )
        return replaced

    def _key(self, optimizer: Optimizer) -> str:
        """What an optimizer is known by: its first regularized parameter. The name holds after a resume.

        Steps are counted for each optimizer apart, since in a GAN they may step unequally often.
        """
        return next((name for name, _, _ in stepped_parameters(optimizer, self._names)), "")

    # -- what is measured of the weights -------------------------------------------------------------------------------

    @property
    def nonfinite_steps(self) -> Tensor:
        """The number of steps so far in which the loss gradient was not finite, a 0-dim integer tensor."""
        return torch.as_tensor(self._nonfinite_steps)

    def penalty_value(self) -> Tensor:
        """The penalty Σ Ω(w) over all regularized parameters that are trained, as they are now; a 0-dim tensor.

        Where parameters are sharded, all processes must call this: it adds up.
        """
        return sum_over_weights(self._trained(), self.penalty.value).sum()

    def sparsity(self) -> float:
        """The fraction of exact zeros in the regularized weights that are trained. Synchronizes with the host.

        Frozen weights never become zero, so they do not count. Where parameters are sharded, all processes must call
        this: it adds up.
        """
        trained = self._trained()
        if not trained:
            return 0.0
        zeros = sum_over_weights(trained, lambda weight: (weight == 0).sum())
        return float(zeros.sum()) / sum(parameter.numel() for parameter in trained.values())

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def weight_norms(self) -> dict[str, float]:
        """The Euclidean norm of each regularized parameter by name. Synchronizes with the host once.

        Where parameters are sharded, all processes must call this: it adds up.
        """
        squares = sum_over_weights(self.parameters, lambda weight: inner(weight, weight))
        return dict(zip(self.parameters, squares.sqrt().tolist(), strict=True))

    def spans(self) -> dict[str, float]:
        """How far the penalty must carry each parameter to zero: ⟨w,w⟩/⟨w,r⟩ by name. Synchronizes with the host once.

        It is the proximal step size at which a straight line along the penalty's gradient has used up the norm of the
        weights; infinite where the penalty does not pull, 0 for weights that are zero. For L1 it is about the largest
        of the usual magnitudes. Where parameters are sharded, all processes must call this: it adds up.
        """
        squares = sum_over_weights(self.parameters, lambda weight: inner(weight, weight))
        pulls = sum_over_weights(self.parameters, lambda weight: inner(weight, self.penalty.gradient(weight)))
        spans = torch.where(squares > 0, squares / (pulls * pulls.new_tensor(list(self._relative.values()))), 0)
        return dict(zip(self.parameters, spans.tolist(), strict=True))

    def collapsed(self, fraction: float = 1e-6) -> dict[str, tuple[float, float]]:
        """The parameters that are as good as dead, each with its norm now and at the start.

        Dead means: shrunk below this fraction of the norm with which the regularizer met it. As :meth:`weight_norms`.
        """
        return {
            name: (norm, self._initial_norms[name])
            for name, norm in self.weight_norms().items()
            if norm < fraction * self._initial_norms.get(name, 0.0)
        }

    # -- state ---------------------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied or unpickled together with its module, it regularizes the copy."""
        self.__dict__.update(state)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._pending = {}
        self._plans.load_state_dict(self._plans.state_dict(sharded=True))

    def state_dict(self, *, sharded: bool = False) -> dict[str, Any]:
        """What a resumed run needs to decide as the uninterrupted one: numbers and tensors, loadable weights-only.

        The last gradient of ``"temporal"`` is not in it: the first step after a resume has no predecessor.

        Args:
            sharded: Whether what is known of sharded parameters is in it too, as the part that this process holds.
        """
        return {
            "steps": dict(self._steps),
            "began": None if self._began is None else list(self._began),
            "nonfinite_steps": int(self.nonfinite_steps),
            "initial_norms": dict(self._initial_norms),
            **({} if self.controller is None else {"controller": self.controller.state_dict()}),
            **self._plans.state_dict(sharded),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. Settings are not part of it: a changed strength takes effect."""
        self._steps = dict(state["steps"])
        self._began = None if state.get("began") is None else Clock(*state["began"])
        self._nonfinite_steps = state["nonfinite_steps"]
        self._initial_norms |= state["initial_norms"]
        if self.controller is not None and "controller" in state:
            self.controller.load_state_dict(state["controller"])
        self._pending.clear()
        self._plans.load_state_dict(state)


def check_aim(strength: object, target_sparsity: object, penalty: Penalty, update: str, schedule: Schedule) -> None:
    """Raise unless there is either a strength or a target sparsity that the penalty and the update can arrive at."""
    if target_sparsity is None:
        if strength is None:
            advice = "`find_strength` finds one; or give `target_sparsity`, the fraction of weights that shall be zero."
            raise argument_error("strength", None, "must be given", advice, TypeError)
        return
    check_target_sparsity(target_sparsity, penalty, update)
    if strength is not None:
        advice = "Give one of the two: with a target the strength is found during training."
        raise argument_error("strength", strength, "must be None where target_sparsity is given", advice)
    if schedule.warmup:
        advice = "Leave it out: the wanted sparsity rises gradually by itself."
        raise argument_error("warmup", schedule.warmup, "must be 0 where target_sparsity is given", advice)


def check_rule(gate: object, schedule: object, update: object) -> None:
    """Raise unless these are a gate or ``None``, a schedule, and the name of an update."""
    if gate is not None and not isinstance(gate, Gate):
        advice = "Write gate=Gate(...), or gate=None for plain strong regularization."
        raise argument_error("gate", gate, "must be a Gate or None", advice, TypeError)
    if not isinstance(schedule, Schedule):
        raise argument_error("schedule", schedule, "must be a Schedule", "Write schedule=Schedule(...).", TypeError)
    check_choice("update", update, ["gradient", "proximal", "dual_averaging"])
