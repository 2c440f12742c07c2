"""Units that do nothing are removed from networks of any graph, and the outputs stay what they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_gcsr import UnitCount, shrink_units
from lightning_gcsr.structured.output_tree import OutputsDifferError
from lightning_gcsr.structured.output_tree import largest_difference as compared

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.Sigmoid,
    nn.GELU,
    nn.RReLU,
    nn.PReLU,
    lambda: nn.Softplus(beta=2.0),
    lambda: nn.Threshold(0.1, 20.0),
    nn.Identity,
]


def zero_units(layer: nn.Module, *units: int) -> None:
    with torch.no_grad():
        layer.weight[list(units)] = 0


def sizes(chain: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(layer.weight.shape) for layer in chain.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module(inputs)


def largest_difference(module: nn.Module, smaller: nn.Module, inputs: Tensor) -> float:
    before, after = outputs(module, inputs), outputs(smaller, inputs)
    assert before.shape == after.shape
    return float((before - after).abs().max() / before.abs().max().clamp_min(1))


# -- whatever the chain is, the outputs are the same -----------------------------------------------------------------


def with_zeros(draw: Any, module: nn.Module) -> nn.Module:
    """The module with random statistics, and zeros in many rows and columns of its weights."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]))
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
                if layer.affine:
                    layer.weight.normal_()
                    layer.bias.normal_()
            elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                layer.weight[torch.rand(len(layer.weight)) < share] = 0
                layer.weight[:, torch.rand(layer.weight.shape[1]) < share / 2] = 0
    return module


@st.composite
def perceptrons(draw: Any) -> nn.Module:
    widths = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers.append(nn.Linear(n, m, bias=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm1d(m, affine=draw(st.booleans())))
        layers.append(draw(st.sampled_from([*ACTIVATIONS, lambda m=m: nn.PReLU(m)]))())
        if draw(st.booleans()):
            layers.append(nn.Dropout())
    half = draw(st.integers(0, len(layers)))  # one part in a Sequential of its own
    module = nn.Sequential(nn.Sequential(*layers[:half]), *layers[half:])
    return with_zeros(draw, module).double()


POOLS: list[Callable[[], nn.Module]] = [
    lambda: nn.MaxPool2d(2, padding=1),
    lambda: nn.MaxPool2d(3, stride=1, ceil_mode=True),
    lambda: nn.MaxPool2d(2, dilation=2, stride=1, padding=1),
    lambda: nn.AvgPool2d(2, padding=1),
    lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False),
    lambda: nn.AvgPool2d(3, stride=2, ceil_mode=True),
    lambda: nn.AvgPool2d(2, divisor_override=3),
    lambda: nn.AdaptiveAvgPool2d(12),
    lambda: nn.AdaptiveMaxPool2d((12, 13)),
]


@st.composite
def convolutional_networks(draw: Any) -> nn.Module:
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        padding = draw(st.sampled_from([0, 1, "same", (0, 1)]))
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        layers.append(nn.Conv2d(n, m, 3, padding=padding, padding_mode=mode, bias=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(m, affine=draw(st.booleans())))
        layers.append(draw(st.sampled_from([*ACTIVATIONS, lambda m=m: nn.PReLU(m)]))())
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from(POOLS))())
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    features = 4 * widths[-1]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm1d(features))
    layers += [nn.Dropout(), nn.Linear(features, 6), nn.ReLU(), nn.Linear(6, 3)]
    return with_zeros(draw, nn.Sequential(*layers)).double()


def check_outputs(module: nn.Module, inputs: Tensor) -> None:
    """They are those of the smaller module, which cannot be made smaller again."""
    smaller, report = shrink_units(module, inputs)
    assert largest_difference(module, smaller, inputs) < 1e-12
    assert largest_difference(module.float(), smaller.float(), inputs.float()) < 1e-5
    assert all(before >= after >= 1 for before, after in report.units.values())
    again = shrink_units(smaller.double(), inputs)[1]
    assert again.parameters.before == again.parameters.after


@given(perceptrons())
def test_perceptrons_keep_their_outputs(module: nn.Module) -> None:
    width = next(layer.in_features for layer in module.modules() if isinstance(layer, nn.Linear))
    check_outputs(module, torch.randn(5, width, dtype=torch.float64))


