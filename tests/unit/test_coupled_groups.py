"""Coupled groups are what can be removed together, and the group lasso over them makes such zeros."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gcsr import CoherentRegularizer, CoupledGroupLasso, GroupSlice, coupled_groups, shrink_units
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


def test_what_attention_reads_makes_no_head() -> None:
    class Attention(nn.Module):
        """Attention without a norm before it, so that the units it reads can be removed, too."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = self.first(inputs)
            return self.last(self.attention(hidden, hidden, hidden, need_weights=False)[0])

    net = Attention()
    groups = coupled_groups(net, torch.randn(2, 5, 6))
    parts = [part for group in groups for part in group.slices if part.name.endswith("proj_weight")]
    assert {(part.dim, part.role) for part in parts} == {(0, "makes"), (1, "reads")}
    assert CoherentRegularizer(net, CoupledGroupLasso(groups), strength=0.1).sparsity() == 0


def test_units_that_a_frozen_parameter_makes_or_whose_memory_is_shared_are_not_listed() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    net[0].weight.requires_grad_(False)
    assert len(coupled_groups(net, torch.randn(2, 4))) == 4
    net[0].weight.requires_grad_(True)
    net[2].weight = nn.Parameter(net[0].weight.data)
    assert coupled_groups(net, torch.randn(2, 4)) == []


class Product(nn.Module):
    """A weight that no layer holds, and what it made of the last example."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head, self.seen = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 2), {}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen["hidden"] = inputs @ self.weight
        return self.head(self.seen["hidden"].relu())


class HookedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 2)
        self.attention.register_forward_hook(lambda module, arguments, output: None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(tokens, tokens, tokens)[0])


class FixedGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = nn.Conv1d(2, 8, 1), nn.Parameter(torch.randn(8, 4, 3))
        self.tail = nn.Sequential(nn.ReLU(), nn.Conv1d(8, 6, 1), nn.ReLU(), nn.Conv1d(6, 2, 1))

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        return self.tail(nn.functional.conv1d(input=self.stem(signals), weight=self.weight, groups=2))


def gpt_block() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    linear = transformers.pytorch_utils.Conv1D  # whose weight is (inputs, outputs)
    return nn.Sequential(linear(6, 4), nn.GELU(), linear(2, 6))


GATED = nn.Sequential(nn.Conv1d(2, 12, 1), nn.GLU(1), nn.Conv1d(6, 2, 1))


@pytest.mark.parametrize(
    ("make", "shape", "count", "left", "kept"),
    [
        (lambda: GATED, (3, 2, 5), 6, 4, ""),
        (Product, (3, 4), 6, 4, ""),
        (gpt_block, (3, 4), 6, 4, ""),
        (HookedAttention, (2, 3, 8), 12, 10, "attention: its units are cut up or regrouped"),  # 2 of 8 outputs
        (FixedGroups, (2, 2, 9), 6, 4, "stem: a convolution has a number of groups that the code fixes"),
    ],
    ids=["GLU", "product", "GPT-2", "hooked attention", "fixed groups"],
)
def test_zero_groups_go_and_what_has_to_stay_is_named(
    make: Any, shape: tuple[int, ...], count: int, left: int, kept: str
) -> None:
    net, inputs = make(), torch.randn(shape)
    net(inputs)  # with gradients, which some modules keep
    groups = coupled_groups(net, inputs)
    assert len(groups) == count
    with torch.no_grad():
        for part in (part for group in groups[::3] for part in group.slices if part.role == "makes"):
            net.get_parameter(part.name).index_fill_(part.dim, torch.tensor(part.indices), 0.0)
    smaller, report = shrink_units(net, inputs)
    assert len(coupled_groups(smaller, inputs)) == left
    assert report.difference < 1e-6
    assert kept in "; ".join(f"{name}: {reason}" for name, reason in report.left_alone.items())


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


@pytest.mark.parametrize("name", ["Bert", "ViT"])
@pytest.mark.filterwarnings("ignore:.*Enum subclass")
def test_heads_and_hidden_units_of_a_hugging_face_encoder_are_found_and_removed(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    own = {"vocab_size": 50} if name == "Bert" else {"image_size": 16, "patch_size": 4}
    net = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, **own)).eval()
    inputs = torch.randint(50, (2, 7)) if name == "Bert" else torch.randn(2, 3, 16, 16)
    groups = coupled_groups(net, inputs)
    assert Counter(len(group.made_by) for group in groups) == {6: 2 * 4, 2: 2 * 64}
    with torch.no_grad():
        for part in (part for group in groups[::3] for part in group.slices if part.role == "makes"):
            net.get_parameter(part.name).index_fill_(part.dim, torch.tensor(part.indices), 0.0)
    smaller, report = shrink_units(net, inputs)
    assert len(coupled_groups(smaller, inputs)) == len(groups) - len(groups[::3])
    assert not report.left_alone
    assert report.difference < 1e-5
