"""Sparsity and compression ratio as torchmetrics."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_gcsr import CompressionRatio, Sparsity

METRICS = [Sparsity, CompressionRatio]


def net_with(zeros: int) -> nn.Sequential:
    """Twelve weights to count, so many of them zero; biases and a norm beside them that are all zero."""
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[0].weight.view(-1)[zeros:] = 1.0
    return net


def value(metric: Metric) -> float:
    result = metric.compute()
    assert result.shape == ()
    return float(result)


@given(
    arrays=st.lists(
        hnp.arrays("float32", hnp.array_shapes(max_side=4), elements=st.sampled_from([0.0, 0.25, 1.0])), min_size=1
    ),
    threshold=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_metrics_are_the_ratios_of_numpy_over_all_updates(arrays: list[np.ndarray], threshold: float) -> None:
    sparsity, ratio = Sparsity(threshold), CompressionRatio(threshold)
    for array in arrays:
        sparsity.update(torch.from_numpy(array))
        ratio.update([torch.from_numpy(array)])
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    alive = int((np.abs(flat) > threshold).sum())
    assert value(sparsity) == pytest.approx(1 - alive / flat.size)
    assert value(ratio) == (math.inf if alive == 0 else pytest.approx(flat.size / alive))


@pytest.mark.parametrize(
    "wrap",
    [lambda t: t, lambda t: [t], lambda t: (t,), lambda t: (x for x in [t]), lambda t: {"w": t}.values()],
    ids=["tensor", "list", "tuple", "generator", "view"],
)
def test_tensors_come_in_many_wrappings(wrap: Callable[[Tensor], object]) -> None:
    tensor = torch.tensor([0.0, 0.0, 0.0, 2.0])
    for metric, expected in ((Sparsity(), 0.75), (CompressionRatio(), 4.0)):
        metric.update(wrap(tensor))
        assert value(metric) == expected


def test_of_a_module_the_regularized_weights_are_counted() -> None:
    for metric, expected in ((Sparsity(), 0.75), (CompressionRatio(), 4.0)):
        metric.update(net_with(zeros=9))
        assert value(metric) == expected


def test_all_parameters_are_counted_on_request() -> None:
    metric = Sparsity()
    metric.update(net_with(zeros=0).parameters())
    assert value(metric) == pytest.approx(9 / 21)


def test_a_module_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="There is nothing to regularize"):
        Sparsity().update(nn.ReLU())


def test_updates_add_up_by_weights_not_by_batches() -> None:
    metric = Sparsity()
    metric.update(torch.zeros(2))
    metric.update(torch.ones(6))
    assert value(metric) == 0.25


def test_reset_forgets() -> None:
    for metric, expected in ((Sparsity(), 0.5), (CompressionRatio(), 2.0)):
        metric.update(torch.zeros(8))
        metric.reset()
        metric.update(torch.tensor([0.0, 1.0]))
        assert value(metric) == expected
        other = type(metric)()
        other.update(torch.ones(2))
        assert value(other) == expected - (0.5 if isinstance(metric, Sparsity) else 1.0)


def test_forward_gives_the_value_of_the_batch_and_adds_up() -> None:
    metric = Sparsity()
    assert float(metric(torch.zeros(2))) == 1.0
    assert float(metric([torch.ones(6)])) == 0.0
    assert value(metric) == 0.25


def test_tied_weights_count_once() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    metric = Sparsity()
    metric.update([weight, weight, weight.t(), torch.ones(4)])
    assert value(metric) == pytest.approx(3 / 8)
    net = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3), "more": nn.Linear(2, 3)})
    net["head"].weight = net["embedding"].weight
    nn.init.zeros_(net["head"].weight)
    nn.init.ones_(net["more"].weight)
    metric = Sparsity()
    metric.update(net)
    assert value(metric) == 0.5


@pytest.mark.parametrize("nothing", [[], torch.empty(0), torch.empty(0, 3), iter(())])
def test_nothing_counted_is_neither_sparse_nor_compressed(nothing: object) -> None:
    nothing = nothing if isinstance(nothing, Tensor) else list(nothing)
    for metric, expected in ((Sparsity(), 0.0), (CompressionRatio(), 1.0)):
        metric.update(nothing)
        assert value(metric) == expected


def test_all_zero_is_fully_sparse_and_infinitely_compressed() -> None:
    for metric, expected in ((Sparsity(), 1.0), (CompressionRatio(), math.inf)):
        metric.update(torch.zeros(3, 3))
        assert value(metric) == expected


def test_no_zero_is_not_compressed() -> None:
    for metric, expected in ((Sparsity(), 0.0), (CompressionRatio(), 1.0)):
        metric.update(torch.ones(3, 3))
        assert value(metric) == expected


@pytest.mark.parametrize("bad", [3, None, "abc", [1.0, 2.0], [torch.ones(2), 3], {"w": torch.ones(2)}])
@pytest.mark.parametrize("kind", METRICS)
def test_anything_else_is_an_error(kind: type[Metric], bad: object) -> None:
    with pytest.raises(TypeError, match="`weights` must be a module, a tensor or an iterable of tensors, got weights="):
        kind().update(bad)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize(
    ("threshold", "error"),
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("0", TypeError), (True, TypeError)],
)
def test_a_bad_threshold_is_an_error(kind: type[Metric], threshold: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="`zero_threshold` must be a finite number of at least 0, got zero_threshold="):
        kind(threshold)


@pytest.mark.parametrize("kind", METRICS)
def test_pickling_keeps_the_count(kind: type[Metric]) -> None:
    metric = kind(zero_threshold=0.5)
    metric.update(torch.tensor([0.25, 1.0, 0.0, 2.0]))
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.zero_threshold == 0.5
    assert value(copy) == value(metric)
    copy.update(torch.zeros(4))
    assert value(copy) == (0.75 if kind is Sparsity else 4.0)


@pytest.mark.parametrize("kind", METRICS)
def test_moving_keeps_the_count(kind: type[Metric]) -> None:
    metric = kind()
    metric.update(torch.tensor([0.0, 1.0]))
    metric = metric.to("cpu").double().half()
    metric.update(torch.tensor([0.0, 1.0]))
    assert value(metric) == (0.5 if kind is Sparsity else 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", METRICS)
def test_metric_and_weights_may_be_on_different_devices(kind: type[Metric]) -> None:
    expected = 0.5 if kind is Sparsity else 2.0
    metric = kind().to("cuda")
    metric.update(torch.tensor([0.0, 1.0]))
    metric.update(torch.tensor([0.0, 1.0], device="cuda"))
    assert metric.compute().device.type == "cuda"
    assert value(metric) == expected
    metric = metric.to("cpu")
    metric.update(torch.tensor([0.0, 1.0], device="cuda"))
    assert value(metric) == expected


def test_large_counts_stay_exact() -> None:
    """In float32 counts beyond 2²⁴ would stand still."""
    metric = Sparsity()
    metric.update(torch.zeros(1))
    metric.zeros += 2**24
    metric.total += 2**24
    for _ in range(4):
        metric.update(torch.zeros(1))
    assert int(metric.zeros) == int(metric.total) == 2**24 + 5


def test_more_compression_is_better() -> None:
    assert CompressionRatio().higher_is_better is True


def test_arguments_reach_torchmetrics() -> None:
    metric = Sparsity(0.1, compute_with_cache=False)
    metric.update(torch.zeros(1))
    assert metric.compute_with_cache is False
