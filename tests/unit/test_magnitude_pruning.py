"""Small weights become zero, in place, where the penalties reach."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gcsr import prune_small


def net() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.1, -0.2], [0.3, -0.4]]))
        module[2].weight.copy_(torch.tensor([[0.05, 0.0], [1.0, -0.2]]))
        module[0].bias.fill_(0.01)
    return module


def test_weights_up_to_the_threshold_become_zero_and_biases_and_norms_do_not() -> None:
    module = net()
    weight = module[0].weight
    assert prune_small(module, 0.2) == 4
    assert module[0].weight is weight
    assert weight.tolist() == [[0, 0], [pytest.approx(0.3), pytest.approx(-0.4)]]
    assert module[2].weight.tolist() == [[0, 0], [1, 0]]
    assert module[0].bias.tolist() == [pytest.approx(0.01)] * 2
    assert prune_small(module, 0.2) == 0


def test_patterns_choose_the_parameters() -> None:
    assert prune_small(net(), 0.2, exclude=[r"^2\."]) == 2
    assert prune_small(net(), 0.02, include=["0.bias$"]) == 2
    with pytest.raises(ValueError, match=r"`include` must match the name of a parameter, got include='encoder'"):
        prune_small(net(), 0.2, include=["encoder"])


def test_tied_weights_count_once_also_as_a_view() -> None:
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    module[2].weight = nn.Parameter(module[0].weight.detach().t())
    assert prune_small(module, 1e9) == 9
    assert module[2].weight.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_nan_and_infinity_stay_whatever_the_type(dtype: torch.dtype) -> None:
    module = nn.Linear(4, 1, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[math.nan, math.inf, 0.25, -0.0]], dtype=dtype))
    assert prune_small(module, 0.25) == 1
    assert torch.isnan(module.weight[0, 0])
    assert torch.isinf(module.weight[0, 1])
    assert module.weight[0, 2:].count_nonzero() == 0
    assert not torch.signbit(torch.view_as_real(module.weight) if dtype.is_complex else module.weight)[0, 2:].any()


def test_complex_weights_go_by_their_absolute_value() -> None:
    module = nn.Linear(2, 1, dtype=torch.complex64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.3 + 0.4j, 0.4 + 0.4j]]))
    assert prune_small(module, 0.5) == 1
    assert module.weight[0, 0] == 0


@given(st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=20), st.floats(0, 2))
def test_the_count_is_that_of_the_weights_that_were_not_zero(weights: list[float], threshold: float) -> None:
    module = nn.Linear(len(weights), 1, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([weights], dtype=torch.float64))
    assert prune_small(module, threshold) == sum(0 < abs(weight) <= threshold for weight in weights)
    assert module.weight[0].tolist() == [weight if abs(weight) > threshold else 0.0 for weight in weights]


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_a_threshold_that_is_no_magnitude_is_refused(threshold: float) -> None:
    module = net()
    with pytest.raises(ValueError, match=r"`threshold` must be a finite number of at least 0, got threshold="):
        prune_small(module, threshold)
    with pytest.raises(TypeError, match=r"`threshold` must be a finite number of at least 0, got threshold='small'"):
        prune_small(module, "small")
    assert module[0].weight.count_nonzero() == 4
