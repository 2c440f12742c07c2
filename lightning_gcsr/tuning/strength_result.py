"""What the search for a strength has found: a table of trials, a suggestion, a figure."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, Union

from lightning_gcsr.storage.atomic_write import replace_file
from lightning_gcsr.validation import argument_error, check_finite_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StrengthFinderResult", "Suggestion", "ToleranceLevel", "Trial"]

Method = Literal["none", "coherent", "plain"]
_FORMAT = "lightning-gcsr strength finder 1"


class Suggestion(NamedTuple):
    """A strength, and why this one."""

    strength: float
    reason: str


class ToleranceLevel(NamedTuple):
    """The largest strength at which training still learns, and between which two trials it ends."""

    strength: Optional[float]
    """``None`` where not even the smallest strength tried learned."""
    failed: Optional[float]
    """The smallest strength above it that failed; ``None`` where none did, and more may be endured."""


@dataclass(frozen=True)
class Trial:
    """One training and what came out of it."""

    method: Method
    """``"none"``: without penalty; ``"coherent"``: as it was asked for; ``"plain"``: without a gate."""
    strength: float
    metric: float
    """The metric at the end, or where the trial was cut short."""
    weights: int
    """The number of regularized weights."""
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
        """The share of zero weights, in [0, 1]."""
        return (self.weights - self.nonzeros) / max(1, self.weights)

    @property
    def compression(self) -> float:
        """Weights ÷ nonzeros; infinite where all are zero."""
        return self.weights / self.nonzeros if self.nonzeros else math.inf


@dataclass(frozen=True)
class StrengthFinderResult:
    """What :func:`~lightning_gcsr.find_strength` found.

    Example:
        >>> def trial(strength, metric, nonzeros, learned=True):
        ...     return Trial("coherent", strength, metric, 1000, nonzeros, 0.6, 1.0, 100, learned, "")
        >>> reference = Trial("none", 0.0, 0.10, 1000, 1000, 0.0, 9.0, 100, True, "")
        >>> trials = [reference, trial(0.01, 0.10, 300), trial(0.1, 0.12, 40), trial(1.0, 2.31, 0, False)]
        >>> result = StrengthFinderResult("val_loss", "min", baseline=2.4, trials=trials)
        >>> result.suggestion().strength
        0.1
        >>> result.suggestion(tolerance=0).strength
        0.01
        >>> result.tolerance_level
        ToleranceLevel(strength=0.1, failed=1.0)
    """

    metric: str
    mode: Literal["min", "max"]
    baseline: float
    """The metric of a model that knows nothing: with its weights at zero; of a training metric, at first."""
    trials: Sequence[Trial]
    """In the order in which they were made: that without penalty first."""

    # -- what to use -----------------------------------------------------------------------------------------------

    def suggestion(
        self,
        tolerance: float = 0.01,
        *,
        max_metric_drop: Optional[float] = None,
        target_sparsity: Optional[float] = None,
    ) -> Suggestion:
        """The strength to train with, among those tried.

        Args:
            tolerance: The largest strength whose metric is within this share of what is learned, from the model that
                knows nothing to the best trial, of the best. 0 is the best metric itself.
            max_metric_drop: Instead: the largest strength whose metric is by at most this much, in units of the metric,
                worse than the best.
            target_sparsity: Instead: of the strengths with at least this share of zero weights, the one with the best
                metric.

        Raises:
            ValueError: If an argument breaks its rule, if two ways are asked for at once, or if no strength that was
                tried will do; the message says at which end to look.
            TypeError: If an argument is not a number.
        """
        check_finite_number("tolerance", tolerance, 0.0, 1.0, "It is a share of what is learned.")
        if max_metric_drop is not None:
            check_finite_number("max_metric_drop", max_metric_drop, 0.0)
        if target_sparsity is not None:
            check_finite_number("target_sparsity", target_sparsity, 0.0, 1.0)
            if max_metric_drop is not None:
                rule = "must be None where max_metric_drop is given"
                raise argument_error("target_sparsity", target_sparsity, rule, "Ask for one of the two.")
        learned = self._by_strength("coherent", learned=True)
        if not learned:
            raise ValueError("No strength that was tried learned, so there is none to suggest. Try smaller ones.")
        if target_sparsity is not None:
            sparse = [trial for trial in learned if trial.sparsity >= target_sparsity]
            if not sparse:
                largest = max(learned, key=lambda trial: trial.sparsity)
                raise ValueError(
                    f"No strength that learned reached target_sparsity={target_sparsity}; {largest.strength:.3g} came"
                    f" closest with {largest.sparsity:.3f}. Raise `max_strength`, or accept less."
                )
            chosen = min(sparse, key=self._loss)
            return Suggestion(
                chosen.strength,
                f"best {self.metric} ({chosen.metric:.4g}) among the strengths that make at least"
                f" {100 * target_sparsity:g} % of the weights zero; this one {self._figures(chosen)}",
            )
        best = min((trial for trial in self.trials if trial.learned and trial.method != "plain"), key=self._loss)
        if max_metric_drop is None:
            drop = tolerance * abs(self.baseline - best.metric)
            rule = f"within {100 * tolerance:g} % of what is learned ({drop:.3g})"
        else:
            drop, rule = max_metric_drop, f"within {max_metric_drop:g}"
        close = [trial for trial in learned if self._loss(trial) <= self._loss(best) + drop]
        if not close and drop == 0:  # no penalty is best of all, and of those with one, this
            close, rule = (
                [min(learned, key=self._loss)],
                "the best with a penalty; that without one is the best of all,",
            )
        if not close:
            raise ValueError(
                f"Every strength that was tried costs more {self.metric} than asked: {learned[0].strength:.3g}, the"
                f" smallest, has {learned[0].metric:.4g}, where the best is {best.metric:.4g}. Lower `min_strength`, or"
                " allow a larger drop."
            )
        chosen = close[-1]
        return Suggestion(
            chosen.strength,
            f"the largest strength tried whose {self.metric} ({chosen.metric:.4g}) is {rule} of the best"
            f" ({best.metric:.4g}); it {self._figures(chosen)}",
        )

    @property
    def tolerance_level(self) -> ToleranceLevel:
        """The largest strength at which training still learned."""
        return self._level("coherent")

    @property
    def plain_tolerance_level(self) -> ToleranceLevel:
        """The same for the penalty without a gate.

        Raises:
            ValueError: If it was not asked for with ``compare_plain=True``.
        """
        if not self._by_strength("plain"):
            raise ValueError("Plain regularization was not tried. Call `find_strength` with compare_plain=True.")
        return self._level("plain")

    def _level(self, method: Method) -> ToleranceLevel:
        failed = min((trial.strength for trial in self._by_strength(method) if not trial.learned), default=None)
        below = [t.strength for t in self._by_strength(method, learned=True) if failed is None or t.strength < failed]
        return ToleranceLevel(max(below, default=None), failed)

    def _by_strength(self, method: Method, learned: Optional[bool] = None) -> list[Trial]:
        wanted = (trial for trial in self.trials if trial.method == method and learned in (None, trial.learned))
        return sorted(wanted, key=lambda trial: trial.strength)

    def _loss(self, trial: Trial) -> float:
        return trial.metric if self.mode == "min" else -trial.metric

    def _figures(self, trial: Trial) -> str:
        return f"leaves {trial.nonzeros:,} of {trial.weights:,} weights ({trial.compression:.3g}×)"

    # -- to look at ------------------------------------------------------------------------------------------------

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row for each trial, by method and strength; ``pandas.DataFrame(result.table)`` takes it as it is."""
        trials = [trial for method in ("none", "coherent", "plain") for trial in self._by_strength(method)]
        return [
            {
                "method": trial.method,
                "strength": trial.strength,
                self.metric: trial.metric,
                "sparsity": trial.sparsity,
                "compression": trial.compression,
                "injected": trial.injected,
                "weight_norm": trial.weight_norm,
                "steps": trial.steps,
                "learned": trial.learned,
                "reason": trial.reason,
            }
            for trial in trials
        ]

    def plot(self, suggestion: Optional[Suggestion] = None) -> Figure:
        """A figure: metric and sparsity against strength, with the tolerance levels and the suggestion.

        Args:
            suggestion: The one to mark; that of :meth:`suggestion` by default.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from lightning_gcsr.tuning.strength_plot import draw  # matplotlib is an extra

        if suggestion is None:
            with contextlib.suppress(ValueError):  # there is none; what was tried is worth a look all the same
                suggestion = self.suggestion()
        levels = {"coherent": self.tolerance_level}
        if self._by_strength("plain"):
            levels["plain"] = self.plain_tolerance_level
        return draw(self.table, self.metric, self.baseline, levels, None if suggestion is None else suggestion.strength)

    # -- to keep ---------------------------------------------------------------------------------------------------

    def save(self, path: Union[str, os.PathLike[str]]) -> None:
        """Write the result as JSON; the file is there whole or not at all.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        content = {"format": _FORMAT, **asdict(self)}
        text = json.dumps(_without_nonfinite(content), indent=2, allow_nan=False)
        replace_file(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: Union[str, os.PathLike[str]]) -> StrengthFinderResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is not one of these.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError("another format")
            trials = [Trial(**_with_nonfinite(trial)) for trial in content.pop("trials")]
            return cls(trials=trials, **_with_nonfinite(content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a result that `StrengthFinderResult.save` wrote: {error}.") from error


def _without_nonfinite(value: Any) -> Any:
    """JSON has no NaN and no infinity: the metric of a failed trial is written as a word."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_nonfinite(values: dict[str, Any]) -> dict[str, Any]:
    words = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    numbers = ("metric", "baseline", "weight_norm", "injected")
    return {k: words.get(v, v) if k in numbers and isinstance(v, str) else v for k, v in values.items()}
