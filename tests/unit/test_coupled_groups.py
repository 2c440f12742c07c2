"""Coupled groups are what can be removed together, and the group lasso over them makes such zeros."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gcsr import CoupledGroupLasso, GroupSlice, coupled_groups, shrink_units
from tests.unit.test_shrink import IMAGES, Residual, Transformer

TOKENS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))


def parts(group: Any) -> set[tuple[str, int, tuple[int, ...], str]]:
    return {(part.name, part.dim, part.indices, part.role) for part in group.slices}


def test_a_channel_is_listed_with_all_that_makes_and_reads_it() -> None:
    groups = coupled_groups(Residual(), IMAGES)
    assert len(groups) == 6 + 8 + 4  # the stream, the hidden channels of the block, the side branch
    assert parts(groups[2]) == {
        *((f"{layer}.{kind}", 0, (2,), "makes") for layer in ("stem", "body.3", "norm") for kind in ("weight", "bias")),
        ("body.0.weight", 1, (2,), "reads"),
        ("head.weight", 1, (2,), "reads"),
    }
    assert any(GroupSlice("head.weight", 1, (6,), "reads") in group.slices for group in groups)  # the first of `side`


def test_a_head_is_listed_as_a_whole_and_the_stream_of_layer_norm_is_not() -> None:
    groups = coupled_groups(Transformer(), TOKENS)
    assert Counter(len(group.slices) for group in groups) == {3: 4 + 16}
    assert parts(groups[1]) == {
        ("attention.in_proj_weight", 0, (2, 3, 10, 11, 18, 19), "makes"),
        ("attention.in_proj_bias", 0, (2, 3, 10, 11, 18, 19), "makes"),
        ("attention.out_proj.weight", 1, (2, 3), "reads"),
    }


def test_units_that_a_frozen_parameter_makes_or_whose_memory_is_shared_are_not_listed() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    net[0].weight.requires_grad_(False)
    assert len(coupled_groups(net, torch.randn(2, 4))) == 4
    net[0].weight.requires_grad_(True)
    net[2].weight = nn.Parameter(net[0].weight.data)
    assert coupled_groups(net, torch.randn(2, 4)) == []


# -- the penalty against a slow version of it ------------------------------------------------------------------------


class SlowCoupledGroupLasso:
    """Entry by entry, in double precision."""

    def __init__(self, groups: list[Any]) -> None:
        self.groups = groups

    def entries(self, tensors: dict[str, Tensor], group: Any) -> list[tuple[str, tuple[int, ...]]]:
        found = []
        for part in group.slices:
            if part.role == "makes":
                where = torch.zeros(tensors[part.name].shape, dtype=torch.bool)
                where.index_fill_(part.dim, torch.tensor(part.indices), True)
                found += [(part.name, tuple(index)) for index in where.nonzero().tolist()]
        return found

    def value(self, tensors: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for group in self.groups:
            members = [tensors[name][index] for name, index in self.entries(tensors, group)]
            total = total + len(members) ** 0.5 * torch.stack(members).double().norm()
        return total

    def prox(self, tensors: dict[str, Tensor], step: float) -> dict[str, Tensor]:
        results = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for group in self.groups:
            where = self.entries(tensors, group)
            norm = sum(tensors[name][index].item() ** 2 for name, index in where) ** 0.5
            for name, index in where:
                results[name][index] *= max(0.0, 1 - step * len(where) ** 0.5 / norm)
        return results


@pytest.mark.parametrize(("network", "inputs"), [(Residual, IMAGES), (Transformer, TOKENS)])
def test_value_gradient_and_proximal_map_are_those_of_the_slow_version(network: Any, inputs: Tensor) -> None:
    net = network().double() if network is Transformer else network()
    groups = coupled_groups(net, inputs)
    net.double()
    penalty, slow = CoupledGroupLasso(groups), SlowCoupledGroupLasso(groups)
    named = dict(net.named_parameters())
    value = slow.value(named)
    assert torch.isclose(penalty.value(named), value, rtol=1e-12)
    expected = dict(zip(named, torch.autograd.grad(value, list(named.values()), allow_unused=True), strict=True))
    for name, gradient in penalty.gradient(named).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-10)
    norms = penalty.group_norms(named) / penalty.group_sizes(named).sqrt()
    step = float(norms.detach().median())
    shrunk = slow.prox(named, step)
    penalty.prox_(net.named_parameters(), step)
    assert all(torch.allclose(named[name], shrunk[name], rtol=1e-10) for name in named)
    assert 0 < int((penalty.group_norms(named) == 0).sum()) < len(groups)


def test_a_step_for_each_group_leaves_those_whose_gate_is_closed() -> None:
    net = Residual()
    penalty = CoupledGroupLasso(coupled_groups(net, IMAGES))
    before = copy.deepcopy(net)
    steps = torch.zeros(len(penalty.groups))
    steps[3] = 1e3
    penalty.prox_(net.named_parameters(), steps)
    assert penalty.group_norms(net.named_parameters()).nonzero().flatten().tolist() == [0, 1, 2, *range(4, 18)]
    assert torch.equal(net.side.weight, before.side.weight)


@pytest.mark.parametrize(("network", "inputs"), [(Residual, IMAGES), (Transformer, TOKENS)])
@pytest.mark.parametrize("members", ["makes", "all"])
def test_a_group_that_is_zero_is_removed(network: Any, inputs: Tensor, members: Any) -> None:
    net = network()
    penalty = CoupledGroupLasso(coupled_groups(net, inputs), members)
    factors = torch.ones(len(penalty.groups))
    factors[::3] = 0
    penalty.multiply_(net.named_parameters(), factors)
    smaller, report = shrink_units(net, inputs)
    assert len(coupled_groups(smaller, inputs)) == int(factors.sum())
    assert report.difference < 1e-6


def test_the_penalty_of_other_tensors_or_of_no_groups_is_refused() -> None:
    net = Residual()
    groups = coupled_groups(net, IMAGES)
    penalty = CoupledGroupLasso(groups)
    named = dict(net.named_parameters())
    with pytest.raises(ValueError, match=r"hold every tensor of the groups, and 'stem.weight' is not among them"):
        penalty.group_norms({name: named[name] for name in named if name != "stem.weight"})
    with pytest.raises(ValueError, match=r"that the groups were made for, and 'stem.weight' has the shape \(2, 2\)"):
        penalty.value(named | {"stem.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"`groups` must not be empty, got groups=\[\]"):
        CoupledGroupLasso([])
    with pytest.raises(ValueError, match=r"`members` must be one of 'makes', 'all', got members='some'"):
        CoupledGroupLasso(groups, "some")


# -- the same units as torch-pruning ---------------------------------------------------------------------------------


def theirs(graph: Any, names: dict[nn.Module, str], layer: nn.Module, channel: int) -> set[tuple[str, int, int]]:
    """The unit that torch-pruning would remove with one channel, as entries (weight, dimension, index)."""
    group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, [channel])
    found = set()
    for dependency, indices in group:
        module = dependency.target.module
        if module in names and hasattr(module, "weight"):
            depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
            reads = "in_channels" in dependency.handler.__name__ and not depthwise
            one = isinstance(module, nn.BatchNorm2d) or not reads
            found |= {(f"{names[module]}.weight", 0 if one else 1, index) for index in indices}
    return found


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_units_are_those_that_torch_pruning_finds(name: str) -> None:
    torch_pruning = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    net = getattr(torchvision.models, name)(num_classes=10).eval()
    inputs = torch.randn(1, 3, 64, 64)
    ours = {}
    for group in coupled_groups(net, inputs):
        slices = [part for part in group.slices if part.name.endswith("weight")]
        entries = {(part.name, part.dim, index) for part in slices for index in part.indices}
        ours |= dict.fromkeys(entries, entries)
    graph = torch_pruning.DependencyGraph().build_dependency(net, inputs)
    names = {module: name for name, module in net.named_modules()}
    layers = [layer for layer in names if isinstance(layer, nn.Conv2d)][::4]
    assert len(layers) > 3
    for layer in layers:
        expected = theirs(graph, names, layer, 5)
        assert ours[f"{names[layer]}.weight", 0, 5] == expected