@given(convolutional_networks())
def test_convolutional_networks_keep_their_outputs(module: nn.Module) -> None:
    check_outputs(module, torch.randn(2, module[0].in_channels, 31, 31, dtype=torch.float64))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_work_likewise(dims: int) -> None:
    convolution, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    pool = getattr(nn, f"AvgPool{dims}d")
    net = nn.Sequential(convolution(2, 4, 3), norm(4), nn.ReLU(), pool(2), nn.Flatten(), nn.Linear(4 * 2**dims, 3))
    zero_units(net[0], 1, 2)
    nn.init.constant_(net[1].bias, 0.5)
    inputs = torch.randn(3, 2, *[6] * dims)
    smaller, report = shrink_units(net, inputs)
    assert report.units == {"0": (4, 2)}
    assert largest_difference(net, smaller, inputs) < 1e-6


# -- what goes and what stays ----------------------------------------------------------------------------------------


def test_a_constant_is_folded_into_the_next_bias() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1, bias=False))
    zero_units(net[0], 1)
    nn.init.constant_(net[0].bias, 2.0)
    smaller, report = shrink_units(net, torch.randn(5, 2))
    assert sizes(smaller) == [(2, 2), (1, 2)]
    assert torch.allclose(smaller[2].bias, net[2].weight[:, 1] * torch.tensor(2.0).sigmoid())
    assert (smaller[0].out_features, smaller[2].in_features) == (2, 2)
    assert report.units == {"0": UnitCount(3, 2)}
    assert report.left_alone == {}
    assert report.flops == UnitCount(2 * 5 * 9, 2 * 5 * 6)


def test_no_bias_is_made_where_nothing_is_to_be_folded() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    zero_units(net[0], 1)
    assert shrink_units(net, torch.randn(5, 2))[0][2].bias is None


def test_a_unit_that_nothing_reads_goes_and_takes_those_before_it_along() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[4].weight[:, 1:] = 0
        net[2].weight[0, 2] = 0  # only the units that go read this one
    smaller, _ = shrink_units(net, torch.randn(5, 2))
    assert sizes(smaller) == [(2, 2), (1, 2), (1, 1)]


def test_a_channel_that_is_flattened_goes_with_all_its_positions() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    zero_units(net[0], 0)
    net[0].bias.data.fill_(0.7)
    with torch.no_grad():
        net[4].weight[:, 8] = 0  # one position of a channel whose others are read
    smaller, _ = shrink_units(net, torch.randn(3, 1, 6, 6))
    assert sizes(smaller) == [(2, 1, 3, 3), (2, 8)]


@pytest.mark.parametrize(("bias", "stays"), [(0.5, True), (-0.5, False)])
def test_a_constant_before_zero_padding_stays_unless_it_is_zero(bias: float, stays: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
    zero_units(net[0], 2)
    nn.init.constant_(net[0].bias, bias)
    smaller, report = shrink_units(net, torch.randn(2, 1, 6, 6))
    assert len(smaller[0].weight) == (3 if stays else 2)
    assert ("0" in report.left_alone) is stays
    if stays:
        assert report.left_alone["0"].startswith("1 of its units are constant, but stay: no bias")


@pytest.mark.parametrize(
    ("pool", "goes"),
    [
        (nn.MaxPool2d(2, padding=1), True),
        (nn.MaxPool2d(2, stride=3, ceil_mode=True), True),
        (nn.AvgPool2d(2, padding=1), False),  # the corners are a quarter of the constant
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), True),
        (nn.AdaptiveAvgPool2d(3), True),
    ],
)
def test_a_constant_goes_through_a_pool_that_keeps_it(pool: nn.Module, goes: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ELU(), pool, nn.Conv2d(3, 2, 1))
    zero_units(net[0], 1)
    nn.init.constant_(net[0].bias, 0.5)
    smaller, report = shrink_units(net, torch.randn(3, 1, 7, 7))
    assert len(smaller[0].weight) == (2 if goes else 3)
    assert ("0" in report.left_alone) is not goes


def test_one_unit_stays_where_none_does_anything() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    zero_units(net[0], 0, 1, 2)
    smaller, report = shrink_units(net, torch.randn(3, 2))
    assert sizes(smaller) == [(1, 2), (2, 1)]
    assert report.left_alone == {"0": "one of its units stays, though none does anything: a layer needs one"}


