"""The plan of one optimizer's step: its chunks, and the order in which the functions of a step run over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk, Member
from lightning_gcsr.core.coherence import GradientStatistics, companion
from lightning_gcsr.core.collected import CollectedStatistics
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.latent_weights import follow_replaced_weights, shrink_latent_weights, use_latent_weights
from lightning_gcsr.core.numerics import accumulation_dtype, host_number, real_view, wide
from lightning_gcsr.core.optimizers import learning_rate, momentum_factor, rescales_gradients, square_decay
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.sharding import is_sharded, replication_factors, sum_over_processes
from lightning_gcsr.core.step import average_in, coherent_in_sign, element_gate, ema_weight, inject

__all__ = ["StepPlan", "step_size"]


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
        self.sharded = any(is_sharded(member.parameter) for member in self.members)
        self._replication = replication_factors(member.parameter for member in self.members)
        positions = {member.name: i for i, member in enumerate(self.members)}
        self._positions = [[positions[member.name] for member in chunk.members] for chunk in self.chunks]

    # -- before the optimizer's step ---------------------------------------------------------------------------------

    def before(
        self, strength: float, loss_scale: float | Tensor, report: bool
    ) -> tuple[GateReport | None, bool | Tensor]:
        """Measure, decide, and inject or note what to shrink.

        Returns:
            The report, if it is wanted, and whether all gradients were finite: on a CPU a boolean, else a tensor.
        """
        together = self.gate is not None and not self.gate.by_element
        rescaled = self.update != "gradient" and any(rescales_gradients(chunk.group) for chunk in self.chunks)
        # Sharded gradients are added up over processes once: where a decision rests on sums, with these, unless
        # averages must know before whether the gradients are finite.
        early = not together or self._averages
        by_tensor = report or rescaled or self.sharded or self.device.type != "cpu"
        squares = self._gradient_squares(loss_scale, early) if by_tensor else None
        finite = self._finite(squares)
        if early:
            self._count(finite)
        collected = CollectedStatistics(self.members, self.sharded, self._replication)
        for i in reversed(range(len(self.chunks))):  # the gradients of the last one are at hand
            if self.update == "dual_averaging":
                follow_replaced_weights(self.chunks[i], self.penalty)
            self._visit(i, strength, loss_scale, finite, collected, report or together)
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
                self._act_by_tensor(chunk, self._of(i, opened), strength, loss_scale)
        if not early:
            self._count(finite)
        for i, chunk in enumerate(self.chunks):
            if rescaled and squares is not None:
                self._take_squares(chunk, self._of(i, squares), finite)
            if self.update == "dual_averaging":
                use_latent_weights(chunk, starts=strength > 0)
        if not report:
            return None, finite
        assert squares is not None
        return collected.report(strength, squares, self.gate is not None, opened, sums), finite

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

    def _count(self, finite: bool | Tensor) -> None:
        """Count this step, where it is finite, once for all chunks that have counted the same steps."""
        counts = {id(chunk.count): chunk.count + finite for chunk in self.chunks}
        for chunk in self.chunks:
            chunk.count = counts[id(chunk.count)]
        self._weights: dict[tuple[float, int], float | Tensor] = {}

    def _ema_weight(self, decay: float, chunk: Chunk, finite: bool | Tensor) -> float | Tensor:
        """What this step's gradient weighs in a running average with this decay."""
        key = (decay, id(chunk.count))
        if key not in self._weights:
            self._weights[key] = ema_weight(decay, chunk.count, finite)
        return self._weights[key]

    def _over_processes(self, numbers: Tensor) -> Tensor:
        parts = zip(numbers.unbind(), self._replication, strict=True)
        return sum_over_processes(torch.stack([number * factor for number, factor in parts]))

    def _visit(
        self,
        index: int,
        strength: float,
        loss_scale: float | Tensor,
        finite: bool | Tensor,
        collected: CollectedStatistics,
        measures: bool,
    ) -> None:
        """Take one chunk's gradients into the average and measure; act, where no decision needs other chunks."""
        chunk, gate, positions = self.chunks[index], self.gate, self._positions[index]
        if gate is None:
            opened = self._for_all(finite)
            self._act_by_tensor(chunk, self._of(index, opened), strength, loss_scale)
            if not measures:
                return
        loss_gradient = self._loss_gradient(chunk, loss_scale)
        gradient = self._averaged(chunk, loss_gradient, finite)
        weight = chunk.weight()
        own_strength = strength * chunk.relative
        if measures:
            penalty_gradient = self.penalty.gradient(weight)
            compared = self._companion(chunk, gradient, penalty_gradient, own_strength)
            collected.add(positions, chunk, (gradient, compared, penalty_gradient, loss_gradient))
        if gate is None:
            return
        opens: Tensor | None = None
        if gate.by_element and strength > 0:
            if gate.uses_previous_gradient:
                opens = coherent_in_sign(gradient, chunk.keep("average", gradient.dtype))
                _close(opens, finite & (chunk.count > 1))
            else:
                opens = element_gate(gradient, weight, self.penalty, gate, own_strength)
                _close(opens, finite)
        if gate.uses_previous_gradient:  # after they were compared, and before the penalty joins the gradient
            average_in(chunk.keep("average", gradient.dtype), loss_gradient, _as_number(finite))
        if opens is not None:
            if measures:
                collected.count_elements(positions, chunk, opens)
            self._act_by_element(chunk, opens, strength, loss_scale)

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
            known = sums.companion_square > 0  # a tensor without predecessor has a companion of zeros
            opened = opened & (known.any() if self.gate.scope == "model" else known)
        return opened

    def _take_squares(self, chunk: Chunk, squares: Tensor, finite: bool | Tensor) -> None:
        """Take this step's squared gradients into their running mean, where the optimizer rescales by such a one."""
        if not rescales_gradients(chunk.group) or finite is False:
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

    def _act_by_element(self, chunk: Chunk, gate: Tensor, strength: float, loss_scale: float | Tensor) -> None:
        if self.update == "gradient":
            self._inject(chunk, gate, strength, loss_scale)
        elif chunk.members[0].rows is None:
            chunk.keep("gate", torch.int8).copy_(gate)
            chunk.gated = True
        else:
            chunk.kept["gate"], chunk.gated = gate, True

    def _act_by_tensor(self, chunk: Chunk, opened: Tensor, strength: float, loss_scale: float | Tensor) -> None:
        if strength == 0:
            return
        if self.update != "gradient":
            chunk.opened = opened
            return
        gate = chunk.spread(opened.to(torch.float32))
        if isinstance(gate, Tensor) or gate > 0:
            self._inject(chunk, gate, strength, loss_scale)

    def _inject(self, chunk: Chunk, gate: float | Tensor, strength: float, loss_scale: float | Tensor) -> None:
        gradient = chunk.gradient()
        penalty_gradient = self.penalty.gradient(chunk.weight())
        inject(gradient, penalty_gradient, gate, loss_scale * (strength * chunk.relative))
        chunk.put_gradient(gradient)

    # -- after the optimizer's step ------------------------------------------------------------------------------------

    def after(self, strength: float, skipped: bool, found_inf: Tensor | None) -> None:
        """Shrink the weights where the gate was open; a step that was skipped changes nothing."""
        for chunk in self.chunks:
            opened, gated = chunk.opened, chunk.gated
            chunk.opened, chunk.gated = None, False
            acts = not skipped and strength > 0 and (gated or opened is not None)
            step = self._step(chunk, strength, opened, found_inf) if acts else 0.0
            gate = self._kept_gate(chunk) if acts and gated else None
            if self.update == "dual_averaging":
                shrink_latent_weights(chunk, self.penalty, step, gate, skipped)
            elif isinstance(step, Tensor) or step > 0:
                chunk.put_weight(self.penalty.shrink_(chunk.weight(), step, gate), in_place=True)
        if self.update == "dual_averaging":
            for chunk in self.chunks:  # slices of one tensor have one version
                chunk.versions = chunk.weight_versions()

    @staticmethod
    def _kept_gate(chunk: Chunk) -> Tensor:
        """The gates of a chunk as floating-point numbers, in a buffer."""
        kept = chunk.kept["gate"]
        if kept.is_floating_point():
            return chunk.kept.pop("gate")
        return chunk.gate_buffer().copy_(kept)

    def _step(self, chunk: Chunk, strength: float, opened: Tensor | None, found_inf: Tensor | None) -> float | Tensor:
        """lr·λ·κ, 0 where a tensor is closed as a whole; one number, or one for each weight."""
        size = step_size(chunk) * (strength * chunk.relative)
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
        positions = self._positions[index]
        first, last = positions[0], positions[-1] + 1
        if len(positions) == len(values):
            return values
        if last - first == len(positions):
            return values[first:last]
        return torch.stack([values[position] for position in positions])


