"""The regularizer: one optimizer step as measure, gate, and inject or shrink. Plain torch, no Trainer needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gcsr.core.blocks import Block
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.gradient_average import GradientMemory
from lightning_gcsr.core.old_gate import CoherenceMeasure, Gate, MeasureName, ScopeName, Sums, inner
from lightning_gcsr.core.optimizers import check_optimizer, stepped_parameters
from lightning_gcsr.core.parameter_selection import (
    StrengthScale,
    assign_strengths,
    parameter_aliases,
    select_parameters,
)
from lightning_gcsr.core.passes import Passes
from lightning_gcsr.core.penalties import L2, ElasticNet, Penalty, PenaltyName, resolve_penalty
from lightning_gcsr.core.settings import Settings, UpdateName
from lightning_gcsr.core.sharding import is_sharded, local_part, sharded_dims, shares, sum_over_processes
from lightning_gcsr.core.terms import Term, collect_terms
from lightning_gcsr.validation import argument_error

__all__ = ["CoherentRegularizer"]


class CoherentRegularizer:
    r"""Strong regularization that is imposed only where the gradients stay coherent in its presence.

    With λ the strength, g the gradient of the loss and r the (sub)gradient of the penalty, each optimizer step

    1. measures the coherence, a cosine in [−1, 1] (see :mod:`lightning_gcsr.core.old_gate`);
    2. injects the penalty where coherence ≥ ``threshold`` and suppresses it elsewhere;
    3. either by ``g += λ·r`` before the optimizer sees the gradient (``update="gradient"``), or by the proximal map
       ``w ← prox(w)`` after the optimizer's step (``update="proximal"``): exact zeros for L1 and group lasso.

    The rule is this project's reading of the abstract of *Gradient-coherent strong regularization*
    (arXiv:1811.08056). Use it around the step of a hand-written loop; with a Lightning ``Trainer`` use
    :class:`~lightning_gcsr.GradientCoherentRegularization`, which takes the same arguments. Nobody here knows how long
    the training is, so averaging, tolerance and warm-up, which belong together, are off unless they are given.

    The proximal step has the size lr·λ; under SGD with momentum times (1 − dampening)/(1 − momentum), since that is
    what a steady injected gradient moves a weight by. Under adaptive optimizers it is decoupled, as AdamW's decay is,
    and a useful strength is larger there; so large that ``"direction"`` at model or parameter scope stays shut.

    A step never synchronizes with the host. It talks to other processes only where parameters are sharded (``DTensor``
    of FSDP2 or tensor parallelism) and a decision rests on sums, once. Under data parallelism call it on the reduced
    gradients, which are the same on every process.

    Args:
        module: The module whose parameters are regularized.
        penalty: ``"l1"``, ``"l2"``, ``"elastic_net"``, ``"group_lasso"``, or a :class:`~lightning_gcsr.Penalty`.
        strength: λ ≥ 0, per weight and optimizer step of the loss gradient; or a mapping from regular expressions on
            parameter names to strengths, first match wins, and parameters that none matches are not regularized.
        coherence: ``"direction"``: cos(g, g+λr); ``"agreement"``: cos(g, r); ``"temporal"``: cos(g, g of the last
            step), where the first step has no predecessor and suppresses; a
            :class:`~lightning_gcsr.CoherenceMeasure` of your own; ``None``: always inject.
        scope: What one decision covers: ``"model"``, ``"parameter"`` (a tensor), ``"element"`` (a weight).
        threshold: The least coherence at which the penalty is injected. ``None`` chooses 0.1 for ``"direction"`` and
            0 for the others. At element scope, where coherence is a sign, it must be ``None``.
        tolerance: c in [0, 1], for ``"agreement"`` at element scope: a loss gradient that opposes the penalty at a
            weight by no more than the share c of it still counts as coherent: cos(g+c·λr, r). With 0.1, averaging 0.98
            and a warm-up over the first third the callback's default gives the smallest networks.
        averaging: β in [0, 1): coherence is measured on a running average of the loss gradients that looks back over
            about 1/(1−β) steps, for ``"agreement"`` and ``"direction"``; costs one copy of the gradients. 0 is this
            step's gradient alone.
        strength_scale: ``"uniform"``, or ``"fan_in"``: each tensor's strength is multiplied by its fan-in over the
            mean fan-in, because thin layers carry more per weight.
        update: ``"proximal"`` or ``"gradient"``.
        include: Regular expressions of the parameters to regularize, instead of all with two or more dimensions
            outside norm layers.
        exclude: Regular expressions of parameters to leave out.
        delay_steps: Optimizer steps without penalty at the start.
        warmup_steps: Optimizer steps after the delay over which the strength rises linearly.
        stop_steps: The optimizer step from which on there is no penalty; ``None`` for never.

    Raises:
        ValueError: If an argument breaks its rule, a pattern matches nothing, or nothing is left to regularize.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> regularizer = CoherentRegularizer(model, "l1", strength=0.05, update="proximal")
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
        strength: Union[float, Mapping[str, float]],
        coherence: Union[CoherenceMeasure, MeasureName, None] = "agreement",
        scope: ScopeName = "element",
        threshold: Union[float, None] = None,
        tolerance: float = 0.0,
        averaging: float = 0.0,
        strength_scale: StrengthScale = "uniform",
        update: UpdateName = "proximal",
        include: Union[Sequence[str], None] = None,
        exclude: Union[Sequence[str], None] = None,
        delay_steps: int = 0,
        warmup_steps: int = 0,
        stop_steps: Union[int, None] = None,
    ) -> None:
        self.settings = Settings(
            penalty=penalty,
            strength=strength,
            coherence=coherence,
            scope=scope,
            threshold=threshold,
            tolerance=tolerance,
            averaging=averaging,
            strength_scale=strength_scale,
            update=update,
            include=include,
            exclude=exclude,
            delay_steps=delay_steps,
            warmup_steps=warmup_steps,
            stop_steps=stop_steps,
        )
        for name, value in (("delay_steps", delay_steps), ("warmup_steps", warmup_steps), ("stop_steps", stop_steps)):
            if isinstance(value, float):
                rule = "must be an integer"
                raise argument_error(
                    name, value, rule, "Only a Trainer knows what a share of the training is.", TypeError
                )
        self.penalty = resolve_penalty(penalty)
        self.gate = Gate(coherence, scope, threshold, tolerance)
        selected = select_parameters(module, include, exclude)
        aliases = parameter_aliases(module)
        strengths = assign_strengths(selected, strength, strength_scale, aliases)
        self.parameters: dict[str, nn.Parameter] = {name: selected[name] for name in strengths}
        """The regularized parameters by name."""
        self.strength: float = max(assign_strengths(selected, strength, aliases=aliases).values())
        """The strength; the largest one where a mapping gives several. Before delay, warm-up, stop and scaling."""
        # Measured and injected is λ·relative·r with one λ, so that a ramp or a strength of 0 leaves cos(g, r) alone.
        self._relative = {name: value / self.strength if self.strength else 1.0 for name, value in strengths.items()}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._check_parameters()
        self._initial_norms = self.weight_norms()
        self._steps: dict[str, int] = {}
        self._nonfinite_steps: Tensor | int = 0
        temporal = self.gate.uses_previous_gradient
        self._memory = GradientMemory(averaging) if temporal or averaging > 0 else None
        # By optimizer as in `_steps`, for the proximal update: the step's strength, and what to shrink where.
        self._pending: dict[str, tuple[float, list[tuple[Block, Tensor]]]] = {}

    def _check_parameters(self) -> None:
        if self.penalty.elementwise:  # which fits every shape, however it is sharded
            return
        for name, parameter in self.parameters.items():
            self.penalty.value(local_part(parameter.detach()))  # a penalty that does not fit the shape says so
            if cut := [dim for dim in sharded_dims(parameter) if not self.penalty.splits_along(dim, parameter.dim())]:
                raise ValueError(
                    f"{self.penalty!r} does not fit {name!r}, which is sharded along dimension {cut[0]}: what belongs"
                    " together lies on several processes. Shard along another dimension, use another penalty, or"
                    " `exclude` it."
                )

    def stepped_by(self, optimizer: Optimizer) -> list[str]:
        """The names of the regularized parameters that this optimizer steps, in its order."""
        return [name for name, _, _ in stepped_parameters(optimizer, self._names)]

    def groups_of(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """The parameter groups of the regularized parameters that this optimizer steps, by name."""
        return {name: group for name, _, group in stepped_parameters(optimizer, self._names)}

    def steps_of(self, optimizer: Optimizer) -> int:
        """The number of steps of this optimizer so far."""
        return self._steps.get(self._key(optimizer), 0)

    def decayed_by(self, optimizer: Optimizer) -> list[str]:
        """The names of those on which an L2 penalty comes on top of the optimizer's own ``weight_decay``."""
        if not (isinstance(self.penalty, L2) or (isinstance(self.penalty, ElasticNet) and self.penalty.l1_ratio < 1)):
            return []
        return [name for name, _, group in stepped_parameters(optimizer, self._names) if group.get("weight_decay", 0)]

    @overload
    def before_step(self, optimizer: Optimizer, loss_scale: float | Tensor = 1.0) -> GateReport: ...

    @overload
    def before_step(
        self, optimizer: Optimizer, loss_scale: float | Tensor = 1.0, *, report: bool
    ) -> GateReport | None: ...

    @torch.no_grad()
    def before_step(
        self, optimizer: Optimizer, loss_scale: float | Tensor = 1.0, *, report: bool = True
    ) -> GateReport | None:
        """Measure, decide, and with ``update="gradient"`` inject. Call it once, right before ``optimizer.step()``.

        Args:
            optimizer: The optimizer about to step. Only its parameters with a gradient take part.
            loss_scale: What the gradients are multiplied by at this moment (a ``GradScaler``'s scale before
                ``unscale_``), a float or a 0-dim tensor.
            report: Whether you want to know. Not all that is reported is needed for the decision, so a step is cheaper
                without; what it does is the same.

        Returns:
            What was measured and decided; it names no parameters where none that is regularized has a gradient.
            ``None`` with ``report=False``.

        Raises:
            ValueError: If the optimizer is not supported (``LBFGS``, or ``maximize=True``), or if ``"temporal"`` meets
                a sparse gradient, whose rows change from step to step, or a gradient is sparse in more than its rows.
        """
        check_optimizer(optimizer)
        key = self._key(optimizer)
        self._pending.pop(key, None)
        step = self.steps_of(optimizer)
        self._steps |= {key: step + 1} if key else {}
        strength = self.strength * self.settings.strength_factor(step)
        terms = collect_terms(optimizer, self._names, self._relative, loss_scale)
        if not terms:
            nothing = torch.zeros(0, dtype=torch.float64)
            sums = Sums(*[nothing] * len(Sums._fields))
            return GateReport((), (), sums, nothing, strength, self.gate.coherence is not None) if report else None
        self._check_sparse(terms)
        passes = Passes(terms, self.penalty, self.gate, self._memory, self.settings.update, strength, report)
        result = passes.run()
        if passes.shrinkages:
            self._pending[key] = strength, passes.shrinkages
        self._nonfinite_steps = self._nonfinite_steps + (~passes.finite).long()
        return result

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Shrink the weights by the proximal map where the gate was open. Call it right after ``optimizer.step()``.

        With ``update="gradient"`` there is nothing to do. Where a ``GradScaler`` made a fused optimizer skip the step
        because of an infinite gradient, nothing is shrunk; where it skipped ``step()`` itself, do not call this.
        """
        strength, shrinkages = self._pending.pop(self._key(optimizer), (0.0, []))
        found_inf = getattr(optimizer, "found_inf", None)
        for block, gate in shrinkages:
            if found_inf is not None:
                gate = gate * (found_inf.to(gate.device) == 0)
            block.shrink(self.penalty, gate, strength)

    def _key(self, optimizer: Optimizer) -> str:
        """What an optimizer is known by: its first regularized parameter. The name holds after a resume.

        Steps are counted for each optimizer apart, since in a GAN they may step unequally often.
        """
        return next((name for name, _, _ in stepped_parameters(optimizer, self._names)), "")

    def _check_sparse(self, terms: list[Term]) -> None:
        sparse = [term.name for term in terms if term.rows is not None]
        if sparse and self._memory is not None:
            temporal = self.gate.uses_previous_gradient
            asked, instead = (
                ("coherence='temporal'", "another measure")
                if temporal
                else (f"averaging={self.settings.averaging}", "averaging=0")
            )
            raise ValueError(
                f"{asked} does not go with the sparse gradient of {sparse[0]!r}, whose rows change from step to step."
                f" Use {instead} or a dense gradient, or `exclude` the parameter."
            )

    @property
    def nonfinite_steps(self) -> Tensor:
        """The number of steps so far in which the loss gradient was not finite, a 0-dim integer tensor."""
        return torch.as_tensor(self._nonfinite_steps)

    def penalty_value(self) -> Tensor:
        """The penalty Σ Ω(w) over all regularized parameters as they are now, without strength; a 0-dim tensor.

        Where parameters are sharded, all processes must call this: it adds up.
        """
        return self._sum_over_weights(self.penalty.value).sum()

    def weight_norms(self) -> dict[str, float]:
        """The Euclidean norm of each regularized parameter by name. Synchronizes with the host once.

        Where parameters are sharded, all processes must call this: it adds up.
        """
        squares = self._sum_over_weights(lambda weight: inner(weight, weight))
        return dict(zip(self.parameters, squares.sqrt().tolist(), strict=True))

    @torch.no_grad()
    def _sum_over_weights(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A sum over each whole parameter from what the function gives for the part that lies here, shape (n,)."""
        parameters = list(self.parameters.values())
        values = [function(local_part(parameter.detach())) for parameter in parameters]
        parts = zip(values, shares(parameters), strict=True)
        sums = torch.stack([value.to(values[0]) * share for value, share in parts])
        return sum_over_processes(sums) if any(map(is_sharded, parameters)) else sums

    def spans(self) -> dict[str, float]:
        """How far the penalty must carry each parameter to zero: ⟨w,w⟩/⟨w,r⟩ by name. Synchronizes with the host once.

        It is the proximal step size at which a straight line along the penalty's gradient has used up the norm of the
        weights; infinite where the penalty does not pull, 0 for weights that are zero. For L1 it is about the largest
        of the usual magnitudes. Where parameters are sharded, all processes must call this: it adds up.
        """
        squares = self._sum_over_weights(lambda weight: inner(weight, weight))
        pulls = self._sum_over_weights(lambda weight: inner(weight, self.penalty.gradient(weight)))
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied or unpickled together with its module, it regularizes the copy."""
        self.__dict__.update(state)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._pending = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as the uninterrupted one: plain numbers, loadable weights-only.

        The last gradient of ``"temporal"`` is not in it: the first step after a resume has no predecessor. Averages of
        gradients are, but for those of sharded parameters, which start anew.
        """
        state: dict[str, Any] = {
            "steps": dict(self._steps),
            "nonfinite_steps": int(self.nonfinite_steps),
            "initial_norms": dict(self._initial_norms),
        }
        if self._memory is not None and not self.gate.uses_previous_gradient:
            whole = [name for name, parameter in self.parameters.items() if not is_sharded(parameter)]
            state["averages"] = self._memory.state_dict(whole)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. Settings are not part of it: a changed strength takes effect."""
        self._steps = dict(state["steps"])
        self._nonfinite_steps = state["nonfinite_steps"]
        self._initial_norms |= state["initial_norms"]
        if self._memory is not None:
            self._memory.clear()
            if "averages" in state and not self.gate.uses_previous_gradient:  # not of a run that had averaging=0
                devices = {name: parameter.device for name, parameter in self.parameters.items()}
                self._memory.load_state_dict(state["averages"], devices)
        self._pending.clear()
