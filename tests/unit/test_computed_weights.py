"""The weights that count: those that a module computes with, trained and frozen ones apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_gcsr import CompressionRatio, Sparsity, module_bytes
from lightning_gcsr.core.parameter_selection import select_parameters
from lightning_gcsr.sparsity.computed_weights import computed_weights, counted_weights
from lightning_gcsr.sparsity.counting import zero_counts
from lightning_gcsr.sparsity.summary import summarize


class KeepRow(nn.Module):
    """A parametrization that sets all rows but one to zero."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.tensor([[1.0], [0.0], [0.0], [0.0]])


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    prune.random_unstructured(net[0], "weight", 24)
    prune.random_unstructured(net[0], "bias", 2)
    return net


def parametrized() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    parametrize.register_parametrization(net[0], "weight", KeepRow())
    return net


@pytest.mark.parametrize("make", [pruned, parametrized])
def test_zeros_are_those_of_the_weights_that_compute(make) -> None:
    net = make()
    expected = {"0.weight": net[0].weight, "1.weight": net[1].weight}
    weights = computed_weights(net, select_parameters(net))
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [int(zeros) for zeros, _ in zero_counts(list(weights.values()))] == [24, 0]
    sparsity, ratio = Sparsity(), CompressionRatio()
    sparsity.update(net)
    ratio.update(net)
    assert sparsity.compute() == 24 / 40
    assert ratio.compute() == 40 / 16
    summary = summarize(net, select_parameters(net))
    assert (summary.sparsity, summary.ratio) == (24 / 40, 40 / 16)
    assert (summary.dense_bytes, summary.stored_bytes) == module_bytes(net)
    assert summary.dense_bytes == 4 * (32 + 4 + 8 + 2)
    assert summary.stored_bytes < summary.dense_bytes


def test_a_parametrization_of_several_parameters_is_one_weight_and_is_not_trained_by_counting() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 4)), parametrizations.spectral_norm(nn.Linear(4, 4)))
    net[0].parametrizations.weight.original1.data[0] = 0.0
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weights = computed_weights(net, select_parameters(net))
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {"0.weight": (4, 8), "1.weight": (4, 4)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())  # no power iteration
    assert all(part.training for part in net.modules())


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(100, 100).requires_grad_(False), nn.Linear(100, 2))
    with torch.no_grad():
        net[1].weight[0] = 0.0
    return net


def test_trained_weights_are_counted_and_frozen_ones_apart() -> None:
    net = frozen()
    for metric, expected in ((Sparsity(), 0.5), (CompressionRatio(), 2.0)):
        metric.update(net)
        assert metric.compute() == expected
    summary = summarize(net, select_parameters(net))
    assert (summary.sparsity, summary.ratio) == (0.5, 2.0)
    assert summary.sparsity_by_parameter == {"1.weight": 0.5, "0.weight": 0.0}
    assert summary.dense_bytes == module_bytes(net)[0]
    assert "Not counted: 10,000 frozen weights, of which 0.00% are zero." in summary.sentence()
    assert summary.rows()[-1][:4] == ("frozen: 1", "", "10,000", "0.00%")


def test_if_nothing_is_trained_everything_is_counted() -> None:
    net = frozen().requires_grad_(False)
    trained, others = counted_weights(net, select_parameters(net))
    assert (list(trained), others) == (["0.weight", "1.weight"], {})


def test_every_weight_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_gcsr.sparsity.counting as counting

    counted: list[Tensor] = []
    count = counting.near_and_exact_zeros
    monkeypatch.setattr(counting, "near_and_exact_zeros", lambda *args: counted.append(args[0]) or count(*args))
    transfers: list[int] = []
    to_host = counting._to_host
    monkeypatch.setattr(counting, "_to_host", lambda pairs: transfers.append(len(pairs)) or to_host(pairs))
    net = pruned()
    summarize(net, select_parameters(net))
    assert sorted(tensor.numel() for tensor in counted) == [2, 4, 8, 32]
    assert transfers == [4]


def test_no_name_of_a_parameter_collides_with_a_key_of_the_model() -> None:
    net = nn.Module()
    for name in ("model", "ratio", "stored_ratio", "parameter"):
        net.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))
    net.other = nn.Linear(2, 2)
    metrics = summarize(net, select_parameters(net)).metrics()
    assert len(metrics) == 3 + 5
    assert metrics["sparsity/model"] == 16 / 20
    assert metrics["sparsity/parameter/model"] == 1.0
