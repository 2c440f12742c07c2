"""The controller of the strength: it arrives at the sparsity that was asked for, while the network trains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Union

from lightning_gcsr.core.penalties import L2, ElasticNet, Penalty
from lightning_gcsr.validation import argument_error, check_finite_number, check_integer

__all__ = ["SparsityController", "check_target_sparsity", "dissolving_strength"]

# Measured on handwritten digits and found alike from 170 to 840 steps, under SGD and AdamW, between 50 and 99.5 %.
UPDATES = 200
MOST_STEPS_APART = 4  # with more between them the network answers in full, and the strength swings
ARRIVES_AT = 0.7
PROPORTIONAL, INTEGRAL = 3.0, 0.3
LARGEST_CHANGE = 0.5
REACH = math.log(1e4)


def check_target_sparsity(target: object, penalty: Penalty, update: str) -> None:
    """Raise unless this penalty and update can arrive at the sparsity.

    Raises:
        ValueError: If ``target`` is not between 0 and 1, or if there would be no exact zeros.
        TypeError: If ``target`` is not a number.
    """
    _check_share("target_sparsity", target)
    if update != "proximal":
        rule = f"must be None where update={update!r}, which makes no weight exactly zero"
        raise argument_error("target_sparsity", target, rule, "Use update='proximal', or give a `strength`.")
    if isinstance(penalty, L2) or (isinstance(penalty, ElasticNet) and penalty.l1_ratio == 0):
        rule = f"must be None with {penalty!r}, which makes no weight exactly zero"
        raise argument_error("target_sparsity", target, rule, "Use 'l1' or 'group_lasso', or give a `strength`.")


def _check_share(name: str, share: object) -> None:
    advice = "It is a share of the weights; 0.9 leaves one in ten."
    check_finite_number(name, share, 0.0, 1.0, advice)
    if share in (0, 1):
        raise argument_error(name, share, "must lie between 0 and 1", advice)


class SparsityController:
    r"""Adapts the strength λ so that the share of zero weights follows a curve that ends at the target.

    The wanted sparsity rises as s(f) = target · (1 − (1 − f/0.7)³), where f in [0, 1] is the share of the training,
    and stays at the target for the last 30 %, in which the network settles. With the error
    e = log((1 − sparsity) / (1 − s)), positive while too many weights are left, log λ is moved every fourth
    step (more often in a training of fewer than 800) by

    Δ log λ = 3 · (change of e) + 0.3 · e,

    a proportional-integral controller in log strength: a step of at most ±0.5, and never more than a factor of 10⁴
    away from where it began. The curve is that of gradual pruning (Zhu and Gupta, arXiv:1710.01878).

    Args:
        target: The share of zero weights to arrive at, in (0, 1).
        strength: The strength to begin with, > 0; it need only be right within some orders of magnitude.
        first_step: The optimizer step (the first is 0) at which the penalty begins.
        last_step: The step at which it has ended, or the training: s(1) is wanted there.

    Raises:
        ValueError: If an argument breaks its rule.
        TypeError: If an argument has the wrong type.

    Example:
        >>> controller = SparsityController(0.9, strength=0.01, first_step=0, last_step=1000)
        >>> controller.wanted(0), controller.wanted(700)
        (0.0, 0.9)
        >>> controller.due(step=0), controller.due(step=3), controller.due(step=4)
        (True, False, True)
        >>> controller.adapt(step=0, sparsity=0.0)  # nothing has happened yet
        >>> controller.adapt(step=4, sparsity=0.0)  # too few zeros
        >>> controller.strength > 0.01
        True
    """

    def __init__(self, target: float, strength: float, first_step: int, last_step: int) -> None:
        _check_share("target", target)
        check_finite_number("strength", strength, minimum=0.0)
        if strength == 0:
            raise argument_error("strength", strength, "must be greater than 0", "It is changed by factors.")
        check_integer("last_step", last_step, minimum=first_step + 1)
        self.target = float(target)
        self._first_step, self._last_step = first_step, last_step
        self._start = self._log_strength = math.log(strength)
        self._error: Union[float, None] = None
        self._every = min(MOST_STEPS_APART, max(1, (last_step - first_step) // UPDATES))

    @property
    def strength(self) -> float:
        """The strength λ at this moment."""
        return math.exp(self._log_strength)

    @property
    def at_its_end(self) -> bool:
        """Whether the strength is as far from where it began as it may be."""
        return self._log_strength in (self._start - REACH, self._start + REACH)

    def wanted(self, step: int) -> float:
        """The share of zero weights wanted at this optimizer step."""
        progress = (step - self._first_step) / (self._last_step - self._first_step) / ARRIVES_AT
        return self.target * (1 - (1 - min(1.0, max(0.0, progress))) ** 3)

    def due(self, step: int) -> bool:
        """Whether the strength is adapted at this step, which takes the sparsity: a synchronization with the host."""
        return self._first_step <= step < self._last_step and (step - self._first_step) % self._every == 0

    def adapt(self, step: int, sparsity: float) -> None:
        """Move the strength by what the sparsity lacks of the one that is wanted when it is adapted next."""
        wanted = self.wanted(step + self._every)
        error = math.log(max(1 - sparsity, 1e-6) / (1 - wanted))
        change = INTEGRAL * error
        if self._error is not None:
            change += PROPORTIONAL * (error - self._error)
        moved = self._log_strength + max(-LARGEST_CHANGE, min(LARGEST_CHANGE, change))
        self._log_strength = max(self._start - REACH, min(self._start + REACH, moved))
        self._error = error

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: plain numbers."""
        return {"start": self._start, "log_strength": self._log_strength, "error": self._error}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; target and length are not part of it."""
        self._start, self._log_strength, self._error = state["start"], state["log_strength"], state["error"]


def dissolving_strength(spans: Mapping[str, float], paths: Mapping[str, float]) -> float:
    """The strength at which proximal steps would dissolve the median tensor within a training, were there no loss.

    Args:
        spans: How far the penalty must carry each tensor to zero, as ``CoherentRegularizer.spans`` gives it.
        paths: How far it is carried at strength 1: the proximal step sizes of all steps, added up.

    Returns:
        The median of span ÷ path over the tensors for which it is positive and finite; 1 if there are none.

    Example:
        >>> dissolving_strength({"first": 0.5, "second": 0.1, "head": 0.2}, {"first": 100, "second": 100, "head": 100})
        0.002
    """
    strengths = [spans[name] / paths[name] for name in spans if paths.get(name, 0) > 0 and 0 < spans[name] < math.inf]
    return statistics.median(strengths) if strengths else 1.0
