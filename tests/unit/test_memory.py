"""The loss gradients of the last step."""

from __future__ import annotations

import math

import torch

from lightning_gcsr.memory import LastGradients

YES, NO, CPU = torch.tensor(True), torch.tensor(False), torch.device("cpu")


def test_nothing_is_known_at_first() -> None:
    memory = LastGradients()
    assert memory.recall("w") is None
    assert memory.known(["w", "v"], CPU).tolist() == [False, False]
    assert memory.known([], CPU).tolist() == []


def test_the_last_gradient_is_kept_as_a_copy() -> None:
    memory, gradient = LastGradients(), torch.tensor([1.0, 2.0])
    for factor in (1.0, 3.0):
        memory.remember("w", gradient * factor, YES)
        kept = gradient * factor
        memory.remember("v", gradient, YES)
        assert torch.equal(memory.recall("w"), kept)
    gradient.zero_()
    assert memory.recall("v").tolist() == [1.0, 2.0]
    assert memory.known(["v", "x", "w"], CPU).tolist() == [True, False, True]


def test_a_non_finite_gradient_is_not_kept() -> None:
    memory, broken = LastGradients(), torch.tensor([math.nan, math.inf])
    memory.remember("w", broken, NO)
    assert memory.recall("w").tolist() == [0.0, 0.0]
    assert memory.known(["w"], CPU).tolist() == [False]
    memory.remember("w", torch.tensor([1.0, 2.0]), YES)
    memory.remember("w", broken, NO)
    assert memory.recall("w").tolist() == [1.0, 2.0]
    assert memory.known(["w"], CPU).tolist() == [True]


def test_clear_forgets() -> None:
    memory = LastGradients()
    memory.remember("w", torch.ones(2), YES)
    memory.clear()
    assert memory.recall("w") is None
    assert memory.known(["w"], CPU).tolist() == [False]
