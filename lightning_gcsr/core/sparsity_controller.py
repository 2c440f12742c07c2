"""The controller of the sparsity: it arrives at the sparsity that was asked for, while the network trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.validation import argument_error, check_finite_number

__all__ = ["SparsityController", "WeightCounts", "check_only_optimizer", "check_target_sparsity"]

# Measured on a perceptron, a deep perceptron and a small transformer, under SGD, AdamW and Lion, with five schedules of
# the learning rate, between 50 and 99 % of zeros.
ARRIVES_AT, RISES_OVER = 0.8, 0.3
STEPS_APART, CONTROLS = 4, 200
GAIN, LARGEST_GAIN = 0.5, 16.0
RECOUNTS = 24
LARGEST_EXCESS = 0.01
"""How many more weights than wanted a reach may hold, over all weights: a point, as a target promises."""
TOLERANCE, LARGEST_TOLERANCE = 0.03, 1e4


def check_target_sparsity(target: object, penalty: Penalty, update: str) -> None:
    """Raise unless this penalty and update can arrive at the sparsity.

    Raises:
        ValueError: If ``target`` is not between 0 and 1, or if there would be no exact zeros.
        TypeError: If ``target`` is not a number.
    """
    advice = "It is a fraction of the weights; 0.9 leaves one in ten."
    check_finite_number("target_sparsity", target, 0.0, 1.0, advice)
    if target in (0, 1):
        raise argument_error("target_sparsity", target, "must lie between 0 and 1", advice)
    if update != "dual_averaging":
        rule = f"must be None where update={update!r}"
        advice = "Use update='dual_averaging', whose thresholds are adapted, or give a `strength`."
        raise argument_error("target_sparsity", target, rule, advice)
    if not penalty.makes_zeros:
        rule = f"must be None with {penalty!r}, which makes no weight exactly zero"
        raise argument_error("target_sparsity", target, rule, "Use 'l1' or 'group_lasso', or give a `strength`.")


def check_only_optimizer(target: float, known: Iterable[str], stepped: Sequence[str]) -> None:
    """Raise if other weights than these have been stepped, by an optimizer whose zeros would not be counted.

    Args:
        target: The target sparsity.
        known: The first of the weights of each other optimizer that has stepped some.
        stepped: The weights of the optimizer that is about to step.
    """
    if stepped and (others := [name for name in known if name and name not in stepped]):
        rule = f"needs one optimizer that steps all of the weights, and this one does not step {others[0]!r}"
        advice = "Give each optimizer a CoherentRegularizer of its own, with `include`, or give a `strength`."
        raise argument_error("target_sparsity", target, rule, advice)


class WeightCounts(NamedTuple):
    """What a controller has to know of the weights."""

    weights: int
    """All of them."""
    zeros: int
    movable: int
    """Weights that become zero at some growth of the thresholds: not zero yet, open, and with a gradient; of a negative
    reach, zeros that come back at some fall."""
    near: int
    """Weights that would become zero if the thresholds grew by the reach where the gate is open; of a negative reach,
    zeros that would come back if the thresholds fell by it."""
    at_once: int = 1
    """How many become zero at once: the groups of a block."""


@dataclass
class SparsityController:
    r"""Says how fast the thresholds of dual averaging grow, so that the sparsity follows a curve to the target.

    The gate decides which weights shrink, the controller how fast. With f in [0, 1] the fraction of the time in which
    the penalty acts, the wanted sparsity is

    s(f) = 1 − (1 − target)^h,   h = (1 − (1 − f/0.8)²) · min(1, f/0.3):

    the logarithm of the number of remaining weights falls, slowly at first, until 80 % of the time; afterwards the
    network settles. Every fourth step (more often in a training of fewer than 800) the controller counts the zeros and
    the weights close to zero, and chooses the growth of the thresholds that gives the missing zeros by the next count.
    If there are too many zeros, the thresholds of zeros fall. The growth does not depend on the learning rate, so a
    schedule that falls to zero does no harm.

    Where groups become zero in blocks, the thresholds fall only if there is a whole block too many. If a block comes
    back, the thresholds of zeros rise by a margin once the wanted sparsity is reached. The margin doubles each time.

    A tolerance proportional to the strength would open every gate when the learning rate is small. With a target the
    gate is open where sign(w)·A + 0.03·μ·rms(g) ≥ 0, with rms(g) the root mean square of the tensor's gradient; μ is
    1 at first, and grows while more than half of the open weights would have to become zero. While no gate is open,
    μ grows faster and the thresholds do not grow.

    Args:
        target: The sparsity to arrive at, in (0, 1).

    Example:
        >>> controller = SparsityController(0.9)
        >>> round(controller.wanted(0.0), 3), round(controller.wanted(0.4), 3), round(controller.wanted(0.8), 3)
        (0.0, 0.822, 0.9)
        >>> controller.adapt(0.1, lambda reach: WeightCounts(1000, zeros=0, movable=900, near=300))
        >>> controller.growth > 0
        True
    """

    target: float
    reach: float = 1e-6
    """How far the thresholds may move between two adaptations, over κ.

    Weights within the reach of zero are counted; the thresholds grow by the part of it that gives the missing zeros.
    """
    growth: float = 0.0
    """What the thresholds grow by in a step, over κ; where it is negative, those of zeros fall."""
    mu: float = 1.0
    """What the tolerance of the gate is multiplied by."""
    gain: float = GAIN
    """Which part of the way the thresholds are moved at once; it grows while the weights evade them."""
    zeros: int = 0
    """The zeros at the last adaptation."""
    steps: int = 0
    """The steps since the last adaptation."""
    phase: float = 0.0
    """The fraction f at the last adaptation."""
    margin: float = 0.0
    """By how much the thresholds of zero blocks are kept away from where the blocks come back, over κ."""
    settles: bool = False
    """Whether only the thresholds of zeros grow, to that margin."""

    def __post_init__(self) -> None:
        check_finite_number("target", self.target, 0.0, 1.0, "It is a fraction of the weights.")

    @property
    def moves_zeros(self) -> bool:
        """Whether only the thresholds of zeros move."""
        return self.growth < 0 or self.settles

    @property
    def tolerance(self) -> float:
        """By how much a gradient may oppose the penalty at a weight, over the root mean square of the gradient."""
        return TOLERANCE * self.mu

    def wanted(self, phase: float) -> float:
        """The sparsity wanted at this fraction of the time in which the penalty acts."""
        height = 1 - (1 - min(1.0, phase / ARRIVES_AT)) ** 2
        return float(1 - (1 - self.target) ** (height * min(1.0, phase / RISES_OVER)))

    def due(self, phase: float) -> bool:
        """Count a step; whether the growth is to be adapted after it, which synchronizes with the host."""
        self.steps += 1
        return self.steps >= STEPS_APART or phase - self.phase >= 1 / CONTROLS

    def adapt(self, phase: float, count: Callable[[float], WeightCounts]) -> None:
        """Choose the growth by which the wanted sparsity is reached at the next adaptation.

        Args:
            phase: The fraction of the time in which the penalty acts that is over.
            count: Counts weights, see :class:`WeightCounts`, for a reach; a negative one asks for zeros.
        """
        steps, advance = max(1, self.steps), max(0.0, phase - self.phase)
        self.steps, self.phase = 0, phase
        counts = count(self.reach)
        need = round(self.wanted(min(1.0, phase + advance)) * counts.weights) - counts.zeros
        if -counts.at_once < need < 0:  # without a block there would be too few
            need = 0
        came_back, self.settles = counts.at_once > 1 and counts.zeros < self.zeros, False
        if came_back:
            self.margin = 2 * max(self.margin, self.reach)
        crowded = need > 0.5 * counts.movable
        closed = need > 0 and not counts.movable  # a growth would act on all gates that open before the next count
        self.mu = min(LARGEST_TOLERANCE, self.mu * (1.5 if closed else 1.2)) if crowded else max(1.0, self.mu / 1.05)
        if need == 0 or closed:
            self.growth, self.gain, self.zeros = 0.0, GAIN, counts.zeros
            if self.margin and not closed and count(-self.margin).near:
                self.growth, self.settles = GAIN * self.margin / steps, True
            return
        sign = 1 if need > 0 else -1
        before, found = self.reach, counts if need > 0 else count(-self.reach)
        enough = min(abs(need), 0.5 * found.movable)
        self.reach, near = self._fitted(enough, found.near, counts.weights, lambda reach: count(sign * reach).near)
        evaded = need > 0 and self.growth > 0 and counts.zeros <= self.zeros and self.reach >= before
        self.gain = min(LARGEST_GAIN, self.gain * 1.5) if evaded else GAIN
        self.zeros = counts.zeros
        part = max(-1.0, min(1.0, need / max(near, 1)))
        self.growth = self.gain * self.reach * part / steps

    def _fitted(self, enough: float, near: int, weights: int, count: Callable[[float], int]) -> tuple[float, int]:
        """The reach that holds enough weights, and how many: half of it does not, or it holds few more than enough.

        So weights at almost the same distance, such as those of groups, do not become zero all at once.
        """
        reach = self.reach
        many = min(8 * max(enough, 1e-4 * weights), enough + LARGEST_EXCESS * weights)
        for _ in range(RECOUNTS):
            if near < enough:
                reach *= 2
                near = count(reach)
            elif near > many and (closer := count(reach / 2)) >= enough:
                reach, near = reach / 2, closer
            else:
                break
        return reach, near

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: plain numbers."""
        return {name: value for name, value in vars(self).items() if name != "target"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the target is not part of it."""
        for name in self.state_dict():
            setattr(self, name, state[name])
