"""The plan of one optimizer's step: its chunks, and the order in which the functions of a step run over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk, Member, gradients_of
from lightning_gcsr.core.coherence import GradientStatistics, companion
from lightning_gcsr.core.collected import CollectedStatistics
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.latent_weights import follow_replaced_weights, shrink_latent_weights, use_latent_weights
from lightning_gcsr.core.numerics import accumulation_dtype, host_number, wide
from lightning_gcsr.core.optimizers import learning_rate, momentum_factor, rescales_gradients, square_decay
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.sharding import is_sharded, replication_factors, sum_over_processes
from lightning_gcsr.core.step import average_in, gates_by_element, gates_by_sign, inject

__all__ = ["StepPlan", "UpdateName"]

UpdateName = str


@dataclass
class StepPlan:
    """What one optimizer's step does to the regularized weights that have a gradient in it."""

    members: list[Member]
    """These weights, in the optimizer's order."""
    chunks: list[Chunk]
    penalty: Penalty
    gate: Gate | None
    update: UpdateName
    sums_squares: bool = False
    """Whether the optimizer divides by the root of a sum of squared gradients, as Adagrad does, not of an average."""

    def __post_init__(self) -> None:
        self.device = self.members[0].parameter.device
        self.sharded = any(is_sharded(member.parameter) for member in self.members)
        self._replication = replication_factors(member.parameter for member in self.members)
        positions = {member.name: i for i, member in enumerate(self.members)}
        self._positions = [[positions[member.name] for member in chunk.members] for chunk in self.chunks]

    # -- before the optimizer's step ---------------------------------------------------------------------------------

    def before(self, strength: float, loss_scale: float | Tensor, report: bool) -> tuple[GateReport | None, Tensor]:
        """Measure, decide, and inject or note what to shrink.

        Returns:
            The report, if it is wanted, and whether all gradients were finite, a 0-dim boolean.
        """
        squares = self._gradient_squares(loss_scale)
        collected = CollectedStatistics(self.members, self.sharded, self._replication)
        together = self.gate is not None and not self.gate.by_element
        # Sharded gradients are added up over processes once. Where sums for the decision are, they say all; averages must
        # know before whether the gradients are finite.
        early = not together or self._averages
        if self.sharded and early:
            squares = self._over_processes(squares)
        finite = squares.sum().isfinite()
        for i, chunk in enumerate(self.chunks):
            if self.update == "dual_averaging":
                follow_replaced_weights(chunk, self.penalty)
            self._visit(i, strength, loss_scale, finite, collected, report or together)
        if together:
            sums = collected.statistics()
            finite = sums.finite
            squares = sums.loss_gradient_square
            opened = self._decide(sums)
            for i, chunk in enumerate(self.chunks):
                self._act_by_tensor(chunk, self._of(i, opened), strength, loss_scale)
                collected.count_tensors(self._positions[i], chunk, opened, strength)
        for i, chunk in enumerate(self.chunks):
            if not early:
                self._count(chunk, finite)
            self._take_squares(chunk, self._of(i, squares), finite)
            if self.update == "dual_averaging":
                use_latent_weights(chunk, starts=strength > 0)
        return (collected.report(strength, squares, self.gate is not None) if report else None), finite

    @property
    def _averages(self) -> bool:
        return self.gate is not None and (self.gate.uses_previous_gradient or bool(self.gate.averaging))

    def _gradient_squares(self, loss_scale: float | Tensor) -> Tensor:
        """⟨g,g⟩ of each tensor as far as this process holds it, without loss scale, shape (n,)."""
        dtype = accumulation_dtype(self.device)
        norms = _norms([member.gradient for member in self.members])
        together = torch.stack([norm if norm.device == self.device else norm.to(self.device) for norm in norms]).to(
            dtype
        )
        if isinstance(loss_scale, Tensor) or loss_scale != 1:
            together = together / loss_scale
        return together.square()

    def _over_processes(self, numbers: Tensor) -> Tensor:
        parts = zip(numbers.unbind(), self._replication, strict=True)
        return sum_over_processes(torch.stack([number * factor for number, factor in parts]))

    def _visit(
        self,
        index: int,
        strength: float,
        loss_scale: float | Tensor,
        finite: Tensor,
        collected: CollectedStatistics,
        measures: bool,
    ) -> None:
        """Take one chunk's gradients into the averages and measure; act, where no decision needs other chunks."""
        chunk, gate = self.chunks[index], self.gate
        own_strength = strength * chunk.members[0].relative
        has_predecessor = None if chunk.count is None else chunk.count > 0
        if gate is None or gate.by_element or self._averages:
            self._count(chunk, finite)
        if gate is None:
            opened = finite.expand(len(self.members))
            self._act_by_tensor(chunk, self._of(index, opened), strength, loss_scale)
            collected.count_tensors(self._positions[index], chunk, opened, strength)
            if not measures:
                return
        loss_gradients = gradients_of(chunk, loss_scale)
        gradients = self._averaged(chunk, loss_gradients, finite)
        weights = chunk.read(chunk.weight_views(), "weight")
        if measures:
            penalty_gradients = self.penalty.gradients(weights)
            companions = self._companions(chunk, gradients, penalty_gradients, own_strength)
            lists = (gradients, companions, penalty_gradients, loss_gradients)
            collected.add(self._positions[index], chunk, lists)
        if gate is None:
            return
        gates: list[Tensor] = []
        if gate.by_element and strength > 0:
            if gate.uses_previous_gradient:
                gates = gates_by_sign(gradients, chunk.keep_like(gradients, "average"))
                opened = finite & (torch.zeros_like(finite) if has_predecessor is None else has_predecessor)
            else:
                gates, opened = gates_by_element(gradients, weights, self.penalty, gate, own_strength), finite
            _close(gates, opened)
        if gate.uses_previous_gradient:  # after they were compared, and before the penalty joins the gradients
            self._average(chunk, loss_gradients, host_number(finite.to(torch.float32)))
        if gates:
            if measures:
                collected.count_elements(self._positions[index], chunk, gates)
            self._act_by_element(chunk, gates, strength, loss_scale)

    def _count(self, chunk: Chunk, finite: Tensor) -> None:
        if chunk.count is None:
            chunk.count = torch.zeros((), dtype=torch.int64, device=finite.device)
        chunk.count += finite

    def _averaged(self, chunk: Chunk, gradients: list[Tensor], finite: Tensor) -> list[Tensor]:
        """What coherence is measured on: the gradients, or the averages that they now are part of."""
        # The rows of a sparse gradient change from step to step, so they are measured as they are.
        if self.gate is None or not self.gate.averaging or chunk.members[0].rows is not None:
            return gradients
        assert chunk.count is not None
        weight = host_number(_ema_weight(self.gate.averaging, chunk.count, finite))
        return self._average(chunk, gradients, weight)

    @staticmethod
    def _average(chunk: Chunk, gradients: list[Tensor], weight: float | Tensor) -> list[Tensor]:
        averages = chunk.keep_like(gradients, "average")
        if isinstance(weight, Tensor) or weight > 0:
            average_in(averages, gradients, weight)
        return averages

    def _companions(
        self, chunk: Chunk, gradients: list[Tensor], penalty_gradients: list[Tensor], strength: float
    ) -> list[Tensor]:
        if self.gate is None or self.gate.coherence == "agreement":
            return penalty_gradients
        if self.gate.uses_previous_gradient:
            return chunk.keep_like(gradients, "average")
        return [
            companion(self.gate.coherence, gradient, penalty_gradient, strength)
            for gradient, penalty_gradient in zip(gradients, penalty_gradients, strict=True)
        ]

    def _decide(self, sums: GradientStatistics) -> Tensor:
        assert self.gate is not None
        opened = self.gate.decide(sums)
        if self.gate.uses_previous_gradient:
            known = sums.companion_square > 0  # a tensor without predecessor has a companion of zeros
            opened = opened & (known.any() if self.gate.scope == "model" else known)
        return opened

    def _take_squares(self, chunk: Chunk, squares: Tensor, finite: Tensor) -> None:
        """Take this step's squared gradients into their running mean, where the optimizer rescales by such a one."""
        group = chunk.members[0].group
        if self.update == "gradient" or not rescales_gradients(group):
            return
        sizes = [max(1.0, float(member.size)) for member in chunk.members]
        mean = torch.stack([square / size for square, size in zip(squares.unbind(), sizes, strict=True)])
        if chunk.mean_square is None:
            chunk.mean_square = torch.zeros_like(mean)
        assert chunk.count is not None
        weight = finite if self.sums_squares else _ema_weight(square_decay(group), chunk.count, finite)
        change = mean if self.sums_squares else mean - chunk.mean_square
        chunk.mean_square = chunk.mean_square + torch.where(finite, change * weight, 0.0)

    # -- acting --------------------------------------------------------------------------------------------------------

    def _act_by_element(self, chunk: Chunk, gates: list[Tensor], strength: float, loss_scale: float | Tensor) -> None:
        if self.update == "gradient":
            self._inject(chunk, gates, strength, loss_scale)
        else:
            chunk.kept["gate"] = [gate.to(torch.int8) for gate in gates]

    def _act_by_tensor(self, chunk: Chunk, opened: Tensor, strength: float, loss_scale: float | Tensor) -> None:
        if strength == 0:
            return
        if self.update != "gradient":
            chunk.opened = opened
            return
        gates = chunk.numbers(opened.to(torch.float32))
        if any(isinstance(gate, Tensor) or gate > 0 for gate in gates):
            self._inject(chunk, gates, strength, loss_scale)

    def _inject(
        self, chunk: Chunk, gates: list[float] | list[Tensor], strength: float, loss_scale: float | Tensor
    ) -> None:
        views = chunk.gradient_views()
        gradients = chunk.read(views, "gradient")
        penalty_gradients = self.penalty.gradients(chunk.read(chunk.weight_views(), "weight"))
        factor = strength * chunk.members[0].relative
        if isinstance(loss_scale, Tensor):
            torch._foreach_mul_(penalty_gradients, loss_scale.to(penalty_gradients[0]))
        else:
            factor *= loss_scale
        inject(gradients, penalty_gradients, gates, factor)
        chunk.write(gradients, views)

    # -- after the optimizer's step ------------------------------------------------------------------------------------

    def after(self, strength: float, skipped: bool, found_inf: Tensor | None) -> None:
        """Shrink the weights where the gate was open; a step that was skipped changes nothing."""
        for chunk in self.chunks:
            noted, opened = chunk.kept.pop("gate", None), chunk.opened
            chunk.opened = None
            acts = not skipped and strength > 0 and (noted is not None or opened is not None)
            steps = self._steps(chunk, strength, opened, found_inf) if acts else []
            gates = [gate.to(chunk.real_dtype) for gate in noted] if acts and noted is not None else None
            if self.update == "dual_averaging":
                growth = steps if gates is None else list(torch._foreach_mul(gates, steps))  # type: ignore[arg-type]
                shrink_latent_weights(chunk, self.penalty, growth, skipped)
            elif acts:
                weights = chunk.read(chunk.weight_views(), "weight")
                chunk.write_weights(self.penalty.shrunk(weights, steps, gates))

    def _steps(
        self, chunk: Chunk, strength: float, opened: Tensor | None, found_inf: Tensor | None
    ) -> list[float] | list[Tensor]:
        """lr·λ·κ, one entry for each of the chunk's, 0 where a tensor is closed as a whole."""
        size = step_size(chunk) * (strength * chunk.members[0].relative)
        if opened is None and found_inf is None and isinstance(size, float):
            return [size] * (1 if chunk.joined else len(chunk.members))
        sizes = torch.as_tensor(size, dtype=accumulation_dtype(chunk.device), device=chunk.device)
        sizes = sizes.expand(len(chunk.members))
        if opened is not None:
            sizes = sizes * opened.to(sizes.device)
        if found_inf is not None:
            sizes = sizes * (found_inf.to(sizes.device) == 0)
        return chunk.numbers(sizes)

    def _of(self, index: int, values: Tensor) -> Tensor:
        """Of values for all members of the plan, shape (n,), those of one chunk's members."""
        positions = self._positions[index]
        first, last = positions[0], positions[-1] + 1
        if last - first == len(values):
            return values
        if last - first == len(positions):
            return values[first:last]
        return torch.stack([values[position] for position in positions])


