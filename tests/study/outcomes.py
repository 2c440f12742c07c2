"""Outcomes and runs that nobody trained."""

from __future__ import annotations

from grid import Run
from methods import Method
from problems import Problem
from training import Outcome

PROBLEM = Problem("digits", "deep_mlp", epochs=2, lr=0.02)


def outcome(accuracy: float, nonzeros: int = 1_000, validation: float | None = None, **more: float) -> Outcome:
    """What came out: of 1,000 weights so many nonzeros; accuracies alike where nothing else is said."""
    values: dict[str, float] = {
        "validation_accuracy": accuracy if validation is None else validation,
        "test_accuracy": accuracy,
        "validation_loss": 1 - accuracy,
        "test_loss": 1 - accuracy,
        "weights": 1_000,
        "nonzeros": nonzeros,
        "dense_bytes": 4_000,
        "stored_bytes": 4 * nonzeros,
        "train_loss": 0.5,
        "seconds": 2.0,
        "train_images": 1_118,
        "classes": 10,
    }
    return Outcome(**values | more)  # type: ignore[arg-type]


def plain(strength: float) -> Method:
    """A method of this strength."""
    return Method("plain", penalty="l1", strength=strength, update="proximal")


def some_runs(count: int) -> list[Run]:
    """Runs that differ."""
    return [Run(PROBLEM, plain(0.01 * (1 + number // 2)), number % 2) for number in range(count)]


def outcome_of(run: Run) -> Outcome:
    """What this run would come to, told from all others."""
    return outcome(round(0.5 + (run.method.strength or 0) / 10 + run.seed / 100, 6))
