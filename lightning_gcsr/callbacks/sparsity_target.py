"""The way to ``target_sparsity``: when the strength of a regularizer is adapted during a training, and from where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

from torch.optim import Optimizer

from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.core.schedule import Clock
from lightning_gcsr.core.sparsity_controller import SparsityController, dissolving_strength

__all__ = ["SparsityTarget"]


class SparsityTarget:
    """Sets the strength of a regularizer before each step, so that the sparsity arrives at the target.

    There is no penalty until the first step in which it may act has shown how far a proximal step goes; from that a
    first strength is guessed, at which the weights would dissolve within the training if there were no loss.

    Args:
        target: The fraction of the trained weights that shall be zero at the end, in (0, 1).
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.controller: Optional[SparsityController] = None
        """What adapts the strength, from the first step with a penalty on."""
        self.total_steps: Optional[int] = None
        """The number of optimizer steps of the training, as far as it is known: only the guess depends on it."""
        self._began: Optional[Clock] = None
        self._steps = 0
        self._planned = 1

    def before_step(self, regularizer: CoherentRegularizer, clock: Clock) -> None:
        """Set the strength of the coming step. Synchronizes with the host where the strength is adapted."""
        if not regularizer.schedule.acts(clock):
            return
        if self._began is None:
            self._began = clock
        if self.controller is None:
            regularizer.strength = 0.0
            return
        if self.controller.due(self._steps):
            step = round(regularizer.phase(clock) * self._planned)
            self.controller.adapt(step, regularizer.sparsity())
        self._steps += 1
        regularizer.strength = self.controller.strength

    def after_measuring(self, regularizer: CoherentRegularizer, optimizer: Optimizer, clock: Clock) -> None:
        """Guess a first strength, once a step has shown the gradients and a penalty may act."""
        if self.controller is not None or self._began is None:
            return
        steps = self._steps_left(regularizer, clock)
        ratios = _full_rate_ratios(regularizer, optimizer)
        paths = {
            name: float(size) * ratios.get(name, 1.0) * steps
            for name, size in regularizer.step_sizes(optimizer).items()
        }
        paths = {name: path for name, path in paths.items() if math.isfinite(path)}
        self._start(dissolving_strength(regularizer.spans(), paths), steps)

    def _start(self, strength: float, planned: int) -> None:
        self._planned = planned
        self.controller = SparsityController(self.target, strength, 0, planned)

    def _steps_left(self, regularizer: CoherentRegularizer, clock: Clock) -> int:
        stop = regularizer.schedule.stop
        total = self.total_steps
        if isinstance(stop, float) and total is not None:
            total = round(stop * total)
        elif isinstance(stop, int):
            total = stop if total is None else min(stop, total)
        return max(1, (total or 1000) - clock.step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: plain numbers."""
        controller = None if self.controller is None else self.controller.state_dict()
        began = None if self._began is None else list(self._began)
        return {"controller": controller, "began": began, "steps": self._steps, "planned": self._planned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self._began = None if state["began"] is None else Clock(*state["began"])
        self._steps = state["steps"]
        if state["controller"] is not None:
            self._start(1.0, state["planned"])
            assert self.controller is not None
            self.controller.load_state_dict(state["controller"])


def _full_rate_ratios(regularizer: CoherentRegularizer, optimizer: Optimizer) -> dict[str, float]:
    """By how much the learning rate is below the one that its schedule starts from, a warm-up say; by name.

    The first strength need not be right within an order of magnitude, but a rate near 0 says nothing.
    """
    names = {id(parameter): name for name, parameter in regularizer.parameters.items()}
    ratios: dict[str, float] = {}
    for group in optimizer.param_groups:
        rate, initial = float(group["lr"]), float(group.get("initial_lr", 0.0))
        ratio = max(1.0, initial / rate) if rate > 0 else math.inf
        ratios |= {names[id(parameter)]: ratio for parameter in group["params"] if id(parameter) in names}
    return ratios