def step_size(chunk: Chunk) -> float | Tensor:
    """lr·κ of a proximal step: one number for all tensors of the chunk, or a tensor of shape (number of tensors,).

    κ is what a steady gradient of size 1 moves a weight by, per unit of lr: (1 − dampening)/(1 − momentum) under SGD, and
    one over the root mean square of the tensor's gradient under an optimizer that rescales gradients. Where that is not
    known or zero, the step is 0: the penalty waits.
    """
    group = chunk.members[0].group
    rate = learning_rate(group)
    size = (host_number(rate) if isinstance(rate, Tensor) else float(rate)) * momentum_factor(group)
    if not rescales_gradients(group):
        return size
    if chunk.mean_square is None:
        return 0.0
    root = chunk.mean_square.sqrt()
    return torch.where((root > 0) & root.isfinite(), size / root, 0.0)


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """The norm of each gradient, in float32 at least."""
    if any(gradient.element_size() < 4 for gradient in gradients):
        gradients = [wide(gradient) for gradient in gradients]
    return list(torch._foreach_norm(gradients, 2))


def _close(gates: list[Tensor], opened: Tensor) -> None:
    """Close all gates where this is false."""
    factor = host_number(opened)
    if isinstance(factor, Tensor):
        torch._foreach_mul_(gates, factor.to(gates[0].device, gates[0].dtype))
    elif not factor:
        torch._foreach_zero_(gates)


def _ema_weight(decay: float, count: Tensor, finite: Tensor) -> Tensor:
    """What this gradient counts in a running average that weighs its gradients to a sum of 1; 0 if it is not finite."""
    exact = count.clamp(min=1).to(accumulation_dtype(count.device))
    return (1 - decay) / (1 - decay**exact) * finite