def test_inputs_and_outputs_of_the_chain_keep_their_number() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
    zero_units(net[2], 0, 1)
    net[0].weight.data[:, :2] = 0
    assert sizes(shrink_units(net, torch.randn(5, 4))[0]) == [(3, 4), (4, 3)]


def test_constants_that_are_not_finite_stay() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Identity(), nn.Linear(3, 2))
    zero_units(net[0], 0, 1)
    net[0].bias.data[0] = float("inf")
    net[2].weight.data[0, 1] = float("nan")
    smaller, report = shrink_units(net, torch.randn(5, 2))
    assert sizes(smaller) == [(3, 2), (2, 3)]
    assert "not finite" in report.left_alone["0"]


# -- any graph -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Channels that are shared by a stem, a block and its norm, and concatenated with others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.norm = nn.BatchNorm2d(6)
        self.side = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        hidden = self.norm(hidden + self.body(hidden)).relu_()
        return self.head(torch.cat([hidden, self.side(images)], 1).mean((2, 3)))


IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_channel_goes_from_all_layers_that_share_it() -> None:
    net = Residual()
    with torch.no_grad():
        for layer in (net.stem, net.body[3], net.norm):
            layer.weight[:2] = 0
            layer.bias[:2] = 0
        net.norm.bias[1] = 0.5  # folded into the head
        net.stem.weight[4] = 0  # but not in the body: it stays
    smaller, report = shrink_units(net, IMAGES)
    assert report.units == {"stem": (6, 4), "body.0": (8, 8), "body.3": (6, 4), "side": (4, 4)}
    assert [len(layer.weight) for layer in (smaller.stem, smaller.norm, smaller.body[3])] == [4, 4, 4]
    assert (smaller.body[0].in_channels, smaller.head.in_features, smaller.norm.num_features) == (4, 8, 4)
    assert report.difference < 1e-6
    assert [report.kept["head.weight"][1].tolist(), report.kept["norm.bias"][0].tolist()] == [
        [2, 3, 4, 5, 6, 7, 8, 9],
        [2, 3, 4, 5],
    ]


def test_a_concatenated_channel_goes_from_its_place() -> None:
    net = Residual()
    net.head.weight.data[:, 7] = 0
    smaller, _ = shrink_units(net, IMAGES)
    assert torch.equal(smaller.side.weight, net.side.weight[[0, 2, 3]])


