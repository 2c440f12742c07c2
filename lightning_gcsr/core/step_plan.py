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
from lightning_gcsr.core.sharding import replication_factors, whole_sums
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
        self.sharded = any(member.sharded for member in self.members)
        self.replication = replication_factors(member.parameter for member in self.members)
        positions = {member.name: i for i, member in enumerate(self.members)}
        self.positions_of = [[positions[member.name] for member in chunk.members] for chunk in self.chunks]
        self.by_element = self.gate is not None and self.gate.by_element
        """Whether every weight has a decision of its own."""
        self._together = self.gate is not None and not self.by_element
        self._temporal = self.gate is not None and self.gate.uses_previous_gradient
        self._averaging = (self.gate is not None and self.gate.averaging) or 0.0
        self._tolerance = (self.gate is not None and self.gate.tolerance) or 0.0
        self._rescales = self.update != "gradient" and any(rescales_gradients(chunk.group) for chunk in self.chunks)
        self._indices = [_index(positions, self.device) for positions in self.positions_of]
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
        self.pull = pull
        rescaled = self._rescales or pull.growth is not None
        # Sharded gradients are added up over processes once: where a decision rests on sums, with these, unless
        # averages must know before whether the gradients are finite.
        early = not self._together or self._temporal or self._averaging > 0
        by_tensor = report or rescaled or self.sharded or self.device.type != "cpu"
        squares = self._gradient_squares(loss_scale, early) if by_tensor else None
        finite = self._finite(squares)
        if early:
            self._count(finite, squares if rescaled else None)
        if self.update == "dual_averaging":
            for chunk in self.chunks:
                follow_replaced_weights(chunk, self.penalty)
        measures = report or self._together
        collected = CollectedStatistics(self.members, self.sharded, self.replication) if measures else None
        for i in reversed(range(len(self.chunks))):  # the gradients of the last one are at hand
            self._visit(i, loss_scale, finite, collected)
        sums: GradientStatistics | None = None
        opened = None if self.by_element else self._for_all(finite)
        if self._together:
            assert collected is not None
            sums = collected.statistics()
            finite, squares, opened = host_bool(sums.finite), sums.loss_gradient_square, self._decide(sums)
            for i, chunk in enumerate(self.chunks):
                self._act_by_tensor(chunk, self._of(i, opened), loss_scale)
                self._use_latent_weights(chunk)
        if not early:
            self._count(finite, squares if rescaled else None)
        if not report or collected is None:
            return None, finite
        assert squares is not None
        return collected.report(pull.strength, squares, self.gate is not None, opened, sums), finite

    def _gradient_squares(self, loss_scale: float | Tensor, over_processes: bool) -> Tensor:
        """⟨g,g⟩ of each tensor without loss scale, shape (n,), as far as this process holds it or over all of them."""
        norms = torch._foreach_norm([wide(member.gradient) for member in self.members], 2)
        if any(norm.device != self.device for norm in norms):
            norms = tuple(norm.to(self.device) for norm in norms)
        together = torch.stack(norms).to(accumulation_dtype(self.device))
        if isinstance(loss_scale, Tensor) or loss_scale != 1:
            together = together / loss_scale
        squares = together.square()
        return whole_sums(squares, self.replication) if self.sharded and over_processes else squares

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
        if squares is None:
            return
        for i, chunk in enumerate(self.chunks):
            if rescales_gradients(chunk.group) or self.pull.growth is not None:
                self._take_squares(chunk, self._of(i, squares), finite)

    def _take_squares(self, chunk: Chunk, squares: Tensor, finite: bool | Tensor) -> None:
        """Take this step's squared gradients, where they are finite, into their running mean."""
        mean = squares / chunk.whole_sizes
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
            self._weights[key] = ema_weight(decay, chunk.count, finite)
        return self._weights[key]

    def _visit(
        self, index: int, loss_scale: float | Tensor, finite: bool | Tensor, collected: CollectedStatistics | None
    ) -> None:
        """Take one chunk's gradients into the average and measure; act, where no decision needs other chunks."""
        chunk = self.chunks[index]
        if self.gate is None:
            self._act_by_tensor(chunk, self._of(index, self._for_all(finite)), loss_scale)
        gate = self._measure(index, loss_scale, finite, collected) if self.gate or collected else None
        if gate is not None:
            self._act_by_element(chunk, gate, loss_scale)
        if not self._together:
            self._use_latent_weights(chunk)

    def _measure(
        self, index: int, loss_scale: float | Tensor, finite: bool | Tensor, collected: CollectedStatistics | None
    ) -> Tensor | None:
        """The gates of a chunk's weights, where each has its own and there is a penalty; collect what is wanted."""
        chunk = self.chunks[index]
        loss_gradient = self._loss_gradient(chunk, loss_scale)
        gradient = self._averaged(chunk, loss_gradient, finite)
        weight = chunk.weight()
        strength = self.pull.strength * chunk.relative
        if collected is not None:
            penalty_gradient = self.penalty.gradient(weight)
            compared = self._companion(chunk, gradient, penalty_gradient, strength)
            collected.add(self.positions_of[index], chunk, (gradient, compared, penalty_gradient, loss_gradient))
        opens: Tensor | None = None
        if self.by_element and self.pull.acts:
            assert self.gate is not None
            if self._temporal:
                opens = self.penalty.coherent(gradient, chunk.keep("average", gradient.dtype))
                close(opens, finite & (chunk.count > 1))
            else:
                opens = element_gate(gradient, weight, self.penalty, self.gate, strength, self._easing(chunk))
                close(opens, finite)
            if collected is not None:
                collected.count_elements(self.positions_of[index], chunk, opens)
        if self._temporal:  # after they were compared, and before the penalty joins the gradient
            average_in(chunk.keep("average", gradient.dtype), loss_gradient, ema_weight(0.0, chunk.count, finite))
        return opens

    def _easing(self, chunk: Chunk) -> float | Tensor:
        """By how much a gradient may oppose the penalty at a weight of this chunk."""
        if not self._tolerance:
            return 0.0
        if self.pull.growth is None:
            return self._tolerance * self.pull.strength * chunk.relative
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
        if not self._averaging or chunk.rows is not None:
            return gradient
        average = chunk.keep("average", gradient.dtype)
        average_in(average, gradient, self._ema_weight(self._averaging, chunk, finite))
        return average

    def _companion(self, chunk: Chunk, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        if self.gate is None:
            return penalty_gradient
        if self._temporal:
            return chunk.keep("average", gradient.dtype)
        return companion(self.gate.coherence, gradient, penalty_gradient, strength)

    def _decide(self, sums: GradientStatistics) -> Tensor:
        assert self.gate is not None
        opened = self.gate.decide(sums)
        if self._temporal:
            known = self._have_predecessor()
            opened = opened & (known.any() if self.gate.scope == "model" else known)
        return opened

    def _have_predecessor(self) -> Tensor:
        """Whether a gradient before this step's is known of each tensor, shape (n,)."""
        known: dict[int, Tensor] = {}
        for positions, chunk in zip(self.positions_of, self.chunks, strict=True):
            known |= dict.fromkeys(positions, torch.as_tensor(chunk.count > 1, device=self.device))
        return torch.stack([known[position] for position in range(len(self.members))])

    # -- acting --------------------------------------------------------------------------------------------------------

    def _act_by_element(self, chunk: Chunk, gate: Tensor, loss_scale: float | Tensor) -> None:
        if self.update == "gradient":
            self._inject(chunk, gate, loss_scale)
        elif chunk.rows is None:
            chunk.keep("gate", torch.int8).copy_(gate)
        else:
            chunk.kept["gate"] = gate

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

    def _use_latent_weights(self, chunk: Chunk) -> None:
        if self.update == "dual_averaging":
            use_latent_weights(chunk, starts=self.pull.acts)

    # -- after the optimizer's step ------------------------------------------------------------------------------------

    def after(self, skipped: bool, found_inf: Tensor | None) -> None:
        """Shrink the weights where the gate was open; a step that was skipped changes nothing."""
        acts = self.pull.acts and not skipped
        falls = acts and self.pull.growth is not None and self.pull.growth < 0
        for chunk in self.chunks:
            step = self._step(chunk, not falls, found_inf) if acts else 0.0
            gate = chunk.gate() if acts and self.by_element and not falls else None
            if self.update == "dual_averaging":
                shrink_latent_weights(chunk, self.penalty, step, gate, skipped, falls)
            elif isinstance(step, Tensor) or step > 0:
                chunk.put_weight(self.penalty.shrink_(chunk.weight(), step, gate))
        if self.update == "dual_averaging":
            for chunk in self.chunks:  # slices of one tensor have one version
                chunk.versions = chunk.weight_versions()

    def _step(self, chunk: Chunk, gated: bool, found_inf: Tensor | None) -> float | Tensor:
        """How far weights are shrunk, lr·λ·κ or growth·κ, 0 where a tensor is closed: one number, or one a weight."""
        growth = self.pull.growth
        pull, size = (self.pull.strength, step_size(chunk)) if growth is None else (growth, kappa(chunk))
        size = size * (pull * chunk.relative)
        opened = None if self.by_element or not gated else chunk.opened
        if opened is None and found_inf is None and (isinstance(size, float) or size.dim() == 0):
            return size
        sizes = torch.as_tensor(size, dtype=accumulation_dtype(chunk.device), device=chunk.device)
        if sizes.dim() == 0:
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
        where = self._indices[index]
        return values[where] if isinstance(where, slice) else values.index_select(0, where)


def _index(positions: list[int], device: torch.device) -> slice | Tensor:
    """By which numbers at these positions are taken: a slice where they follow each other, which costs nothing."""
    first, last = positions[0], positions[-1] + 1
    return slice(first, last) if last - first == len(positions) else torch.tensor(positions, device=device)
