"""The passes of one optimizer step over the weights: look whether gradients are finite, measure, decide, act."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gcsr.core.blocks import Block, Portion, blocks_of
from lightning_gcsr.core.gate_report import GateReport
from lightning_gcsr.core.gradient_average import GradientMemory
from lightning_gcsr.core.old_gate import Gate, Sums, by_row, element_coherent, inner_by_row, rough_square
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.settings import UpdateName
from lightning_gcsr.core.sharding import is_sharded, sum_over_processes
from lightning_gcsr.core.terms import Term

__all__ = ["Passes"]


class Passes:
    """One step. There is one pass where each weight decides for itself, and two where a decision needs sums before.

    Args:
        terms: The parameters that take part, at least one.
        penalty: The penalty.
        gate: The rule by which it is injected.
        memory: What remembers gradients, where the rule needs that.
        update: ``"gradient"`` injects at once, ``"proximal"`` leaves :attr:`shrinkages`.
        strength: The strength λ of this step.
        reports: Whether all numbers of the report are wanted, or only those that decide.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        penalty: Penalty,
        gate: Gate,
        memory: GradientMemory | None,
        update: UpdateName,
        strength: float,
        reports: bool,
    ) -> None:
        self.terms = terms
        self.penalty = penalty
        self.gate = gate
        self.memory = memory
        self.update = update
        self.strength = strength
        self.reports = reports
        self.names = [term.name for term in terms]
        self.blocks = blocks_of(terms, penalty, memory)
        self.device = terms[0].gradient.device
        self.sharded = any(is_sharded(term.parameter) for term in terms)
        self.partial = self.sharded and not gate.needs_sums
        self.averages = memory is not None and not gate.uses_previous_gradient
        self.shrinkages: list[tuple[Block, Tensor]] = []
        """What to shrink after the optimizer's step: blocks and their gates, 0 or 1."""
        self._finite = torch.zeros(0, dtype=torch.bool)
        self._sums: list[list[Tensor]] = [[] for _ in Sums._fields]
        self._counts: list[Tensor] = []

    @property
    def finite(self) -> Tensor:
        """Whether the loss gradient was finite, as far as this process knows; a 0-dim boolean."""
        return self._finite.all()

    def run(self) -> GateReport | None:
        """Make the step up to the optimizer's own; the report, if it is wanted."""
        squares: Sequence[Sequence[Tensor] | None] = [None] * len(self.blocks)
        shares: _Numbers | None = None
        sums: Sums | None = None
        if self.averages or not self.gate.needs_sums:
            squares = self._look()
            opened = self._finite
        if self.averages:
            shares = self._count_in()
        if self.gate.needs_sums:
            for block, square in zip(self.blocks, squares, strict=True):
                self._measure(self._portion(block, shares), square)
            sums = self._collected_sums()
            self._finite = sums.finite.expand(len(self.terms))
            opened = self.gate.decide(sums)
        if self.gate.uses_previous_gradient:
            assert self.memory is not None
            known = self.memory.known(self.names, self.device)  # where there is none to compare with, it suppresses
            opened = opened & (known.any() if self.gate.scope == "model" else known)
            shares = self._count_in()
        decisions, limits = _Numbers(opened), _Numbers(torch.where(opened, 0.0, torch.nan))
        for block, square in zip(self.blocks, squares, strict=True):
            if self.gate.needs_sums:
                portion = Portion(block, self.penalty)
            else:
                portion = self._portion(block, shares)
                if self.reports:
                    self._measure(portion, square)
            self._act(portion, decisions, limits, shares)
        return self._report(sums or self._collected_sums(), opened) if self.reports else None

    def _portion(self, block: Block, shares: _Numbers | None) -> Portion:
        portion = Portion(block, self.penalty)
        if self.averages:
            assert shares is not None
            portion.remember(shares.of(block, portion.memory.dtype))
        return portion

    def _count_in(self) -> _Numbers:
        """What this step's gradients count in the memory."""
        assert self.memory is not None
        return _Numbers(self.memory.count(self.names, self._finite))

    def _look(self) -> Sequence[Sequence[Tensor] | None]:
        """See whether the gradients are finite before anything rests on them; ⟨g,g⟩ of each block, if it is wanted."""
        if not (self.reports or self.gate.needs_sums or self.sharded):
            rough = [rough_square(Portion(block, self.penalty).loss_gradient) for block in self.blocks]
            together = torch.stack([square.to(self.device) for square in rough])
            self._finite = together.isfinite().all().expand(len(self.terms))
            return [None] * len(self.blocks)
        squares = [self._square(Portion(block, self.penalty)) for block in self.blocks]
        finite = self._added_up([[number for square in squares for number in square]])[0].isfinite()
        # Of sharded tensors a process knows its own parts only, and copies of a tensor must stay alike on all that
        # hold one: so each tensor is judged by itself.
        self._finite = finite if self.sharded else finite.all().expand(len(self.terms))
        return squares

    def _measure(self, portion: Portion, loss_square: Sequence[Tensor] | None) -> None:
        """Add the block to the sums."""
        block, relative = portion.block, portion.block.term.relative
        gradient = self._measured(portion)
        penalty_gradient, companion = portion.penalty_gradient, self._companion(portion)

        def inner(a: Tensor, b: Tensor) -> Sequence[Tensor]:
            return inner_by_row(a, b, block.rows)

        loss_square = self._square(portion) if loss_square is None else loss_square
        square = inner(gradient, gradient) if self.averages else loss_square
        product = inner(gradient, companion)
        if self._is_sign(companion, portion) and block.rows == 1:
            companion_square: Sequence[Tensor] = [rough_square(companion)]  # of few enough ones it is exact
        else:
            companion_square = inner(companion, companion)
        if companion is penalty_gradient:
            product, companion_square = _times(product, relative), _times(companion_square, relative**2)
            penalty_square = companion_square
        elif self.reports:
            penalty_square = _times(inner(penalty_gradient, penalty_gradient), relative**2)
        else:
            penalty_square = companion_square  # nobody looks at it
        row = (square, product, companion_square, penalty_square, loss_square)
        for column, numbers in zip(self._sums, row, strict=True):
            column.extend(numbers)

    def _square(self, portion: Portion) -> Sequence[Tensor]:
        return inner_by_row(portion.loss_gradient, portion.loss_gradient, portion.block.rows)

    def _measured(self, portion: Portion) -> Tensor:
        """What coherence is measured on: this step's gradient, or the average that it now is part of."""
        return portion.memory if self.averages else portion.loss_gradient

    def _companion(self, portion: Portion) -> Tensor:
        if self.gate.uses_previous_gradient:
            return portion.memory
        strength = self.strength * portion.block.term.relative
        return self.gate.companion(self._measured(portion), portion.penalty_gradient, strength)

    def _act(self, portion: Portion, opened: _Numbers, limits: _Numbers, shares: _Numbers | None) -> None:
        """Inject into the block, or note what to shrink; and remember its gradient for the next step."""
        block, term = portion.block, portion.block.term
        gate = None
        if self.strength > 0 and self.gate.by_element:
            gate = self._element_gate(portion, limits)
            if self.reports:
                self._counts.extend(by_row(gate, block.rows))
        if self.gate.uses_previous_gradient:  # after it was compared, and before the penalty joins the gradient
            assert shares is not None
            portion.remember(shares.of(block, portion.memory.dtype))
        if self.strength == 0:
            return
        if self.update == "proximal":
            self.shrinkages.append((block, opened.of(block, torch.int8) if gate is None else gate.to(torch.int8)))
            return
        factor = opened.of(block, portion.penalty_gradient.dtype.to_real()) if gate is None else gate
        block.inject(portion.penalty_gradient, factor * term.loss_scale if term.is_scaled else factor, self.strength)

    def _element_gate(self, portion: Portion, limits: _Numbers) -> Tensor:
        """Where the gradient, eased by the tolerance, agrees in sign with its companion: 0 or 1 for each weight.

        The limit is 0, or NaN where the gates of the tensor are closed as a whole, which saves an operation.
        """
        gradient, companion = self._measured(portion), self._companion(portion)
        limit = limits.of(portion.block, gradient.dtype.to_real())
        easing = self.gate.tolerance * self.strength * portion.block.term.relative
        if self._is_sign(companion, portion):
            return torch.mul(gradient, companion).ge_(limit - easing)  # (g + c·r)·r ≥ 0 in fewer operations
        if easing > 0:
            gradient = torch.add(gradient, portion.penalty_gradient, alpha=easing)
        return element_coherent(gradient, companion, limit)

    def _is_sign(self, companion: Tensor, portion: Portion) -> bool:
        """Whether the companion consists of −1, 0 and 1."""
        return companion is portion.penalty_gradient and self.penalty.gradient_is_sign and not companion.is_complex()

    # -- sums over blocks --------------------------------------------------------------------------------------------

    def _added_up(self, columns: Sequence[Sequence[Tensor]]) -> Tensor:
        """The sums of each term from those of its part in each block, shape (columns, n), float64 (float32 on MPS)."""
        positions = [position for block in self.blocks for position in block.positions]
        numbers = torch.stack([number.to(self.device) for column in columns for number in column])
        numbers = numbers.to(torch.float32 if self.device.type == "mps" else torch.float64).view(len(columns), -1)
        if positions != list(range(len(self.terms))):
            # The blocks of one term follow each other.
            counts = [len(list(group)) for _, group in itertools.groupby(positions)]
            parts = torch.split(numbers, counts, dim=1)
            of_term = {position: part.sum(1) for position, part in zip(dict.fromkeys(positions), parts, strict=True)}
            numbers = torch.stack([of_term[position] for position in range(len(self.terms))], dim=1)
        return self._for_each_term(numbers, [term.share for term in self.terms]) if self.sharded else numbers

    @staticmethod
    def _for_each_term(numbers: Tensor, factors: Sequence[float]) -> Tensor:
        """The numbers, of which the last dimension is that of the terms, times the factor of each.

        Without a tensor of factors: to bring it to a GPU, the host would wait.
        """
        return torch.stack([n * factor for n, factor in zip(numbers.unbind(-1), factors, strict=True)], dim=-1)

    def _collected_sums(self) -> Sums:
        sums = self._added_up(self._sums)
        return Sums(*(sum_over_processes(sums) if self.sharded and not self.partial else sums))

    def _report(self, sums: Sums, opened: Tensor) -> GateReport:
        if self.strength == 0:
            injected = torch.zeros_like(sums.product)
        elif self.gate.by_element:
            injected = self._added_up([self._counts])[0]
        else:
            # One decision covers the whole tensor, or where it was made from a part, the part.
            covered = [term.gradient.numel() * term.share if self.partial else term.size for term in self.terms]
            injected = self._for_each_term(opened.to(sums.product.dtype), covered)
        return GateReport(
            names=tuple(self.names),
            sizes=tuple(term.size for term in self.terms),
            sums=sums,
            injected_weights=injected,
            current_strength=self.strength,
            measured=self.gate.coherence is not None,
            partial=self.partial,
        )


class _Numbers:
    """One number for each term, on the device and in the dtype in which it is asked for."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._made: dict[object, Sequence[Tensor]] = {}

    def of(self, block: Block, dtype: torch.dtype) -> Tensor:
        """Those of this block's terms, so that they broadcast to it."""
        device = block.term.gradient.device
        if (device, dtype) not in self._made:
            self._made[device, dtype] = self._values.to(device, dtype).unbind()
        return block.spread(self._made[device, dtype])


def _times(numbers: Sequence[Tensor], factor: float) -> Sequence[Tensor]:
    return numbers if factor == 1 else [number * factor for number in numbers]
