"""The gate: the rule that decides where the penalty is injected and where it is suppressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, Union

from torch import Tensor

from lightning_gcsr.core.coherence import CoherenceMeasure, GradientStatistics, MeasureName, check_measure
from lightning_gcsr.validation import argument_error, check_choice, check_finite_number

__all__ = ["Gate", "ScopeName"]

ScopeName = Literal["model", "parameter", "element"]

# cos(g, g + λr) is positive until the penalty outweighs an opposing gradient altogether; 0.1 closes just before.
_THRESHOLDS = {"direction": 0.1, "agreement": 0.0, "temporal": 0.0}
DEFAULT_TOLERANCE, _AVERAGING = 0.1, 0.98


class _Chosen:
    """A field that reads as the gate's own choice where it was left ``None``.

    What was given stays in the gate's ``__dict__``. There a command line looks, where one field of a default gate is
    changed and the others are to be chosen anew.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, gate: Optional[Gate], owner: type) -> Optional[float]:
        if gate is None:
            return None
        given: Optional[float] = vars(gate)[self._name]
        return gate._choice(self._name) if given is None else given

    def __set__(self, gate: Gate, value: Optional[float]) -> None:
        vars(gate)[self._name] = value


@dataclass(frozen=True)
class Gate:
    """The rule for applying the penalty: it is injected where coherence ≥ threshold, and suppressed elsewhere.

    The default decides for each weight: the penalty acts unless the loss gradient, averaged over about 50 steps,
    opposes it by more than a tenth of the penalty. ``gate=None`` is plain strong regularization, which always acts.
    ``Gate("direction", scope="model")`` with ``update="gradient"`` is the literal reading of *Gradient-coherent strong
    regularization* (arXiv:1811.08056), as this project understands its abstract.

    Args:
        coherence: The measure, a cosine in [−1, 1]: ``"direction"``: cos(g, g+λr); ``"agreement"``: cos(g, r);
            ``"temporal"``: cos(g, g of the last step), which suppresses in the first step; or a
            :class:`~lightning_gcsr.CoherenceMeasure` of your own. g is the loss gradient, r the gradient of the
            penalty and λ the strength.
        scope: What one decision covers: ``"model"``, ``"parameter"`` (a tensor) or ``"element"`` (a weight, for which
            the cosine is the sign of a product; 0 counts as coherent).
        threshold: The least coherence, in [−1, 1], at which the penalty is injected. ``None`` chooses 0.1 for
            ``"direction"`` and 0 for the others. It has no meaning at element scope.
        tolerance: c in [0, 1], for ``"agreement"`` at element scope: a loss gradient that opposes the penalty by no
            more than c·λ still counts as coherent: cos(g + c·λr, r). ``None`` chooses 0.1 there, 0 elsewhere.
        averaging: β in [0, 1): coherence is measured on a running average of the loss gradients, which looks back over
            about 1/(1−β) steps; for every measure but ``"temporal"``. It takes the memory of one copy of the
            gradients. 0 is the gradient of this step alone. ``None`` chooses 0.98 for ``"agreement"`` at element
            scope, 0 elsewhere.

    Raises:
        ValueError: If an argument is not one of its choices, is outside its range, or does not go with the others.
        TypeError: If an argument has the wrong type.

    Example:
        >>> Gate()
        Gate(coherence='agreement', scope='element', tolerance=0.1, averaging=0.98)
        >>> Gate("direction", scope="model")
        Gate(coherence='direction', scope='model', threshold=0.1)
    """

    coherence: Union[CoherenceMeasure, MeasureName] = "agreement"
    scope: ScopeName = "element"
    threshold: Optional[float] = _Chosen()  # type: ignore[assignment]
    tolerance: Optional[float] = _Chosen()  # type: ignore[assignment]
    averaging: Optional[float] = _Chosen()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_measure(self.coherence)
        check_choice("scope", self.scope, ["model", "parameter", "element"])
        threshold, tolerance, averaging = self.threshold, self.tolerance, self.averaging
        check_finite_number("averaging", averaging, 0.0, 1.0, "Use 0 for the gradient of this step alone.")
        if averaging == 1:
            raise argument_error("averaging", averaging, "must be less than 1", "0.98 looks back over 50 steps.")
        if averaging and self.uses_previous_gradient:
            advice = "Use 'agreement' or 'direction', or leave it out."
            raise argument_error("averaging", averaging, "must be 0 where coherence='temporal'", advice)
        check_finite_number(
            "tolerance", tolerance, 0.0, 1.0, "It is a fraction of the penalty gradient; use 0 for none."
        )
        if tolerance and not self._agreement_by_element:
            rule = "must be 0 unless coherence='agreement' and scope='element'"
            raise argument_error("tolerance", tolerance, rule, "Elsewhere `threshold` says how strict the gate is.")
        if threshold is not None:
            if self.by_element:
                rule = "must be None at scope='element', where coherence is a sign"
                raise argument_error("threshold", threshold, rule, "Use scope='parameter' or 'model', or leave it out.")
            check_finite_number("threshold", threshold, minimum=-1.0, maximum=1.0)
        for name in ("threshold", "tolerance", "averaging"):
            given = vars(self)[name]
            vars(self)[name] = None if given is None else float(given)

    def _choice(self, name: str) -> Optional[float]:
        """The value of an argument that was left open."""
        if name == "averaging":
            return _AVERAGING if self._agreement_by_element else 0.0
        if name == "tolerance":
            return DEFAULT_TOLERANCE if self._agreement_by_element and self.averaging else 0.0
        if self.by_element:
            return None
        return self.coherence.threshold if isinstance(self.coherence, CoherenceMeasure) else _THRESHOLDS[self.coherence]

    @property
    def _agreement_by_element(self) -> bool:
        return self.coherence == "agreement" and self.by_element

    def __repr__(self) -> str:
        arguments = [f"coherence={self.coherence!r}", f"scope={self.scope!r}"]
        if self.threshold is not None:
            arguments.append(f"threshold={self.threshold!r}")
        arguments += [f"{name}={getattr(self, name)!r}" for name in ("tolerance", "averaging") if self._shows(name)]
        return f"Gate({', '.join(arguments)})"

    def _shows(self, name: str) -> bool:
        return bool(getattr(self, name)) or self._agreement_by_element

    @property
    def uses_previous_gradient(self) -> bool:
        """Whether the measure compares with the gradient of the last step, which then must be kept."""
        return self.coherence == "temporal"

    @property
    def by_element(self) -> bool:
        """Whether every weight has a decision of its own."""
        return self.scope == "element"

    def decide(self, statistics: GradientStatistics) -> Tensor:
        """Whether the penalty is injected into each tensor, booleans of shape (n,); alike for all at model scope.

        A gradient that is not finite anywhere closes every gate. Does not synchronize with the host.
        """
        coherence = statistics.coherence if self.scope == "model" else statistics.coherence_by_parameter
        opened = (coherence >= (self.threshold or 0.0)) & statistics.finite
        return opened.expand(statistics.product.shape)
