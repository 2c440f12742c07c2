"""What the search for a strength has found: a trade-off to choose from, a table of trials, a suggestion, a figure."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, Union

from lightning_gcsr.sparsity.text_table import plain_table
from lightning_gcsr.storage.atomic_write import replace_file
from lightning_gcsr.tuning.notebook import as_html
from lightning_gcsr.tuning.trade_off import Trial, cost_in_words, pareto_front
from lightning_gcsr.tuning.trade_off_plot import draw
from lightning_gcsr.validation import argument_error, check_finite_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StrengthFinderResult", "Suggestion", "ToleranceLevel"]

_FORMAT = "lightning-gcsr strength finder 2"
_NUMBERS = ("metric", "baseline", "weight_norm", "injected")


class Suggestion(NamedTuple):
    """A strength or a target sparsity, and why this one."""

    strength: Optional[float]
    """``None`` where target sparsities were tried."""
    reason: str
    """What it gives, and what the next smaller networks cost."""
    target_sparsity: Optional[float] = None
    """``None`` where strengths were tried."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For :class:`~lightning_gcsr.GradientCoherentRegularization`: the strength or the target sparsity."""
        both = {"strength": self.strength, "target_sparsity": self.target_sparsity}
        return {name: value for name, value in both.items() if value is not None}


class ToleranceLevel(NamedTuple):
    """The largest strength at which training still learns, and the smallest one above it that failed."""

    strength: Optional[float]
    """``None`` where not even the smallest strength tried learned."""
    failed: Optional[float]
    """``None`` where none failed, and more may be endured."""


