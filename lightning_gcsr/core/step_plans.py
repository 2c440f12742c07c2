"""The plans of all optimizers of a module, and what they know of its weights from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gcsr.core.chunk_layout import cut
from lightning_gcsr.core.chunks import Chunk, Scratch, kept_of, put_kept
from lightning_gcsr.core.coupled_penalty import CoupledGroupLasso
from lightning_gcsr.core.coupled_selection import check_coupled, check_one_step_size
from lightning_gcsr.core.gate import Gate
from lightning_gcsr.core.members import Member
from lightning_gcsr.core.numerics import accumulation_dtype
from lightning_gcsr.core.optimizers import accumulates_squares, stepped_parameters
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.pull import step_size
from lightning_gcsr.core.sharding import local_part, sharded_like, whole_gradient
from lightning_gcsr.core.step_plan import StepPlan

__all__ = ["KEPT", "StepPlans"]

KEPT = {"averages": "average", "latent_weights": "latent", "thresholds": "threshold"}
"""What is kept of each weight, a number a weight: its key in a state dict, and its name in a chunk."""


class StepPlans:
    """Makes the plan of each step, and makes it anew only where other parameters have a gradient than before.

    Args:
        penalty: The penalty.
        gate: The gate.
        update: What happens where the gate is open.
    """

    def __init__(self, penalty: Penalty, gate: Gate | None, update: str) -> None:
        self._penalty, self._gate, self._update = penalty, gate, update
        self._scratch = Scratch()
        self._chunks: dict[str, list[Chunk]] = {}
        self._members: dict[str, Member] = {}
        self._stepped: dict[tuple[tuple[int, ...], ...], list[list[Member]]] = {}
        self._plans: dict[tuple[tuple[int, int], ...], StepPlan] = {}
        self._loaded: dict[str, dict[str, Any]] = {}
        self.unaveraged: set[str] = set()
        """The parameters with sparse gradients, which are measured without averaging."""

    def of(self, optimizer: Optimizer, names: Mapping[int, str], relative: Mapping[str, float]) -> StepPlan | None:
        """The plan for the regularized parameters that have a gradient; ``None`` if there are none.

        Args:
            optimizer: The optimizer about to step.
            names: The names of the regularized parameters by their ``id``.
            relative: What the strength is multiplied by for each of them.
        """
        present, places_in_groups = [], []
        of_groups = self._stepped_by(optimizer, names, relative)
        for place, (group, members) in enumerate(zip(optimizer.param_groups, of_groups, strict=True)):
            for member in members:
                if (gradient := member.parameter.grad) is not None:
                    if member.sharded or gradient.is_sparse:
                        self._prepare_gradient(member, gradient)
                    member.group = group  # loading an optimizer's state replaces its groups
                    present.append(member)
                    places_in_groups.append((id(member), place))
        if not present:
            return None
        if self._penalty.coupled:
            places = {name: place for place, name in enumerate(names.values())}
            present.sort(key=lambda member: places[member.name])  # in one order, whatever that of the optimizer
            check_coupled({member.name: member.parameter for member in present}, places)
        key = tuple(places_in_groups)
        if key not in self._plans:
            self._plans[key] = self._make(optimizer, present)
        return self._plans[key]

    def _stepped_by(
        self, optimizer: Optimizer, names: Mapping[int, str], relative: Mapping[str, float]
    ) -> list[list[Member]]:
        """What an optimizer steps of the regularized parameters, by parameter group; looked up once."""
        key = tuple(tuple(map(id, group["params"])) for group in optimizer.param_groups)
        if key not in self._stepped:
            for name, parameter, group in stepped_parameters(optimizer, names):
                if name not in self._members and parameter.numel() > 0:
                    self._members[name] = Member(name, parameter, group, relative[name])
            by_id = {id(member.parameter): member for member in self._members.values()}
            self._stepped[key] = [[by_id[i] for i in ids if i in by_id] for ids in key]
        return self._stepped[key]

    def _prepare_gradient(self, member: Member, gradient: Tensor) -> None:
        """Add up what are summands yet: the entries of a sparse gradient, and the parts of a sharded one."""
        if gradient.is_sparse:
            self._check_sparse(member.name, gradient)
            member.parameter.grad = gradient.coalesce()
        else:
            member.parameter.grad = whole_gradient(member.parameter)

    def _check_sparse(self, name: str, gradient: Tensor) -> None:
        if gradient.sparse_dim() != 1:
            raise ValueError(
                f"The gradient of {name!r} is sparse in {gradient.sparse_dim()} dimensions; only sparse rows are"
                " supported, as an Embedding has. `exclude` the parameter, or make its gradient dense."
            )
        if self._gate is not None and self._gate.uses_previous_gradient:
            raise ValueError(
                f"coherence='temporal' does not go with the sparse gradient of {name!r}, whose rows change from step to"
                " step. Use another measure or a dense gradient, or `exclude` the parameter."
            )
        if self._gate is not None and self._gate.averaging:
            self.unaveraged.add(name)

    def _make(self, optimizer: Optimizer, members: list[Member]) -> StepPlan:
        self._break_up({member.name for member in members})
        new = [member for member in members if member.name not in self._chunks]
        for chunk in cut(new, self._penalty, self._scratch, self._loaded.get("counts", {})):
            for member in chunk.members:
                self._chunks.setdefault(member.name, []).append(chunk)
        for member in new:
            self._restore(member.name)
        chunks = list({id(chunk): chunk for member in members for chunk in self._chunks[member.name]}.values())
        sums_squares = accumulates_squares(optimizer.state.get(members[0].parameter, {}))
        penalty = self._penalty
        if isinstance(penalty, CoupledGroupLasso):
            check_one_step_size(members)
            penalty = penalty.laid_out({member.name: member.parameter for member in members})
        return StepPlan(chunks, penalty, self._gate, self._update, sums_squares)

    def _break_up(self, names: set[str]) -> None:
        """Take apart the chunks of which only some parameters have a gradient, or that are of several groups now."""
        for chunk in {id(chunk): chunk for chunks in self._chunks.values() for chunk in chunks}.values():
            own = {member.name for member in chunk.members}
            mixed = len({id(member.group) for member in chunk.members}) > 1 and not self._penalty.coupled
            if own & names and (mixed or not own <= names):
                self._chunks |= {alone.members[0].name: [alone] for alone in chunk.broken_up()}
                self._plans.clear()

    def step_size(self, name: str) -> float:
        """lr·κ of this parameter; 0 where it is not known yet. Synchronizes with the host."""
        if name not in self._chunks:
            return 0.0
        chunk = self._chunks[name][0]
        size = step_size(chunk)
        return float(size[chunk.index(name)] if isinstance(size, Tensor) and size.dim() else size)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What is known of each parameter, by what it is and by name; tensors are sharded as their parameters are."""
        temporal = self._gate is not None and self._gate.uses_previous_gradient
        state: dict[str, dict[str, Any]] = {
            key: dict(self._loaded.get(key, {})) for key in (*KEPT, "counts", "mean_squares")
        }
        for name, chunks in self._chunks.items():
            parameter = self._members[name].parameter
            for key, what in KEPT.items():
                if what in chunks[0].kept and not (temporal and what == "average"):
                    state[key][name] = sharded_like(kept_of(chunks, name, what), parameter)
            if not temporal:
                state["counts"][name] = int(chunks[0].count)
            if (square := chunks[0].mean_square) is not None:
                state["mean_squares"][name] = float(square[chunks[0].index(name)])
        return {key: values for key, values in state.items() if values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; each parameter's part at its first step."""
        for known in (self._members, self._stepped, self._chunks, self._plans):
            known.clear()
        self._loaded = {key: dict(state[key]) for key in (*KEPT, "counts", "mean_squares") if key in state}
        if self._gate is None or not self._gate.averaging:
            self._loaded.pop("averages", None)
        if self._update != "dual_averaging":
            self._loaded.pop("latent_weights", None)
            self._loaded.pop("thresholds", None)

    def _restore(self, name: str) -> None:
        chunks = self._chunks[name]
        for key, what in KEPT.items():
            if (value := self._loaded.get(key, {}).pop(name, None)) is not None:
                put_kept(chunks, name, what, local_part(value))
        count = self._loaded.get("counts", {}).pop(name, None)
        square = self._loaded.get("mean_squares", {}).pop(name, None)
        for chunk in chunks:
            device = chunk.device
            if count is not None:
                chunk.count = count if device.type == "cpu" else torch.tensor(count, device=device)
            if square is not None:
                if chunk.mean_square is None:
                    chunk.mean_square = torch.zeros(len(chunk.members), dtype=accumulation_dtype(device), device=device)
                chunk.mean_square[chunk.index(name)] = square
            if "latent" in chunk.kept:
                chunk.versions = chunk.weight_versions()
