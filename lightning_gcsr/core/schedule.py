"""The schedule: when the penalty acts, on one clock for everything that belongs to a training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Union

from lightning_gcsr.validation import argument_error, check_finite_number, check_integer

__all__ = ["Clock", "Moment", "Schedule", "check_moment"]

Moment = Union[int, float]
"""A number of optimizer steps (an integer), or a fraction of the training's progress (a float in [0, 1])."""


class Clock(NamedTuple):
    """How far a training is: what every schedule is read against."""

    step: int
    """The number of optimizer steps that are done."""
    progress: Optional[float] = None
    """The fraction of the training that is done, in [0, 1]; ``None`` where the length of the training is not known."""

    def reached(self, moment: Moment) -> bool:
        """Whether this moment has come: that many steps are done, or that fraction of the training.

        Raises:
            ValueError: If the moment is a fraction and the progress is not known.

        Example:
            >>> Clock(step=10, progress=0.5).reached(11), Clock(step=10, progress=0.5).reached(0.5)
            (False, True)
        """
        return moment == 0 or self.position(moment) >= moment

    def position(self, moment: Moment) -> Moment:
        """The step or the progress, whichever the moment is given in."""
        if not isinstance(moment, float):
            return self.step
        if self.progress is None:
            raise ValueError(
                f"The schedule has a fraction of the training's progress ({moment}; the default warm-up is 0.3), and"
                " the progress is not known. Pass `clock=Clock(step, progress)` to `before_step`, or give integers,"
                " which are numbers of optimizer steps, such as schedule=Schedule(warmup=0)."
            )
        return self.progress


def check_moment(name: str, value: object, advice: str) -> None:
    """Raise unless ``value`` is an integer of at least 0 (steps), or a float in [0, 1] (a fraction of the training)."""
    if isinstance(value, float):
        check_finite_number(name, value, 0.0, 1.0, f"A float is a fraction of the training. {advice}")
    else:
        check_integer(name, value, minimum=0, advice=advice)


@dataclass(frozen=True)
class Schedule:
    """When the penalty acts: after ``delay``, rising over ``warmup``, until ``stop``.

    An integer is a number of optimizer steps. A float in [0, 1] is a fraction of the training's progress: batches done
    over batches to do, or steps over ``max_steps`` where these end the training. Progress is the same for every
    callback of a ``fit``, however often the optimizer steps, and goes on after a resume.

    Args:
        delay: How long there is no penalty at the start. A delay alone, with ``gate=None``, is *delayed strong
            regularization*.
        warmup: How long the strength then rises linearly to its full value. ``None`` lets the regularizer choose: 0.3
            if its gate has a tolerance and there is no target, else 0.
        stop: When the penalty ends; ``None`` for never. With :class:`~lightning_gcsr.KeepZeros` the zeros stay.

    Raises:
        ValueError: If a number lies outside its range, or ``stop`` does not come after ``delay``.
        TypeError: If an argument is not a number.

    Example:
        >>> schedule = Schedule(delay=10, warmup=4, stop=100)
        >>> [schedule.factor(Clock(step)) for step in (0, 9, 10, 11, 13, 99, 100)]
        [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 0.0]
        >>> Schedule(delay=0.5, warmup=0.25).factor(Clock(step=625, progress=0.625))
        0.5
    """

    delay: Moment = 0
    warmup: Optional[Moment] = None
    stop: Optional[Moment] = None

    def __post_init__(self) -> None:
        check_moment("delay", self.delay, advice="Use 0 for no delay.")
        if self.warmup is not None:
            check_moment("warmup", self.warmup, advice="Use 0 for no warm-up.")
        if self.stop is not None:
            check_moment("stop", self.stop, advice="Use None to never stop.")
            comparable = isinstance(self.stop, float) is isinstance(self.delay, float)
            if self.stop == 0 or (comparable and self.stop <= self.delay):
                advice = "The penalty acts between the two; use None to never stop."
                raise argument_error("stop", self.stop, f"must be greater than delay={self.delay}", advice)

    def __repr__(self) -> str:
        defaults = {"delay": 0, "warmup": None, "stop": None}
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value != defaults[name]]
        return f"Schedule({', '.join(given)})"

    def with_default_warmup(self, warmup: Moment) -> Schedule:
        """This schedule, with this warm-up where none was given."""
        return self if self.warmup is not None else replace(self, warmup=warmup)

    @property
    def fractions(self) -> dict[str, float]:
        """The arguments that are fractions of the training, by name: whether its length must be known."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float) and value > 0}

    def acts(self, clock: Clock) -> bool:
        """Whether the penalty acts now: the delay is over and the stop has not come."""
        return clock.reached(self.delay) and not (self.stop is not None and clock.reached(self.stop))

    def factor(self, clock: Clock, began: Optional[Clock] = None) -> float:
        """What the strength is multiplied by now, in [0, 1].

        Args:
            clock: How far the training is.
            began: Where the penalty began to act; needed only where delay and warm-up are given in different units.
        """
        if not self.acts(clock):
            return 0.0
        if not self.warmup:
            return 1.0
        done = clock.position(self.warmup) - self._start(self.warmup, began or clock)
        if not isinstance(self.warmup, float):
            done += 1  # the last step of the warm-up has the full strength
        return min(1.0, done / self.warmup)

    def phase(self, clock: Clock, began: Optional[Clock] = None) -> float:
        """How much of the time in which the penalty acts is over, in [0, 1].

        Raises:
            ValueError: If there is no stop and the progress is not known.

        Example:
            >>> Schedule(delay=0.25, stop=0.75).phase(Clock(step=3, progress=0.375))
            0.25
        """
        if self.stop is None and clock.progress is None:
            raise ValueError(
                "`target_sparsity` needs to know how far the training is, and the progress is not known. Pass"
                " `clock=Clock(step, progress)` to `before_step`, or the number of optimizer steps after which the"
                " penalty ends, such as schedule=Schedule(stop=10_000)."
            )
        stop = 1.0 if self.stop is None else self.stop
        start = self._start(stop, began or clock)
        return min(1.0, max(0.0, (clock.position(stop) - start) / max(stop - start, 1e-12)))

    def _start(self, unit: Moment, began: Clock) -> Moment:
        """Where the penalty begins to act, as steps or as progress like ``unit``."""
        if self.delay == 0 or isinstance(self.delay, float) is isinstance(unit, float):
            return self.delay
        return began.position(unit)