def step_size(chunk: Chunk) -> float | Tensor:
    """lr·κ of a proximal step: one number for all tensors of the chunk, or a tensor of shape (number of tensors,).

    κ is what a steady gradient of size 1 moves a weight by, per unit of lr: (1 − dampening)/(1 − momentum) under SGD,
    and one over the root mean square of the tensor's gradient under an optimizer that rescales gradients. Where that is
    not known or zero, the step is 0: the penalty waits.
    """
    group = chunk.group
    rate = learning_rate(group)
    size = (host_number(rate) if isinstance(rate, Tensor) else float(rate)) * momentum_factor(group)
    if not rescales_gradients(group):
        return size
    if chunk.mean_square is None:
        return 0.0
    return (chunk.mean_square.rsqrt() * size).nan_to_num(0.0, 0.0, 0.0)


def host_bool(value: Tensor) -> bool | Tensor:
    """A 0-dim boolean as it is, but on a CPU, where reading it is free, as a plain one."""
    number = host_number(value)
    return number if isinstance(number, Tensor) else bool(number)


def _as_number(finite: bool | Tensor) -> float | Tensor:
    return finite.to(torch.float32) if isinstance(finite, Tensor) else float(finite)


def _close(gate: Tensor, opened: bool | Tensor) -> None:
    """Close all gates where this is false."""
    if isinstance(opened, Tensor):
        gate.mul_(opened)
    elif not opened:
        gate.zero_()
