"""The settings of a regularizer, checked as soon as they are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Union

from lightning_gcsr.coherence import Gate, MeasureName, ScopeName
from lightning_gcsr.messages import argument_error, check_choice, check_finite_number, check_integer
from lightning_gcsr.penalties import Penalty, PenaltyName, resolve_penalty
from lightning_gcsr.selection import StrengthScale, check_patterns, check_strength

__all__ = ["Settings", "UpdateName"]

UpdateName = Literal["gradient", "proximal"]


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
    coherence: Union[MeasureName, None] = "agreement"
    scope: ScopeName = "element"
    threshold: Union[float, None] = None
    tolerance: float = 0.0
    averaging: float = 0.0
    strength_scale: StrengthScale = "uniform"
    update: UpdateName = "gradient"
    include: Union[Sequence[str], None] = None
    exclude: Union[Sequence[str], None] = None
    delay_steps: int = 0
    warmup_steps: int = 0
    stop_steps: Union[int, None] = None

    def __post_init__(self) -> None:
        resolve_penalty(self.penalty)
        check_strength(self.strength)
        Gate(self.coherence, self.scope, self.threshold, self.tolerance)
        check_finite_number("averaging", self.averaging, 0.0, 1.0, "Use 0 for this step's gradient alone.")
        if self.averaging == 1:
            raise argument_error("averaging", self.averaging, "must be less than 1", "0.98 looks back over 50 steps.")
        if self.averaging > 0 and self.coherence not in ("direction", "agreement"):
            rule = f"must be 0 where coherence={self.coherence!r}"
            raise argument_error("averaging", self.averaging, rule, "Use 'agreement' or 'direction', or leave it out.")
        check_choice("strength_scale", self.strength_scale, ["uniform", "fan_in"])
        check_choice("update", self.update, ["gradient", "proximal"])
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        check_integer("delay_steps", self.delay_steps, minimum=0, advice="Use 0 for no delay.")
        check_integer("warmup_steps", self.warmup_steps, minimum=0, advice="Use 0 for no warm-up.")
        if self.stop_steps is not None:
            check_integer("stop_steps", self.stop_steps, minimum=0, advice="Use None to never stop.")
            if self.stop_steps <= self.delay_steps:
                rule = f"must be greater than delay_steps={self.delay_steps}"
                advice = "The penalty acts between the two; use None to never stop."
                raise argument_error("stop_steps", self.stop_steps, rule, advice)

    def strength_factor(self, step: int) -> float:
        """What the strength is multiplied by at this optimizer step (the first is 0), in [0, 1].

        0 before ``delay_steps`` and from ``stop_steps`` on; in between a line that reaches 1 at the
        ``warmup_steps``-th step with a penalty.
        """
        if step < self.delay_steps or (self.stop_steps is not None and step >= self.stop_steps):
            return 0.0
        return min(1.0, (step - self.delay_steps + 1) / max(1, self.warmup_steps))
