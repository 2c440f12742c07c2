"""The plan of one optimizer's step: its chunks, and the order in which the functions of a step run over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.coherence import GradientStatistics, companion
from lightning_gcsr.core.collected import CollectedSums
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.latent_weights import follow_replaced_weights, shrink_latent_weights, use_latent_weights
from lightning_gcsr.core.numerics import accumulation_dtype, host_bool, on_device, real_view, wide
from lightning_gcsr.core.optimizers import learning_rate, rescales_gradients, square_decay
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.pull import Pull, kappa, step_size
from lightning_gcsr.core.sharding import replication_factors, whole_sums
from lightning_gcsr.core.step import average_in, close, element_gate, ema_weight, inject, unscaled

__all__ = ["StepPlan"]


@dataclass
class StepPlan:
    """What one optimizer's step does to the regularized weights that have a gradient in it."""

    chunks: list[Chunk]
    """These weights; the slices of a tensor follow each other."""
    penalty: Penalty
    gate: Gate | None
    update: str
    sums_squares: bool = False
    """Whether the optimizer divides by the root of a sum of squared gradients, as Adagrad does, not of an average."""

    def __post_init__(self) -> None:
        self.members = list(dict.fromkeys(member for chunk in self.chunks for member in chunk.members))
        """The n parameters that take part, in the order of the chunks."""
        starts = {member: i for i, member in enumerate(self.members)}
        self.places = [slice(i := starts[chunk.members[0]], i + len(chunk.members)) for chunk in self.chunks]
        """Where the members of each chunk stand among all."""
        self.device = self.members[0].parameter.device
        self.pull = Pull(0.0)
        self.loss_scale: float | Tensor = 1.0
        self.sharded = any(member.sharded for member in self.members)
        self.replication = replication_factors(member.parameter for member in self.members)
        self.by_element = self.gate is not None and self.gate.by_element
        """Whether every weight has a decision of its own."""
        self._by_sums = self.gate is not None and not self.by_element
        self._temporal = self.gate is not None and self.gate.uses_previous_gradient
        self._averaging = (self.gate is not None and self.gate.averaging) or 0.0
        self._tolerance = (self.gate is not None and self.gate.tolerance) or 0.0
        self._keeps = self._temporal or self._averaging > 0
        """Whether an average of the gradients is kept, or the last one."""
        self._rescales = self.update != "gradient" and any(rescales_gradients(chunk.group) for chunk in self.chunks)
        self._weights: dict[tuple[float, int], float | Tensor] = {}

    @property
    def grows(self) -> bool:
        """Whether the thresholds of the last step grew by what a controller chose."""
        return self.pull.growth is not None

    @property
    def learning_rate(self) -> float:
        """The largest learning rate of these weights. Synchronizes with the host where it lies on a device."""
        return max(float(learning_rate(chunk.group)) for chunk in self.chunks)

    # -- before the optimizer's step ---------------------------------------------------------------------------------

    def before(self, pull: Pull, loss_scale: float | Tensor, report: bool) -> tuple[GateReport | None, bool | Tensor]:
        """Measure, decide, and inject or note what to shrink.

        Args:
            pull: How hard the penalty pulls.
            loss_scale: What the gradients are multiplied by.
            report: Whether the report is wanted.

        Returns:
            The report, if it is wanted, and whether all gradients were finite: on a CPU a boolean, else a tensor.
        """
        self.pull, self.loss_scale = pull, loss_scale
        self.chunks[0].scratch.fresh = None  # what was read in the last step
        for chunk in self.chunks:
            chunk.strength = pull.strength * chunk.relative
            if self.update == "dual_averaging":
                follow_replaced_weights(chunk, self.penalty)
        collected = CollectedSums(self.members, self.replication, self.sharded) if report or self._by_sums else None
        # Where nothing is kept of the gradients, the sums that decide also tell whether they are finite.
        looks = self._keeps or not self._by_sums
        finite = self._look_at_gradients() if looks else True
        if self.gate is not None or collected is not None:
            for chunk in self.chunks:
                self._visit(chunk, finite, collected)
        sums = [] if collected is None else collected.sums()
        opened: Tensor | None = None
        if self._by_sums:
            statistics = GradientStatistics(*sums)
            if not looks:
                finite = host_bool(statistics.finite)
                self._count(finite, statistics.loss_gradient_square)
            opened = self._decide(statistics)
        elif self.gate is None:
            opened = torch.as_tensor(finite, device=self.device).expand(len(self.members))
        if opened is not None:
            for chunk, place in zip(self.chunks, self.places, strict=True):
                self._act_by_tensor(chunk, opened[place])
        return (self._report(sums, opened) if report else None), finite

    def _look_at_gradients(self) -> bool | Tensor:
        """Whether all gradients are finite; count this step where they are, and take their squares into the means."""
        if self._wants_squares or self.sharded or self.device.type != "cpu":
            squares = self._gradient_squares()
            finite = host_bool(squares.sum().isfinite())
            self._count(finite, squares)
            return finite
        # The last that is looked at is the first to be visited: its gradients are at hand.
        norms = [torch.linalg.vector_norm(real_view(chunk.gradient())) for chunk in reversed(self.chunks)]
        first = self.chunks[0]
        first.scratch.fresh = first if first.joined else None
        finite = all(math.isfinite(norm) for norm in norms)
        self._count(finite)
        return finite

    @property
    def _wants_squares(self) -> bool:
        return self._rescales or self.grows

    def _gradient_squares(self) -> Tensor:
        """⟨g,g⟩ of each tensor without loss scale, shape (n,), over all processes."""
        norms = torch._foreach_norm([wide(member.gradient) for member in self.members], 2)
        if any(norm.device != self.device for norm in norms):
            norms = tuple(norm.to(self.device) for norm in norms)
        squares = unscaled(torch.stack(norms).to(accumulation_dtype(self.device)), self.loss_scale).square()
        return whole_sums(squares, self.replication) if self.sharded else squares

    def _count(self, finite: bool | Tensor, squares: Tensor | None = None) -> None:
        """Count this step, where it is finite, and take its squared gradients into their running means.

        A count is made once for all chunks of a device that have counted the same steps.
        """
        counts: dict[tuple[int, torch.device], int | Tensor] = {}
        for chunk in self.chunks:
            key = id(chunk.count), chunk.device
            if key not in counts:
                counts[key] = chunk.count + on_device(finite, chunk.device)
            chunk.count = counts[key]
        self._weights = {}
        if squares is None or not self._wants_squares:
            return
        for chunk, place in zip(self.chunks, self.places, strict=True):
            if not rescales_gradients(chunk.group) and not self.grows:
                continue
            mean = squares[place].to(chunk.device) / chunk.whole_sizes
            if chunk.mean_square is None:
                chunk.mean_square = torch.zeros_like(mean)
            if self.sums_squares:
                chunk.mean_square.add_(torch.where(torch.as_tensor(finite, device=mean.device), mean, 0.0))
            else:
                average_in(chunk.mean_square, mean, self._ema_weight(square_decay(chunk.group), chunk, finite))

    def _ema_weight(self, decay: float, chunk: Chunk, finite: bool | Tensor) -> float | Tensor:
        """What this step's gradient weighs in a running average with this decay."""
        key = (decay, id(chunk.count))
        if key not in self._weights:
            self._weights[key] = ema_weight(decay, chunk.count, on_device(finite, chunk.device))
        return self._weights[key]

    def _visit(self, chunk: Chunk, finite: bool | Tensor, collected: CollectedSums | None) -> None:
        """Take a chunk's gradients into their average, and measure; where every weight has a gate, decide and act."""
        scaled, weight = chunk.gradient(), chunk.weight()
        loss_gradient = gradient = unscaled(scaled, self.loss_scale)
        average: Tensor | None = None
        # The rows of a sparse gradient change from step to step, so they are measured as they are.
        if self._keeps and chunk.rows is None:
            average, share = chunk.keep("average", gradient.dtype), self._ema_weight(self._averaging, chunk, finite)
            if not self._temporal:
                average_in(average, loss_gradient, share)
                gradient = average
        previous = average if self._temporal else None
        gate: Tensor | None = None
        if self.by_element and self.pull.acts:
            gate = self._element_gate(chunk, gradient, weight, previous)
            close(gate, on_device(finite, chunk.device) & (chunk.count > 1) if self._temporal else finite)
        if collected is not None:
            penalty_gradient = self.penalty.gradient(weight)
            measure = None if self.gate is None else self.gate.coherence
            compared = companion(measure, gradient, penalty_gradient, chunk.strength, previous)
            collected.add(chunk, gradient, compared, penalty_gradient, loss_gradient, gate)
        if previous is not None:  # after they were compared, and before the penalty joins the gradient
            average_in(previous, loss_gradient, share)
        if gate is not None and self.update == "gradient":
            self._inject(chunk, scaled, weight, gate)
        elif gate is not None:
            chunk.kept["gate"] = gate
        if self.by_element:
            self._use_latent_weights(chunk)

    def _element_gate(self, chunk: Chunk, gradient: Tensor, weight: Tensor, previous: Tensor | None) -> Tensor:
        """The gates of a chunk's weights; a byte for each, where they are kept until after the optimizer's step."""
        assert self.gate is not None
        easing: float | Tensor = self._tolerance * chunk.strength
        if self._tolerance and self.grows:
            assert chunk.mean_square is not None
            easing = chunk.spread(chunk.mean_square.sqrt() * self.pull.tolerance)
        kept = None if self.update == "gradient" or chunk.rows is not None else chunk.keep("gate", torch.int8)
        return element_gate(gradient, weight, self.penalty, self.gate, chunk.strength, easing, previous, kept)

    def _decide(self, sums: GradientStatistics) -> Tensor:
        """Whether each tensor is open, shape (n,)."""
        assert self.gate is not None
        opened = self.gate.decide(sums)
        if not self._temporal:
            return opened
        known = torch.empty(len(self.members), dtype=torch.bool, device=self.device)
        for chunk, place in zip(self.chunks, self.places, strict=True):
            known[place] = chunk.count > 1
        return opened & (known.any() if self.gate.scope == "model" else known)

    def _report(self, sums: list[Tensor], opened: Tensor | None) -> GateReport:
        """What the step measured and decided."""
        names, sizes = zip(*((member.name, member.size) for member in self.members), strict=True)
        if opened is not None:
            injected = torch.stack([is_open * size for is_open, size in zip(opened, sizes, strict=True)])
        else:
            injected = sums[5] if len(sums) > 5 else torch.zeros_like(sums[0])
        statistics, injected = GradientStatistics(*sums[:5]), injected.to(sums[0]) * self.pull.shrinks
        return GateReport(names, sizes, statistics, injected, self.pull.strength, self.gate is not None)

    # -- acting --------------------------------------------------------------------------------------------------------

    def _act_by_tensor(self, chunk: Chunk, opened: Tensor) -> None:
        """Inject where a tensor is open, or note it for after the optimizer's step."""
        if self.pull.acts:
            chunk.opened = opened
            if self.update == "gradient":
                gate = chunk.spread(opened.to(torch.float32))
                if isinstance(gate, Tensor) or gate > 0:
                    self._inject(chunk, chunk.gradient(), chunk.weight(), gate)
        self._use_latent_weights(chunk)

    def _inject(self, chunk: Chunk, gradient: Tensor, weight: Tensor, gate: float | Tensor) -> None:
        scale = self.loss_scale
        if isinstance(scale, Tensor):
            scale = scale.to(chunk.device, chunk.real_dtype)
        inject(gradient, self.penalty.gradient(weight), gate, scale * chunk.strength)
        chunk.put_gradient(gradient)

    def _use_latent_weights(self, chunk: Chunk) -> None:
        if self.update == "dual_averaging":
            use_latent_weights(chunk, starts=self.pull.acts)

    # -- after the optimizer's step ------------------------------------------------------------------------------------

    def after(self, skipped: bool, found_inf: Tensor | None) -> None:
        """Shrink the weights where the gate was open; a step that was skipped changes nothing."""
        acts = self.pull.acts and not skipped
        of_zeros = acts and self.pull.moves_zeros
        for chunk in self.chunks:
            step = self._step(chunk, not of_zeros, found_inf) if acts else 0.0
            gate = chunk.kept["gate"] if acts and self.by_element and not of_zeros else None
            if self.update == "dual_averaging":
                shrink_latent_weights(chunk, self.penalty, step, gate, skipped, of_zeros)
            elif isinstance(step, Tensor) or step > 0:
                chunk.put_weight(self.penalty.shrink_(chunk.weight(), step, gate))
        if self.update == "dual_averaging":
            for chunk in self.chunks:  # slices of one tensor have one version
                chunk.versions = chunk.weight_versions()

    def _step(self, chunk: Chunk, gated: bool, found_inf: Tensor | None) -> float | Tensor:
        """How far weights are shrunk, lr·λ·κ or growth·κ, 0 where a tensor is closed: one number, or one a weight."""
        growth = self.pull.growth
        size = step_size(chunk) * chunk.strength if growth is None else kappa(chunk) * (growth * chunk.relative)
        dtype = accumulation_dtype(chunk.device)
        if isinstance(size, Tensor):
            size = size.to(chunk.device)
        if gated and chunk.opened is not None:
            size = size * chunk.opened.to(chunk.device, dtype)
        if found_inf is not None:
            size = size * (found_inf == 0).to(chunk.device, dtype)
        return chunk.spread(size)
