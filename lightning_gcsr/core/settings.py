"""The settings of a regularizer, checked as soon as they are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Union

from lightning_gcsr.core.old_gate import CoherenceMeasure, Gate, MeasureName, ScopeName
from lightning_gcsr.core.parameter_selection import StrengthScale, check_patterns, check_strength
from lightning_gcsr.core.penalties import Penalty, PenaltyName, resolve_penalty
from lightning_gcsr.validation import argument_error, check_choice, check_finite_number, check_integer

__all__ = ["Settings", "Steps", "UpdateName", "check_steps", "in_steps"]

UpdateName = Literal["gradient", "proximal"]
Steps = Union[int, float]
"""A number of optimizer steps, or as a float in [0, 1] a share of the whole training."""


def check_steps(name: str, value: object, advice: str) -> None:
    """Raise unless ``value`` is an integer of at least 0, or a float in [0, 1]: a share of the training."""
    if isinstance(value, float):
        check_finite_number(name, value, 0.0, 1.0, f"A float is a share of the training. {advice}")
    else:
        check_integer(name, value, minimum=0, advice=advice)


def in_steps(value: Steps, total: int) -> int:
    """A number of steps as it is, and a share of the training as a number of steps.

    Example:
        >>> in_steps(200, total=1000), in_steps(0.3, total=1000)
        (200, 300)
    """
    return round(value * total) if isinstance(value, float) else value


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a regularizer needs to know besides the module; see ``CoherentRegularizer`` for each of them.

    Raises:
        ValueError: If a value breaks the rule of its setting.
        TypeError: If a value has the wrong type.

    Example:
        >>> settings = Settings(strength=0.1, delay_steps=10, warmup_steps=4, stop_steps=100)
        >>> [settings.strength_factor(step) for step in (0, 9, 10, 11, 13, 99, 100)]
        [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 0.0]
    """

    penalty: Union[Penalty, PenaltyName] = "l1"
    strength: Union[float, Mapping[str, float]]
    coherence: Union[CoherenceMeasure, MeasureName, None] = "agreement"
    scope: ScopeName = "element"
    threshold: Union[float, None] = None
    tolerance: float = 0.0
    averaging: float = 0.0
    strength_scale: StrengthScale = "uniform"
    update: UpdateName = "proximal"
    include: Union[Sequence[str], None] = None
    exclude: Union[Sequence[str], None] = None
    delay_steps: Steps = 0
    warmup_steps: Steps = 0
    stop_steps: Union[Steps, None] = None

    def __post_init__(self) -> None:
        resolve_penalty(self.penalty)
        check_strength(self.strength)
        Gate(self.coherence, self.scope, self.threshold, self.tolerance)
        check_finite_number("averaging", self.averaging, 0.0, 1.0, "Use 0 for this step's gradient alone.")
        if self.averaging == 1:
            raise argument_error("averaging", self.averaging, "must be less than 1", "0.98 looks back over 50 steps.")
        if self.averaging > 0 and self.coherence in ("temporal", None):
            rule = f"must be 0 where coherence={self.coherence!r}"
            raise argument_error("averaging", self.averaging, rule, "Use 'agreement' or 'direction', or leave it out.")
        check_choice("strength_scale", self.strength_scale, ["uniform", "fan_in"])
        check_choice("update", self.update, ["gradient", "proximal"])
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        check_steps("delay_steps", self.delay_steps, advice="Use 0 for no delay.")
        check_steps("warmup_steps", self.warmup_steps, advice="Use 0 for no warm-up.")
        if self.stop_steps is not None:
            check_steps("stop_steps", self.stop_steps, advice="Use None to never stop.")
            comparable = isinstance(self.stop_steps, float) is isinstance(self.delay_steps, float)
            if self.stop_steps == 0 or (comparable and self.stop_steps <= self.delay_steps):
                rule = f"must be greater than delay_steps={self.delay_steps}"
                advice = "The penalty acts between the two; use None to never stop."
                raise argument_error("stop_steps", self.stop_steps, rule, advice)

    @property
    def has_shares(self) -> bool:
        """Whether a number of steps is given as a share of the training."""
        return any(isinstance(steps, float) for steps in (self.delay_steps, self.warmup_steps, self.stop_steps))

    def in_steps(self, total: int) -> Settings:
        """The same settings with every share of the training as a number of steps."""
        delay, stop = in_steps(self.delay_steps, total), self.stop_steps
        if isinstance(stop, float):
            # Of a short training two shares may be the same step, and the penalty acts for one at least.
            stop = max(in_steps(stop, total), delay + 1 if isinstance(self.delay_steps, float) else 1)
        return replace(self, delay_steps=delay, warmup_steps=in_steps(self.warmup_steps, total), stop_steps=stop)

    def strength_factor(self, step: int) -> float:
        """What the strength is multiplied by at this optimizer step (the first is 0), in [0, 1].

        0 before ``delay_steps`` and from ``stop_steps`` on; in between a line that reaches 1 at the
        ``warmup_steps``-th step with a penalty.
        """
        if step < self.delay_steps or (self.stop_steps is not None and step >= self.stop_steps):
            return 0.0
        return min(1.0, (step - self.delay_steps + 1) / max(1, self.warmup_steps))
