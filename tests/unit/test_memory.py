"""The loss gradients of the last step, and their running average."""

from __future__ import annotations

import io
import math

import pytest
import torch
from reference import oracle
from torch import Tensor

from lightning_gcsr.core.gradient_average import GradientMemory, remember

CPU = torch.device("cpu")


def update(memory: GradientMemory, name: str, gradient: Tensor) -> Tensor:
    """Take a gradient in as a step does, if it is finite."""
    [share] = memory.count([name], gradient.isfinite().all().expand(1))
    remembered = memory.recall(name, gradient)
    remember(remembered, gradient, share.to(gradient.dtype))
    return remembered


# --- the last gradient, an average that forgets at once ------------------------------------------------------------


def test_nothing_is_known_at_first() -> None:
    memory = GradientMemory(0.0)
    assert memory.recall("w", torch.ones(2)).tolist() == [0.0, 0.0]
    assert memory.known(["w", "v"], CPU).tolist() == [False, False]
    assert memory.known([], CPU).tolist() == []


def test_the_last_gradient_is_kept_as_a_copy() -> None:
    memory, gradient = GradientMemory(0.0), torch.tensor([1.0, 2.0])
    for factor in (1.0, 3.0):
        update(memory, "w", gradient * factor)
        kept = gradient * factor
        update(memory, "v", gradient)
        assert torch.equal(memory.recall("w", gradient), kept)
    gradient.zero_()
    assert memory.recall("v", gradient).tolist() == [1.0, 2.0]
    assert memory.known(["v", "x", "w"], CPU).tolist() == [True, False, True]


def test_a_non_finite_gradient_is_not_kept() -> None:
    memory, broken = GradientMemory(0.0), torch.tensor([math.nan, math.inf])
    assert update(memory, "w", broken).tolist() == [0.0, 0.0]
    assert memory.known(["w"], CPU).tolist() == [False]
    update(memory, "w", torch.tensor([1.0, 2.0]))
    assert update(memory, "w", broken).tolist() == [1.0, 2.0]
    assert memory.known(["w"], CPU).tolist() == [True]


def test_clear_forgets() -> None:
    memory = GradientMemory(0.0)
    update(memory, "w", torch.ones(2))
    memory.clear()
    assert memory.recall("w", torch.ones(2)).tolist() == [0.0, 0.0]
    assert memory.known(["w"], CPU).tolist() == [False]


def test_those_that_count_together_may_be_some_of_all_in_any_order() -> None:
    memory = GradientMemory(0.5)
    memory.count(["a", "b", "c"], torch.tensor([True, False, True]))
    shares = memory.count(["c", "b"], torch.tensor([True, True]))
    assert shares.tolist() == pytest.approx([0.5 / 0.75, 1.0])
    assert memory.known(["b", "d", "a"], CPU).tolist() == [True, False, True]
    assert memory.count(["a", "c"], torch.tensor([False, False])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_remembering_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    memory, gradient = torch.randn(100, dtype=dtype), torch.randn(100, dtype=dtype)
    before = memory.clone()
    remember(memory, gradient / 0, torch.zeros((), dtype=dtype))
    assert torch.equal(memory, before)
    remember(memory, gradient, torch.ones((), dtype=dtype))
    assert torch.equal(memory, gradient)


# --- averages ------------------------------------------------------------------------------------------------------


def random_gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.999])
def test_the_average_weighs_each_gradient_by_its_age(decay: float) -> None:
    averages, gradients = GradientMemory(decay), random_gradients(12)
    for step, gradient in enumerate(gradients, start=1):
        found = update(averages, "w", gradient)
        torch.testing.assert_close(found, oracle.average(gradients[:step], decay), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.98])
def test_the_average_of_one_number_is_that_number(decay: float) -> None:
    """The weights add up to 1 from the first step on; without the correction it would start near 0."""
    averages = GradientMemory(decay)
    for _ in range(5):
        torch.testing.assert_close(update(averages, "w", torch.full((2,), 3.0)), torch.full((2,), 3.0))


def test_the_first_gradient_is_its_own_average_in_every_bit_but_not_the_same_tensor() -> None:
    gradient = random_gradients(1)[0]
    before = gradient.clone()
    average = update(GradientMemory(0.9), "w", gradient)
    assert torch.equal(average, gradient)
    average.zero_()
    assert torch.equal(gradient, before)


def test_each_name_has_an_average_and_a_count_of_its_own() -> None:
    averages, (first, second) = GradientMemory(0.5), random_gradients(2)
    update(averages, "w", first)
    update(averages, "w", second)
    assert torch.equal(update(averages, "v", second), second)
    assert averages.state_dict(["w", "v"])["steps"] == {"w": 2, "v": 1}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(broken: float, when: int) -> None:
    gradients = random_gradients(5)
    disturbed, other = GradientMemory(0.9), GradientMemory(0.9)
    for step, gradient in enumerate(gradients):
        if step == when:
            for _ in range(3):
                spoilt = gradient.clone()
                spoilt[0, 0] = broken
                assert update(disturbed, "w", spoilt).isfinite().all()
        assert torch.equal(update(disturbed, "w", gradient), update(other, "w", gradient))


def test_before_the_first_finite_gradient_the_average_is_zero() -> None:
    assert update(GradientMemory(0.5), "w", torch.tensor([math.nan, 1.0])).tolist() == [0.0, 0.0]


def test_a_cleared_average_begins_anew() -> None:
    averages, (first, second) = GradientMemory(0.9), random_gradients(2)
    update(averages, "w", first)
    averages.clear()
    assert averages.state_dict(["w"]) == {"averages": {}, "steps": {}}
    assert torch.equal(update(averages, "w", second), second)


def test_the_state_of_averages_loads_weights_only_and_goes_on_in_every_bit() -> None:
    averages, gradients = GradientMemory(0.9), random_gradients(6)
    for gradient in gradients[:4]:
        update(averages, "w", gradient)
        update(averages, "other", gradient)
    file = io.BytesIO()
    torch.save(averages.state_dict(["w", "unknown"]), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["steps"] == {"w": 4}
    assert list(state["averages"]) == ["w"]
    resumed = GradientMemory(0.9)
    update(resumed, "stale", gradients[0])
    resumed.load_state_dict(state, {"w": CPU})
    assert resumed.state_dict(["stale"])["steps"] == {}
    for gradient in gradients[4:]:
        assert torch.equal(update(resumed, "w", gradient), update(averages, "w", gradient))


def test_the_state_of_averages_is_a_copy_on_both_ways() -> None:
    averages, gradients = GradientMemory(0.9), random_gradients(3)
    update(averages, "w", gradients[0])
    state = averages.state_dict(["w"])
    update(averages, "w", gradients[1])
    resumed = GradientMemory(0.9)
    resumed.load_state_dict(state, {"w": CPU})
    update(resumed, "w", gradients[2])
    assert torch.equal(state["averages"]["w"], gradients[0])
    assert state["steps"] == {"w": 1}
