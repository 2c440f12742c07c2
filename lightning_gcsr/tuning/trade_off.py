"""Trials of a search, and which of them are worth choosing among: what a smaller network costs of the metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

__all__ = ["Trial", "cost_in_words", "pareto_front"]


@dataclass(frozen=True)
class Trial:
    """One training and what came out of it."""

    strength: Optional[float]
    """λ; 0 in the training without a penalty, ``None`` where a target sparsity was asked for."""
    target_sparsity: Optional[float]
    """The sparsity that was asked for, or ``None``."""
    metric: float
    """The metric at the end, or where the trial was stopped."""
    weights: int
    """The number of regularized weights that are not frozen."""
    nonzeros: int
    """How many of them are not zero at the end."""
    injected: float
    """The share of the weights that got the penalty in the last step logged, in [0, 1]."""
    weight_norm: float
    """The Euclidean norm of the regularized weights at the end."""
    steps: int
    """The number of optimizer steps."""
    learned: bool
    reason: str
    """Why it counts as learned or failed."""

    @property
    def sparsity(self) -> float:
        """Zeros ÷ weights, in [0, 1]."""
        return (self.weights - self.nonzeros) / max(1, self.weights)

    @property
    def compression(self) -> float:
        """Weights ÷ nonzeros; infinite where all are zero."""
        return self.weights / self.nonzeros if self.nonzeros else math.inf

    @property
    def is_reference(self) -> bool:
        """Whether this is the training without a penalty."""
        return self.strength == 0

    @property
    def asked(self) -> float:
        """The strength or the target sparsity."""
        return self.target_sparsity if self.strength is None else self.strength  # type: ignore[return-value]

    @property
    def setting(self) -> str:
        """The argument of :class:`~lightning_gcsr.GradientCoherentRegularization` that this trial had, in words."""
        if self.is_reference:
            return "no penalty"
        return f"target_sparsity={self.asked:g}" if self.strength is None else f"strength={self.asked:.3g}"


def pareto_front(trials: Iterable[Trial], mode: Literal["min", "max"]) -> list[Trial]:
    """The trials that learned and that no other one beats in both metric and compression, by growing compression.

    Example:
        >>> def trial(strength, metric, nonzeros):
        ...     return Trial(strength, None, metric, 1000, nonzeros, 0.5, 1.0, 100, True, "")
        >>> found = pareto_front([trial(0.1, 0.97, 500), trial(0.2, 0.98, 250), trial(0.4, 0.95, 20)], "max")
        >>> [trial.strength for trial in found]
        [0.2, 0.4]
    """
    sign = 1 if mode == "min" else -1
    front: list[Trial] = []
    best = math.inf
    learned = [trial for trial in trials if trial.learned and not trial.is_reference]
    for trial in sorted(learned, key=lambda trial: (-trial.compression, sign * trial.metric)):
        if sign * trial.metric < best:
            front.append(trial)
            best = sign * trial.metric
    return front[::-1]


def cost_in_words(cost: float, known: Sequence[float], mode: Literal["min", "max"]) -> str:
    """What a metric that is worse by ``cost`` costs: in points where it is a share, else in its own units.

    A metric is a share, such as an accuracy, where larger is better and every known value is in [0, 1]. A point is a
    hundredth of that. Elsewhere the cost is rounded to a thousandth of the range of the known values.

    Args:
        cost: How much worse the metric is; negative where it is better.
        known: Values of the metric: of a model that knows nothing, of the training without a penalty, of trials.
        mode: Whether the metric is better when it is smaller or larger.

    Example:
        >>> cost_in_words(0.003, [0.1, 0.98], "max"), cost_in_words(0.0001, [0.1, 0.98], "max")
        ('for 0.3 points', 'free')
        >>> cost_in_words(-0.01, [0.1, 0.98], "max"), cost_in_words(0.0214, [2.3, 0.1], "min")
        ('1 point better', 'for 0.021')
    """
    finite = [value for value in known if math.isfinite(value)]
    if mode == "max" and all(0 <= value <= 1 for value in finite):
        size = round(abs(100 * cost), 1)
        amount = f"{size:g} point{'' if size == 1 else 's'}"
    else:
        spread = max(finite) - min(finite)
        digits = -math.floor(math.log10(spread / 1000)) if spread > 0 else 3
        size = round(abs(cost), digits)
        amount = f"{size:.{max(0, digits)}f}"
        amount = amount.rstrip("0").rstrip(".") if "." in amount else amount
    if size == 0:
        return "free"
    return f"for {amount}" if cost > 0 else f"{amount} better"