@pytest.mark.parametrize(("groups", "outputs"), [(4, 4), (4, 8), (2, 6)])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_group_of_a_convolution_goes_as_a_whole(kind: type[nn.Module], groups: int, outputs: int) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), kind(4, outputs, 3, groups=groups), nn.ReLU(), nn.Conv2d(outputs, 2, 1)
    )
    zero_units(net[0], *range(4 // groups))
    net[0].bias.data[0] = -1.0  # which the activation makes zero
    net[0].bias.data[1] = 0.0
    width = outputs // groups
    nn.init.zeros_(net[2].weight[: 4 // groups] if kind is nn.ConvTranspose2d else net[2].weight[:width])
    smaller, report = shrink_units(net, IMAGES)
    assert report.difference < 1e-6
    assert (smaller[2].groups, smaller[2].in_channels, smaller[2].out_channels) == (
        groups - 1,
        4 - 4 // groups,
        outputs - width,
    )
    assert smaller[0].out_channels == smaller[2].in_channels


def test_the_outputs_of_a_transposed_convolution_lie_along_dimension_1() -> None:
    net = nn.Sequential(
        nn.ConvTranspose1d(2, 5, 3, stride=2), nn.BatchNorm1d(5), nn.Tanh(), nn.ConvTranspose1d(5, 3, 2)
    )
    with torch.no_grad():
        net[0].weight[:, 1] = 0
        net[0].bias[1] = 0
        net[1].bias[1] = 0
        net[0].weight[:, 2] = 0  # a constant that a transposed convolution cannot take up
        net[3].weight[4] = 0
    smaller, report = shrink_units(net, torch.randn(3, 2, 6))
    assert report.units == {"0": (5, 3)}
    assert smaller[3].weight.shape == (3, 3, 2)
    assert report.left_alone["0"].startswith("1 of its units are constant")


class Transformer(nn.Module):
    def __init__(self, need_weights: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 4, batch_first=batch_first)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)
        self.need_weights = need_weights
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embedding(tokens) + self.place
        across = hidden if self.attention.batch_first else hidden.transpose(0, 1)
        mixed = self.attention(across, across, across, key_padding_mask=padding, need_weights=self.need_weights)[0]
        hidden = self.norm(hidden + (mixed if self.attention.batch_first else mixed.transpose(0, 1)))
        return {"logits": self.head(hidden + self.mlp(hidden))}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("zeros", ["values", "reading"])
def test_heads_and_hidden_units_go(need_weights: bool, batch_first: bool, zeros: str) -> None:
    net = Transformer(need_weights, batch_first)
    with torch.no_grad():
        if zeros == "values":  # the biases of the values are folded into that of the projection
            net.attention.in_proj_weight[16 + 2 : 16 + 4] = 0
        else:
            net.attention.out_proj.weight[:, 2:4] = 0
        net.mlp[0].weight[:5] = 0
    tokens, padding = torch.randint(11, (4, 5)), torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    smaller, report = shrink_units(net, (tokens, padding))
    assert report.units == {"attention": (4, 3), "mlp.0": (16, 11)}
    assert smaller.attention.in_proj_weight.shape == (18, 8)
    assert smaller.attention.out_proj.weight.shape == (8, 6)
    assert report.difference < 1e-6
    assert report.left_alone["embedding"] == "layer_norm in 'norm' takes its statistics over all of its units"
    assert set(net.state_dict()) == set(smaller.state_dict())
    inputs = torch.randint(11, (2, 5))
    assert torch.allclose(smaller.eval()(inputs)["logits"], net.eval()(inputs)["logits"], atol=1e-6)


def test_attention_that_keeps_its_heads_stays_what_it_was() -> None:
    net = Transformer()
    zero_units(net.mlp[0], 1)
    smaller, _ = shrink_units(net, torch.randint(11, (4, 5)))
    assert type(smaller.attention) is nn.MultiheadAttention
    assert smaller.mlp[0].out_features == 15


@pytest.mark.parametrize("heads", [-1, 4])
def test_attention_written_out_loses_heads_unless_their_number_is_fixed(heads: int) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
            self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(self, tokens: Tensor) -> Tensor:
            batch, length, _ = tokens.shape
            q, k, v = self.qkv(tokens).reshape(batch, length, 3, heads, 2).permute(2, 0, 3, 1, 4)
            shares = (q @ k.transpose(-1, -2)).softmax(-1)
            return self.mlp(self.norm(tokens + self.out((shares @ v).transpose(1, 2).reshape(batch, length, -1))))

    net = Written()
    zero_units(net.qkv, 18, 19)  # the values of the second head
    zero_units(net.mlp[0], 5)
    smaller, report = shrink_units(net, torch.randn(2, 5, 8))
    assert len(smaller.qkv.weight) == (18 if heads < 0 else 24)
    assert ("qkv" in report.left_alone) is (heads > 0)
    assert report.units["mlp.0"] == (12, 11)


def test_what_is_zero_for_the_example_only_stays() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].bias.data[0] = -100.0  # the activation never passes it on here
    assert shrink_units(net, torch.randn(5, 3))[1].units == {"0": (4, 4)}


def test_a_constant_that_is_written_to_through_a_view_is_none() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            hidden.view(-1).add_(inputs.sum())
            return self.last(hidden)

    net = Writes()
    zero_units(net.first, 0, 1)
    assert shrink_units(net, torch.randn(5, 3))[1].units == {"first": (4, 4)}


def test_channels_that_are_shuffled_split_or_gated_go() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shuffled = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ChannelShuffle(2), nn.Conv2d(6, 8, 1))
            self.head = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            values, gate = self.shuffled(images).chunk(2, 1)
            return self.head((values * gate.sigmoid()).mean((2, 3)))

    net = Gated()
    zero_units(net.shuffled[0], 1, 4)  # the same place in both halves
    net.shuffled[0].bias.data[[1, 4]] = torch.tensor([0.5, -0.3])
    zero_units(net.shuffled[2], 3)
    net.shuffled[2].bias.data[3] = 0
    net.head.weight.data[:, 3] = 0  # neither the value nor its gate is read
    _, report = shrink_units(net, IMAGES)
    assert report.units == {"shuffled.0": (6, 4), "shuffled.2": (8, 6)}
    assert report.difference < 1e-6


def test_a_group_of_group_norm_goes_as_a_whole() -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.SiLU(), nn.Conv2d(6, 2, 1))
    zero_units(net[0], 1, 2, 3)  # the second group, and half of the first, which stays
    net[0].bias.data[2:4] = 0.5
    nn.init.normal_(net[1].bias)
    net[3].weight.data[:, 4] = 0  # half of the third group is not read, and stays in its statistics
    smaller, report = shrink_units(net, IMAGES)
    assert (smaller[1].num_groups, smaller[1].num_channels, smaller[0].out_channels) == (2, 4, 4)
    assert report.difference < 1e-6