@dataclass(frozen=True, repr=False)
class StrengthFinderResult:
    """What :func:`~lightning_gcsr.find_strength` found; ``print`` shows the trade-off and a table of the trials.

    Example:
        >>> def trial(strength, metric, nonzeros, learned=True):
        ...     return Trial(strength, None, metric, 1000, nonzeros, 0.6, 1.0, 100, learned, "")
        >>> trials = [trial(0.0, 0.98, 1000), trial(0.01, 0.98, 300), trial(0.1, 0.97, 40), trial(1.0, 0.1, 0, False)]
        >>> result = StrengthFinderResult("val_acc", "max", baseline=0.1, trials=trials)
        >>> result.trade_off
        '3.3× free (strength=0.01); 25× for 1 point (strength=0.1)'
        >>> result.suggestion(max_metric_drop=0.02).strength
        0.1
        >>> print(result)
        val_acc against 0.98 without a penalty: 3.3× free (strength=0.01); 25× for 1 point (strength=0.1)
        trial          val_acc  sparsity  compression  outcome
        no penalty        0.98     0.0 %           1×  learned
        strength=0.01     0.98    70.0 %         3.3×  learned
        strength=0.1      0.97    96.0 %          25×  learned
        strength=1         0.1   100.0 %     all zero  failed
    """

    metric: str
    mode: Literal["min", "max"]
    baseline: float
    """The metric of a model that knows nothing: with its weights at zero; of a training metric, at first."""
    trials: Sequence[Trial]
    """In the order in which they were made: that without penalty first."""

    # -- what to choose from ---------------------------------------------------------------------------------------

    @property
    def front(self) -> list[Trial]:
        """The trials worth choosing among, by growing compression: none is beaten in metric and compression both."""
        return pareto_front(self.trials, self.mode)

    @property
    def trade_off(self) -> str:
        """What each smaller network costs of the metric of the training without a penalty, in words.

        The cost is in points, hundredths, where the metric is a share such as an accuracy, and else in the units of
        the metric. Only trials of :attr:`front` are named.
        """
        return "; ".join(map(self._step, self.front)) or "no trial learned"

    def suggestion(
        self,
        tolerance: float = 0.01,
        *,
        max_metric_drop: Optional[float] = None,
        target_sparsity: Optional[float] = None,
    ) -> Suggestion:
        """The strength or target sparsity to train with, among those tried.

        Args:
            tolerance: The smallest network whose metric is within this share of what is learned, from the model that
                knows nothing to the best trial, of the best. 0 is the best metric itself.
            max_metric_drop: Instead: the smallest network whose metric is by at most this much, in units of the metric,
                worse than the best.
            target_sparsity: Instead: of the trials with at least this sparsity, the one with the best
                metric.

        Raises:
            ValueError: If an argument breaks its rule, if two ways are asked for at once, or if no trial will do; the
                message says at which end to look.
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
        learned = [trial for trial in self.trials if trial.learned and not trial.is_reference]
        if not learned:
            raise ValueError("No trial with a penalty learned, so there is none to suggest. Try less of it.")
        if target_sparsity is not None:
            return self._sparse_enough(learned, target_sparsity)
        return self._close_to_the_best(learned, tolerance, max_metric_drop)

    def _sparse_enough(self, learned: list[Trial], sparsity: float) -> Suggestion:
        sparse = [trial for trial in learned if trial.sparsity >= sparsity]
        if not sparse:
            largest = max(learned, key=lambda trial: trial.sparsity)
            raise ValueError(
                f"No trial that learned reached target_sparsity={sparsity}; {largest.setting} came closest with"
                f" {largest.sparsity:.3f}. Try more of the penalty, or accept less."
            )
        rule = f"best {self.metric} among the trials that make at least {100 * sparsity:g} % of the weights zero"
        return self._suggest(min(sparse, key=self._loss), rule)

    def _close_to_the_best(self, learned: list[Trial], tolerance: float, drop: Optional[float]) -> Suggestion:
        best = min((trial for trial in self.trials if trial.learned), key=self._loss)
        rule = f"smallest network tried whose {self.metric} is within"
        if drop is None:
            drop = tolerance * abs(self.baseline - best.metric)
            rule = f"{rule} {100 * tolerance:g} % of what is learned ({drop:.3g}) of the best ({best.metric:.4g})"
        else:
            rule = f"{rule} {drop:g} of the best ({best.metric:.4g})"
        close = [trial for trial in learned if self._loss(trial) <= self._loss(best) + drop]
        if not close and drop == 0:  # no penalty is best of all, and of those with one, this
            close = [min(learned, key=self._loss)]
            rule = f"best {self.metric} with a penalty; that without one is the best of all ({best.metric:.4g})"
        if not close:
            first = min(learned, key=lambda trial: trial.asked)
            raise ValueError(
                f"Every trial costs more {self.metric} than asked: {first.setting}, the least of the penalty, has"
                f" {first.metric:.4g}, where the best is {best.metric:.4g}. Try less of the penalty, or allow a larger"
                " drop."
            )
        return self._suggest(max(close, key=lambda trial: (trial.compression, trial.asked)), rule)

    def _suggest(self, chosen: Trial, rule: str) -> Suggestion:
        smaller = [trial for trial in self.front if trial.compression > chosen.compression]
        steps = (
            f"next: {'; '.join(map(self._step, smaller))}" if smaller else "no smaller network that was tried learned"
        )
        reason = (
            f"{chosen.setting} gives the {rule}: {self.metric} {chosen.metric:.4g} at {_times(chosen)}"
            f" ({chosen.nonzeros:,} of {chosen.weights:,} weights); {steps}"
        )
        return Suggestion(chosen.strength, reason, chosen.target_sparsity)

    def _step(self, trial: Trial) -> str:
        known = [self.baseline, *(trial.metric for trial in self.trials if trial.learned)]
        reference = next((self._loss(trial) for trial in self.trials if trial.is_reference), math.nan)
        cost = self._loss(trial) - reference
        words = "" if math.isnan(cost) else f" {cost_in_words(cost, known, self.mode)}"
        return f"{_times(trial)}{words} ({trial.setting})"

    def _loss(self, trial: Trial) -> float:
        return trial.metric if self.mode == "min" else -trial.metric

    @property
    def tolerance_level(self) -> ToleranceLevel:
        """The largest strength at which training still learned; both numbers are ``None`` if targets were tried."""
        strengths = [trial for trial in self.trials if trial.strength]
        failed = min((trial.asked for trial in strengths if not trial.learned), default=None)
        below = [trial.asked for trial in strengths if trial.learned and (failed is None or trial.asked < failed)]
        return ToleranceLevel(max(below, default=None), failed)

    # -- to look at ------------------------------------------------------------------------------------------------

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row for each trial, that without penalty first; ``pandas.DataFrame(result.table)`` takes it as it is."""
        return [
            {
                "strength": trial.strength,
                "target_sparsity": trial.target_sparsity,
                self.metric: trial.metric,
                "sparsity": trial.sparsity,
                "compression": trial.compression,
                "injected": trial.injected,
                "weight_norm": trial.weight_norm,
                "steps": trial.steps,
                "learned": trial.learned,
                "reason": trial.reason,
            }
            for trial in self._in_order()
        ]

    def __repr__(self) -> str:
        header, *rows = self._cells()
        return f"{self._headline()}\n{plain_table(header, rows, left=('trial', 'outcome'))}"

    def _repr_html_(self) -> str:
        """For notebooks: the trade-off, the table, and the figure where matplotlib is installed."""
        header, *rows = self._cells()
        figure = None
        with contextlib.suppress(ModuleNotFoundError):
            figure = self.plot()
        return as_html(self._headline(), header, rows, figure)

    def plot(self, suggestion: Optional[Suggestion] = None) -> Figure:
        """A figure of the trade-off: metric against compression of each trial that learned, the suggestion marked.

        Args:
            suggestion: The one to mark; that of :meth:`suggestion` by default.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if suggestion is None:
            with contextlib.suppress(ValueError):  # there is none; what was tried is worth a look all the same
                suggestion = self.suggestion()
        chosen = () if suggestion is None else (suggestion.strength, suggestion.target_sparsity)
        marked = next((trial for trial in self.trials if (trial.strength, trial.target_sparsity) == chosen), None)
        return draw(self._in_order(), self.front, marked, self.metric)

    def _headline(self) -> str:
        reference = next((trial for trial in self.trials if trial.is_reference), None)
        against = "" if reference is None else f" against {reference.metric:.4g} without a penalty"
        return f"{self.metric}{against}: {self.trade_off}"

    def _in_order(self) -> list[Trial]:
        return sorted(self.trials, key=lambda trial: (not trial.is_reference, trial.asked))

    def _cells(self) -> list[tuple[str, ...]]:
        header = ("trial", self.metric, "sparsity", "compression", "outcome")
        return [header, *map(self._row, self._in_order())]

    def _row(self, trial: Trial) -> tuple[str, ...]:
        outcome = "learned" if trial.learned else f"failed: {trial.reason}".removesuffix(": ")
        zeros = f"{100 * trial.sparsity:.1f} %"
        return trial.setting, f"{trial.metric:.4g}", zeros, _times(trial), outcome

    # -- to keep ---------------------------------------------------------------------------------------------------

    def save(self, path: Union[str, os.PathLike[str]]) -> None:
        """Write the result as JSON, by an atomic file replacement.

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


def _times(trial: Trial) -> str:
    if not trial.nonzeros:
        return "all zero"
    return f"{trial.compression:.{0 if trial.compression >= 100 else 1}f}".removesuffix(".0") + "×"


def _without_nonfinite(value: Any) -> Any:
    """JSON has no NaN and no infinity: the metric of a failed trial is written as a word."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_nonfinite(values: dict[str, Any]) -> dict[str, Any]:
    words = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    return {k: words.get(v, v) if k in _NUMBERS and isinstance(v, str) else v for k, v in values.items()}
