"""The plan of one optimizer's step: its chunks, and the order in which the functions of a step run over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.coherence import GradientStatistics, companion
from lightning_gcsr.core.collected import CollectedStatistics
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.latent_weights import follow_replaced_weights, shrink_latent_weights, use_latent_weights
from lightning_gcsr.core.members import Member
from lightning_gcsr.core.numerics import accumulation_dtype, host_bool, real_view, wide
from lightning_gcsr.core.optimizers import learning_rate, rescales_gradients, square_decay
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.pull import Pull, kappa, step_size
from lightning_gcsr.core.sharding import is_sharded, replication_factors, sum_over_processes
from lightning_gcsr.core.step import average_in, close, element_gate, ema_weight, inject

__all__ = ["StepPlan"]


@dataclass
class StepPlan:
    """What one optimizer's step does to the regularized weights that have a gradient in it."""

    members: list[Member]
    """These weights, in the optimizer's order."""
    chunks: list[Chunk]
    penalty: Penalty
    gate: Gate | None
    update: str
    sums_squares: bool = False
    """Whether the optimizer divides by the root of a sum of squared gradients, as Adagrad does, not of an average."""

    def __post_init__(self) -> None:
        self.device = self.members[0].parameter.device
        self.pull = Pull(0.0)
        self._weights: dict[tuple[float, int], float | Tensor] = {}
        self.sharded = any(is_sharded(member.parameter) for member in self.members)
        self.replication = replication_factors(member.parameter for member in self.members)
        positions = {member.name: i for i, member in enumerate(self.members)}
        self.positions_of = [[positions[member.name] for member in chunk.members] for chunk in self.chunks]

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
        self.pull = pull
        together = self.gate is not None and not self.gate.by_element
        rescaled = pull.growth is not None or (
            self.update != "gradient" and any(rescales_gradients(chunk.group) for chunk in self.chunks)
        )
        # Sharded gradients are added up over processes once: where a decision rests on sums, with these, unless
        # averages must know before whether the gradients are finite.
        early = not together or self._averages
        by_tensor = report or rescaled or self.sharded or self.device.type != "cpu"
        squares = self._gradient_squares(loss_scale, early) if by_tensor else None
        finite = self._finite(squares)
        if early:
            self._count(finite, squares if rescaled else None)
        collected = CollectedStatistics(self.members, self.sharded, self.replication)
        for i in reversed(range(len(self.chunks))):  # the gradients of the last one are at hand
            if self.update == "dual_averaging":
                follow_replaced_weights(self.chunks[i], self.penalty)
            self._visit(i, loss_scale, finite, collected, report or together)
        sums: GradientStatistics | None = None
        opened = (
            None if self.gate is not None else torch.as_tensor(finite, device=self.device).expand(len(self.members))
        )
        if together:
            sums = collected.statistics()
            finite = host_bool(sums.finite)
            squares = sums.loss_gradient_square
            opened = self._decide(sums)
            for i, chunk in enumerate(self.chunks):
                self._act_by_tensor(chunk, self._of(i, opened), loss_scale)
        if not early:
            self._count(finite, squares if rescaled else None)
        if self.update == "dual_averaging":
            for chunk in self.chunks:
                use_latent_weights(chunk, starts=pull.acts)
        if not report:
            return None, finite
        assert squares is not None
        return collected.report(pull.strength, squares, self.gate is not None, opened, sums), finite

    @property
    def _averages(self) -> bool:
        return self.gate is not None and (self.gate.uses_previous_gradient or bool(self.gate.averaging))

    def _gradient_squares(self, loss_scale: float | Tensor, over_processes: bool) -> Tensor:
        """⟨g,g⟩ of each tensor without loss scale, shape (n,), as far as this process holds it or over all of them."""
        gradients = [wide(member.gradient) for member in self.members]
        norms = [norm.to(self.device) for norm in torch._foreach_norm(gradients, 2)]
        together = torch.stack(norms).to(accumulation_dtype(self.device))
        if isinstance(loss_scale, Tensor) or loss_scale != 1:
            together = together / loss_scale
        squares = together.square()
        return self._over_processes(squares) if self.sharded and over_processes else squares

    def _finite(self, squares: Tensor | None) -> bool | Tensor:
        """Whether all gradients are finite."""
        if squares is not None:
            return host_bool(squares.sum().isfinite())
        norms = [torch.linalg.vector_norm(real_view(chunk.gradient())) for chunk in self.chunks]
        last = self.chunks[-1]
        last.scratch.fresh = last if last.joined else None
        return all(math.isfinite(norm) for norm in norms)

    def _count(self, finite: bool | Tensor, squares: Tensor | None) -> None:
        """Count this step, where it is finite, and take its squared gradients into their running means.

        A count is made once for all chunks that have counted the same steps.
        """
        counts = {id(chunk.count): chunk.count + finite for chunk in self.chunks}
        for chunk in self.chunks:
            chunk.count = counts[id(chunk.count)]
        self._weights = {}
        if squares is not None:
            for i, chunk in enumerate(self.chunks):
                self._take_squares(chunk, self._of(i, squares), finite)

    def _ema_weight(self, decay: float, chunk: Chunk, finite: bool | Tensor) -> float | Tensor:
        """What this step's gradient weighs in a running average with this decay."""
        key = (decay, id(chunk.count))
        if key not in self._weights:
            self._weights[key] = ema_weight(decay, chunk.count, finite)
        return self._weights[key]

    def _over_processes(self, numbers: Tensor) -> Tensor:
        parts = zip(numbers.unbind(), self.replication, strict=True)
        return sum_over_processes(torch.stack([number * factor for number, factor in parts]))

    def _visit(
        self,
        index: int,
        loss_scale: float | Tensor,
        finite: bool | Tensor,
        collected: CollectedStatistics,
        measures: bool,
    ) -> None:
        """Take one chunk's gradients into the average and measure; act, where no decision needs other chunks."""
        chunk, gate, positions = self.chunks[index], self.gate, self.positions_of[index]
        if gate is None:
            opened = self._for_all(finite)
            self._act_by_tensor(chunk, self._of(index, opened), loss_scale)
            if not measures:
                return
        loss_gradient = self._loss_gradient(chunk, loss_scale)
        gradient = self._averaged(chunk, loss_gradient, finite)
        weight = chunk.weight()
        own_strength = self.pull.strength * chunk.relative
        if measures:
            penalty_gradient = self.penalty.gradient(weight)
            compared = self._companion(chunk, gradient, penalty_gradient, own_strength)
            collected.add(positions, chunk, (gradient, compared, penalty_gradient, loss_gradient))
        if gate is None:
            return
        opens: Tensor | None = None
        if gate.by_element and self.pull.acts:
            if gate.uses_previous_gradient:
                opens = self.penalty.coherent(gradient, chunk.keep("average", gradient.dtype))
                close(opens, finite & (chunk.count > 1))
            else:
                easing = self._easing(chunk, gate)
                opens = element_gate(gradient, weight, self.penalty, gate, own_strength, easing)
                close(opens, finite)
        if gate.uses_previous_gradient:  # after they were compared, and before the penalty joins the gradient
            average_in(chunk.keep("average", gradient.dtype), loss_gradient, ema_weight(0.0, chunk.count, finite))
        if opens is not None:
            if measures:
                collected.count_elements(positions, chunk, opens)
            self._act_by_element(chunk, opens, loss_scale)

    def _easing(self, chunk: Chunk, gate: Gate) -> float | Tensor:
        """By how much a gradient may oppose the penalty at a weight of this chunk."""
        if not gate.tolerance:
            return 0.0
        if self.pull.growth is None:
            return gate.tolerance * self.pull.strength * chunk.relative
        assert chunk.mean_square is not None
        return chunk.spread(chunk.mean_square.sqrt() * self.pull.tolerance)

    @staticmethod
    def _loss_gradient(chunk: Chunk, loss_scale: float | Tensor) -> Tensor:
        """The loss gradient of this step, without loss scale."""
        gradient = chunk.gradient()
        return gradient / loss_scale if isinstance(loss_scale, Tensor) or loss_scale != 1 else gradient

    def _averaged(self, chunk: Chunk, gradient: Tensor, finite: bool | Tensor) -> Tensor:
        """What coherence is measured on: the gradient, or the average that it now is part of."""
        # The rows of a sparse gradient change from step to step, so they are measured as they are.
        if self.gate is None or not self.gate.averaging or chunk.members[0].rows is not None:
            return gradient
        average = chunk.keep("average", gradient.dtype)
        average_in(average, gradient, self._ema_weight(self.gate.averaging, chunk, finite))
        return average

    def _companion(self, chunk: Chunk, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        if self.gate is None:
            return penalty_gradient
        if self.gate.uses_previous_gradient:
            return chunk.keep("average", gradient.dtype)
        return companion(self.gate.coherence, gradient, penalty_gradient, strength)

    def _decide(self, sums: GradientStatistics) -> Tensor:
        assert self.gate is not None
        opened = self.gate.decide(sums)
        if self.gate.uses_previous_gradient:
            known = self._have_predecessor()
            opened = opened & (known.any() if self.gate.scope == "model" else known)
        return opened

    def _have_predecessor(self) -> Tensor:
        """Whether a gradient before this step's is known of each tensor, shape (n,)."""
        known: dict[int, Tensor] = {}
        for positions, chunk in zip(self.positions_of, self.chunks, strict=True):
            known |= dict.fromkeys(positions, torch.as_tensor(chunk.count > 1, device=self.device))
        return torch.stack([known[position] for position in range(len(self.members))])

    def _take_squares(self, chunk: Chunk, squares: Tensor, finite: bool | Tensor) -> None:
        """Take this step's squared gradients into their running mean, where the optimizer rescales by such a one."""
        if finite is False or not (rescales_gradients(chunk.group) or self.pull.growth is not None):
            return
        mean = squares / self._member_sizes(chunk)
        if chunk.mean_square is None:
            chunk.mean_square = torch.zeros_like(mean)
        change = mean if self.sums_squares else mean - chunk.mean_square
        change = change * (1.0 if self.sums_squares else self._ema_weight(square_decay(chunk.group), chunk, finite))
        chunk.mean_square = chunk.mean_square + (
            change if isinstance(finite, bool) else torch.where(finite, change, 0.0)
        )

    @staticmethod
    def _member_sizes(chunk: Chunk) -> Tensor | int:
        """The number of weights of each tensor, of which the chunk may hold a slice."""
        if chunk.joined and not is_sharded(chunk.members[0].parameter):
            return chunk.sizes_tensor
        sizes = [max(1, member.size) for member in chunk.members]
        return sizes[0] if len(sizes) == 1 else torch.tensor(sizes, device=chunk.device)

    # -- acting --------------------------------------------------------------------------------------------------------

    def _act_by_element(self, chunk: Chunk, gate: Tensor, loss_scale: float | Tensor) -> None:
        if self.update == "gradient":
            self._inject(chunk, gate, loss_scale)
        elif chunk.members[0].rows is None:
            chunk.keep("gate", torch.int8).copy_(gate)
            chunk.gated = True
        else:
            chunk.kept["gate"], chunk.gated = gate, True

    def _act_by_tensor(self, chunk: Chunk, opened: Tensor, loss_scale: float | Tensor) -> None:
        if not self.pull.acts:
            return
        if self.update != "gradient":
            chunk.opened = opened
            return
        gate = chunk.spread(opened.to(torch.float32))
        if isinstance(gate, Tensor) or gate > 0:
            self._inject(chunk, gate, loss_scale)

    def _inject(self, chunk: Chunk, gate: float | Tensor, loss_scale: float | Tensor) -> None:
        gradient = chunk.gradient()
        penalty_gradient = self.penalty.gradient(chunk.weight())
        if isinstance(loss_scale, Tensor):
            loss_scale = loss_scale.to(chunk.device, chunk.real_dtype)
        inject(gradient, penalty_gradient, gate, loss_scale * (self.pull.strength * chunk.relative))
        chunk.put_gradient(gradient)

    # -- after the optimizer's step ------------------------------------------------------------------------------------

    def after(self, skipped: bool, found_inf: Tensor | None) -> None:
        """Shrink the weights where the gate was open; a step that was skipped changes nothing."""
        falls = self.pull.growth is not None and self.pull.growth < 0
        for chunk in self.chunks:
            acts = not skipped and self.pull.acts and (chunk.gated or chunk.opened is not None)
            step = self._step(chunk, None if falls else chunk.opened, found_inf) if acts else 0.0
            gate = chunk.gate() if acts and chunk.gated and not falls else None
            if self.update == "dual_averaging":
                shrink_latent_weights(chunk, self.penalty, step, gate, skipped, acts and falls)
            elif isinstance(step, Tensor) or step > 0:
                chunk.put_weight(self.penalty.shrink_(chunk.weight(), step, gate), in_place=True)
        if self.update == "dual_averaging":
            for chunk in self.chunks:  # slices of one tensor have one version
                chunk.versions = chunk.weight_versions()

    def _step(self, chunk: Chunk, opened: Tensor | None, found_inf: Tensor | None) -> float | Tensor:
        """How far weights are shrunk, lr·λ·κ or growth·κ, 0 where a tensor is closed: one number, or one a weight."""
        growth = self.pull.growth
        pull, size = (self.pull.strength, step_size(chunk)) if growth is None else (growth, kappa(chunk))
        size = size * (pull * chunk.relative)
        if opened is None and found_inf is None and (isinstance(size, float) or size.dim() == 0):
            return size
        sizes = torch.as_tensor(size, dtype=accumulation_dtype(chunk.device), device=chunk.device)
        sizes = sizes.expand(len(chunk.members))
        if opened is not None:
            sizes = sizes * opened.to(sizes.device)
        if found_inf is not None:
            sizes = sizes * (found_inf.to(sizes.device) == 0)
        return chunk.spread(sizes)

    def _for_all(self, finite: bool | Tensor) -> Tensor:
        """One decision for all members, shape (n,)."""
        return torch.as_tensor(finite, device=self.device).expand(len(self.members))

    def _of(self, index: int, values: Tensor) -> Tensor:
        """Of values for all members of the plan, shape (n,), those of one chunk's members."""
        positions = self.positions_of[index]
        first, last = positions[0], positions[-1] + 1
        if len(positions) == len(values):
            return values
        if last - first == len(positions):
            return values[first:last]
        return torch.stack([values[position] for position in positions])