def test_tied_weights_and_layers_used_twice_go_in_all_places_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.last.weight = self.hidden.weight
            self.head = nn.Linear(6, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs).relu()
            return self.head(hidden + self.last(self.hidden(self.hidden(hidden)).relu()))

    net = Tied()
    with torch.no_grad():
        for tensor in (net.first.weight, net.first.bias, net.hidden.weight, net.hidden.bias, net.last.bias):
            tensor[2] = 0
    smaller, report = shrink_units(net, torch.randn(5, 4))
    assert report.units == {"first": (6, 5), "hidden": (6, 5), "last": (6, 5)}
    assert smaller.last.weight is smaller.hidden.weight
    assert report.difference < 1e-6


# -- what cannot be followed is named, and its neighbours keep their widths ------------------------------------------


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


class Sorted(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.sort(1).values


class Unknown(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.linalg.qr(inputs).Q


class FixedSize(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.view(-1, 4).relu()


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (lambda: nn.Softmax(1), "softmax in '1' takes all of its units together"),
    "layer norm": (lambda: nn.LayerNorm(4), "layer_norm in '1' takes its statistics over all of its units"),
    "sort": (Sorted, "sort in '1' takes all of its units together"),
    "unknown": (Unknown, "linalg_qr in '1' is not followed"),
    "pool along units": (lambda: nn.AdaptiveAvgPool1d(4), "'1' works along its units"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "_weight_norm_interface in '1.parametrizations.weight.0' is not followed",
    ),
    "fixed size": (FixedSize, "its units are cut up or regrouped by sizes that the code fixes"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_named_and_nothing_before_it_goes(name: str) -> None:
    obstacle, reason = OBSTACLES[name]
    net = nn.Sequential(nn.Linear(3, 4), obstacle(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    zero_units(net[0], 1)
    zero_units(net[2], 0, 3)
    inputs = torch.randn(6, 3)
    smaller, report = shrink_units(net, inputs)
    assert len(smaller[2].weight) == 3
    assert len(smaller[0].weight) == 4
    assert any(reason in value for value in report.left_alone.values())
    assert largest_difference(net, smaller, inputs) < 1e-6


def test_hooks_parametrizations_and_subclasses_are_followed_like_any_code() -> None:
    class Flipped(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).flip(1)

    net = nn.Sequential(
        hooked(nn.Linear(3, 4)), prune.ln_structured(Flipped(4, 6), "weight", 2, 2, 0), nn.ReLU(), nn.Linear(6, 2)
    )
    zero_units(net[0], 1)
    _, report = shrink_units(net, torch.randn(6, 3))
    assert report.units == {"0": (4, 3), "1": (6, 4)}
    assert report.difference < 1e-6


def test_a_layer_that_the_example_does_not_reach_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[1].unused = nn.Linear(3, 5)
    smaller, report = shrink_units(net, torch.randn(5, 4))
    assert report.left_alone == {"1.unused": "the example input does not reach it"}
    assert sizes(smaller) == sizes(net)


def test_a_difference_that_remains_is_an_error() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs) * len(self.net[0].weight)

    net = Counts()
    zero_units(net.net[0], 1)
    with pytest.raises(ValueError, match=r"for `example_input` differ by [\d.]+\. Its code depends on the sizes"):
        shrink_units(net, torch.randn(5, 3))

    class Breaks(Counts):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs) + torch.ones(4)[: len(self.net[0].weight)].view(2, 2).sum()

    net = Breaks()
    zero_units(net.net[0], 1)
    with pytest.raises(ValueError, match=r"The smaller module fails on `example_input` .* Its code depends"):
        shrink_units(net, torch.randn(5, 3))


# -- outputs and what is kept ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outputs:
    logits: Tensor
    features: list[Tensor]


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda x: Outputs(x, [x + 1]),
    "dict": lambda x: {"a": x, "b": {"c": None}},
    "tuple": lambda x: (x, "text"),
    "object": lambda x: SimpleNamespace(logits=x),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_outputs_are_compared_in_any_container(name: str) -> None:
    class Contained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, inputs: Tensor) -> Any:
            return CONTAINERS[name](self.net(inputs) * (self.scale if hasattr(self, "scale") else 1))

    net = Contained()
    zero_units(net.net[0], 1)
    assert shrink_units(net, torch.randn(5, 3))[1].units == {"net.0": (4, 3)}
    with pytest.raises(OutputsDifferError, match="differ by"):
        compared(CONTAINERS[name](torch.ones(3)), CONTAINERS[name](torch.zeros(3)))


def test_outputs_without_tensors_are_refused() -> None:
    class Floats(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return super().forward(inputs).sum().item()

    with pytest.raises(ValueError, match=r"of type float, holds no tensors to compare"):
        shrink_units(Floats(3, 2), torch.randn(5, 3))


def test_numbers_that_are_not_finite_equal_themselves() -> None:
    inf = torch.tensor([torch.inf, torch.nan, 1.0])
    assert compared(inf, inf) == 0
    with pytest.raises(OutputsDifferError, match="differ by inf"):
        compared(inf, torch.ones(3))
    with pytest.raises(OutputsDifferError, match="whole numbers"):
        compared(torch.tensor([1]), torch.tensor([2]))


def test_a_lightning_module_comes_back_without_its_trainer_and_with_its_class() -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

    model = Model()
    model.trainer = trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    zero_units(model.net[0], 1)
    smaller, report = shrink_units(model, torch.randn(4, 2))
    assert isinstance(smaller, Model)
    assert smaller._trainer is None
    assert model.trainer is trainer
    assert report.units == {"net.0": (3, 2)}


def test_the_original_and_its_flags_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    zero_units(net[0], 1)
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net.bfloat16()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    inputs = torch.ones(1, 1, 4, 4, dtype=torch.bfloat16)
    smaller, _ = shrink_units(net, inputs)
    assert torch.equal(random, torch.get_rng_state())
    after = net.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert [module.training for module in smaller.modules()] == [module.training for module in net.modules()]
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    assert not smaller[0].weight.requires_grad
    assert smaller[0].bias.requires_grad
    assert len(smaller[1].running_mean) == smaller[1].num_features == 2
    assert not {id(p) for p in net.parameters()} & {id(p) for p in smaller.parameters()}
    smaller.eval()(torch.randn(3, 1, 4, 4, dtype=torch.bfloat16)).sum().backward()


def test_a_module_or_input_that_does_not_fit_is_refused() -> None:
    inputs = torch.randn(5, 3)
    with pytest.raises(TypeError, match=r"`module` must be a module"):
        shrink_units({"weight": torch.ones(2)}, inputs)
    with pytest.raises(ValueError, match=r"The parameter '0.weight' has no shape yet"):
        shrink_units(nn.Sequential(nn.LazyLinear(3)), inputs)
    with pytest.raises(ValueError, match=r"The parameter '0.weight' has no values yet"):
        shrink_units(nn.Sequential(nn.Linear(2, 3, device="meta")), inputs)
    scripted = torch.jit.ScriptModule()
    with pytest.raises(TypeError, match=r"its submodule '1' is TorchScript. Shrink the module before"):
        shrink_units(nn.Sequential(nn.Linear(3, 4), scripted), inputs)
    with pytest.raises(
        ValueError,
        match=r"an input that the module accepts, got a tensor of shape \(5, 3\), for which submodule '1' raises",
    ):
        shrink_units(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), inputs)
    uncopied = nn.Sequential(nn.Linear(3, 4))
    uncopied.lock = Lock()
    with pytest.raises(ValueError, match=r"`copy.deepcopy` can copy, and Sequential raises TypeError"):
        shrink_units(uncopied, inputs)


def test_printed_report_is_a_table() -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    with torch.no_grad():
        net[0].weight[:40] = 0
    lines = str(shrink_units(net, torch.ones(1, 16))[1]).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["before", "after"],
        ["units", "of", "0", "64", "24"],
        ["parameters", "3,364", "1,404"],
        ["operations", "for", "the", "example", "6,400", "2,560"],
    ]
    assert lines[4].startswith("The outputs for the example differ by at most ")
    assert lines[5:] == ["Left alone:", "  2: layer_norm in '3' takes its statistics over all of its units"]
