"""Units that are zero are taken out of chains of layers, and the outputs stay what they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_gcsr import UnitCount, shrink_units

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
    smaller, report = shrink_units(module)
    assert largest_difference(module, smaller, inputs) < 1e-12
    assert largest_difference(module.float(), smaller.float(), inputs.float()) < 1e-5
    assert all(before >= after >= 1 for before, after in report.units.values())
    assert shrink_units(smaller)[1].units == {name: (n, n) for name, (_, n) in report.units.items()}


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
    smaller, report = shrink_units(net)
    assert report.units == {"0": (4, 2)}
    assert largest_difference(net, smaller, torch.randn(3, 2, *[6] * dims)) < 1e-6


# -- what goes and what stays ----------------------------------------------------------------------------------------


def test_a_constant_is_folded_into_the_next_bias() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1, bias=False))
    zero_units(net[0], 1)
    nn.init.constant_(net[0].bias, 2.0)
    smaller, report = shrink_units(net)
    assert sizes(smaller) == [(2, 2), (1, 2)]
    assert torch.allclose(smaller[2].bias, net[2].weight[:, 1] * torch.tensor(2.0).sigmoid())
    assert (smaller[0].out_features, smaller[2].in_features) == (2, 2)
    assert report.units == {"0": UnitCount(3, 2)}
    assert report.left_alone == {}
    assert report.flops is None


def test_no_bias_is_made_where_nothing_is_to_be_folded() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    zero_units(net[0], 1)
    assert shrink_units(net)[0][2].bias is None


def test_a_unit_that_nothing_reads_goes_and_takes_those_before_it_along() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[4].weight[:, 1:] = 0
        net[2].weight[0, 2] = 0  # only the units that go read this one
    smaller, _ = shrink_units(net)
    assert sizes(smaller) == [(2, 2), (1, 2), (1, 1)]


def test_a_channel_that_is_flattened_goes_with_all_its_positions() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    zero_units(net[0], 0)
    net[0].bias.data.fill_(0.7)
    with torch.no_grad():
        net[4].weight[:, 8] = 0  # one position of a channel whose others are read
    smaller, _ = shrink_units(net)
    assert sizes(smaller) == [(2, 1, 3, 3), (2, 8)]
    assert largest_difference(net, smaller, torch.randn(3, 1, 6, 6)) < 1e-6


@pytest.mark.parametrize(("bias", "stays"), [(0.5, True), (-0.5, False)])
def test_a_constant_before_zero_padding_stays_unless_it_is_zero(bias: float, stays: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
    zero_units(net[0], 2)
    nn.init.constant_(net[0].bias, bias)
    smaller, report = shrink_units(net)
    assert len(smaller[0].weight) == (3 if stays else 2)
    assert ("0" in report.left_alone) is stays
    if stays:
        assert report.left_alone["0"].startswith("1 of its units are constant, but stay: the bias of '2'")


@pytest.mark.parametrize(
    ("pool", "goes"),
    [
        (nn.MaxPool2d(2, padding=1), True),
        (nn.MaxPool2d(2, padding=2, dilation=3), False),  # one position is all padding: −∞
        (nn.MaxPool2d(2, stride=3, ceil_mode=True), True),
        (nn.AvgPool2d(2, padding=1), False),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), True),
        (nn.AvgPool2d(2, stride=3, ceil_mode=True), True),
        (nn.AvgPool2d(2, divisor_override=3), False),
        (nn.AdaptiveAvgPool2d(3), True),
        (nn.AdaptiveMaxPool2d(3), True),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_constant_goes_through_a_pool_that_keeps_it(pool: nn.Module, goes: bool, size: int) -> None:
    before = nn.Conv2d(1, 3, 3)
    try:
        positions = pool(torch.zeros(1, 3, size, size))[0, 0].numel()
    except RuntimeError:
        pytest.skip("the image is smaller than the window")
    net = nn.Sequential(before, nn.ELU(), pool, nn.Flatten(), nn.Linear(3 * positions, 2)).double()
    zero_units(net[0], 1)
    nn.init.constant_(net[0].bias, 0.5)
    smaller, report = shrink_units(net)
    assert len(smaller[0].weight) == (2 if goes else 3)
    assert ("0" in report.left_alone) is not goes
    if "dilation=3" not in repr(pool) or size > 2:
        assert largest_difference(net, smaller, torch.randn(3, 1, size + 2, size + 2, dtype=torch.float64)) < 1e-12


def test_one_unit_stays_where_none_does_anything() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    zero_units(net[0], 0, 1, 2)
    smaller, report = shrink_units(net)
    assert sizes(smaller) == [(1, 2), (2, 1)]
    assert report.left_alone == {"0": "one of its units stays, though none does anything: a layer needs one"}
    assert largest_difference(net, smaller, torch.randn(3, 2)) < 1e-6


def test_inputs_and_outputs_of_the_chain_keep_their_number() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
    zero_units(net[2], 0, 1)
    net[0].weight.data[:, :2] = 0
    assert sizes(shrink_units(net)[0]) == [(3, 4), (4, 3)]


def test_constants_that_are_not_finite_stay() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Identity(), nn.Linear(3, 2))
    zero_units(net[0], 0, 1)
    net[0].bias.data[0] = float("inf")
    net[2].weight.data[0, 1] = float("nan")
    smaller, report = shrink_units(net)
    assert sizes(smaller) == [(3, 2), (2, 3)]
    assert "not finite" in report.left_alone["0"]


# -- what cannot be followed is named, and its neighbours keep their widths ------------------------------------------


class Custom(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + inputs.flip(1)


class OwnLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + inputs.sum()


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=1)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own module": (Custom, "Custom is not a layer that is followed"),
    "softmax": (lambda: nn.Softmax(1), "Softmax is not"),
    "layer norm": (lambda: nn.LayerNorm(4), "LayerNorm is not"),
    "hook": (lambda: hooked(nn.ReLU()), "it has hooks"),
    "hook on a chain": (lambda: hooked(nn.Sequential(nn.ReLU())), "it has hooks"),
    "hook on weights": (lambda: hooked(nn.Linear(4, 4)), "it has hooks"),
    "pruned": (lambda: pruned(nn.Linear(4, 4)), "it has hooks"),
    "parametrized": (lambda: doubled(nn.Linear(4, 4)), "it is parametrized"),
    "subclass": (lambda: OwnLinear(4, 4), "OwnLinear is not a layer that is followed"),
    "no statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), "it has no running statistics"),
    "flattens less": (lambda: nn.Flatten(0, 0), "it does not flatten all dimensions but the first"),
    "pool along units": (lambda: nn.AdaptiveAvgPool1d(4), "it does not pool over positions of the units of '0'"),
    "residual": (lambda: nn.Sequential(nn.Linear(4, 4), Custom()), "Custom is not"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_named_and_nothing_before_it_goes(name: str) -> None:
    obstacle, reason = OBSTACLES[name]
    net = nn.Sequential(nn.Linear(3, 4), obstacle(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    zero_units(net[0], 1)
    zero_units(net[2], 0, 3)
    smaller, report = shrink_units(net)
    assert len(smaller[2].weight) == 3
    assert any(value.startswith(reason) for value in report.left_alone.values())
    if name != "residual":
        assert len(smaller[0].weight) == 4
    assert largest_difference(net, smaller, torch.randn(6, 3)) < 1e-6


@pytest.mark.parametrize("weight_norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_is_left_alone_even_after_a_forward_pass(weight_norm: Callable[..., nn.Module]) -> None:
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    zero_units(net[2], 0, 3)
    inputs = torch.randn(6, 3)
    net(inputs).sum().backward()
    smaller, report = shrink_units(net)
    assert set(report.left_alone) == {"0"}
    assert sizes(smaller)[1:] == [(3, 4), (2, 3)]
    assert largest_difference(smaller, net.eval(), inputs) < 1e-6 if weight_norm is not nn.utils.weight_norm else True


def test_tied_weights_are_left_alone_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    zero_units(net[0], 1)
    smaller, report = shrink_units(net)
    assert report.left_alone == {"0": "its weights are tied to others", "2": "its weights are tied to others"}
    assert smaller[2].weight is smaller[0].weight


def test_a_layer_used_twice_is_left_alone_but_an_activation_is_not() -> None:
    layer, activation = nn.Linear(4, 4), nn.ReLU()
    net = nn.Sequential(layer, activation, layer, activation, nn.Linear(4, 4), activation, nn.Linear(4, 2))
    zero_units(net[4], 0)
    smaller, report = shrink_units(net)
    assert report.left_alone == {"0": "it is used more than once", "2": "it is used more than once"}
    assert sizes(smaller)[1:] == [(3, 4), (2, 3)]


def test_grouped_convolutions_and_channels_last_are_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Linear(4, 2))
    zero_units(net[0], 1)
    smaller, report = shrink_units(net)
    assert report.left_alone == {"2": "it has 4 groups"}
    assert sizes(smaller) == sizes(net)
    assert "reads along another dimension" in shrink_units(nn.Sequential(net[0], net[4]))[1].left_alone["1"]


def test_several_positions_of_a_linear_layer_that_are_flattened_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    zero_units(net[0], 1)
    smaller, report = shrink_units(net)
    assert report.left_alone == {"3": "it does not read the units of '0' one by one"}
    assert largest_difference(net, smaller, torch.randn(5, 2, 3)) == 0


# -- modules with chains in them -------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, calls_layers: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        self.calls_layers = calls_layers

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        if self.calls_layers:
            hidden = hidden + self.body[0](hidden)[:, 1:5]
        return self.head(hidden + self.body(hidden))


def test_each_chain_in_a_module_is_shrunk_and_the_rest_is_named() -> None:
    net = Residual()
    for layer in (net.stem, net.body[0], net.head[0]):
        zero_units(layer, 0, 1)
    inputs = torch.randn(5, 3)
    smaller, report = shrink_units(net, inputs)
    assert report.units == {"body.0": (6, 4), "head.0": (5, 3)}
    assert report.left_alone == {"stem": "it is not in an nn.Sequential"}
    assert report.difference is not None
    assert report.difference < 1e-6
    assert report.parameters == UnitCount(sum(p.numel() for p in net.parameters()), 79)
    assert report.flops == UnitCount(2 * 5 * (12 + 48 + 30), 2 * 5 * (12 + 32 + 18))
    assert type(smaller) is Residual


def test_an_example_input_finds_out_where_layers_are_called_one_by_one() -> None:
    net = Residual(calls_layers=True)
    zero_units(net.body[0], 0, 2)
    with pytest.raises(ValueError, match=r"fails on `example_input` .* It does more with the layers"):
        shrink_units(net, torch.randn(5, 3))
    net.body[0].weight.data.normal_()
    zero_units(net.body[0], 0)
    with pytest.raises(ValueError, match=r"`example_input` differ by .* It does more with the layers"):
        shrink_units(net, torch.randn(5, 3))


def test_a_number_that_is_not_one_in_both_outputs_is_no_difference_and_else_is() -> None:
    class Divides(Residual):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) / (self.head[0].weight[:1] != 0).any() / inputs[:, :1].relu()

    net = Divides()
    inputs = torch.randn(5, 3).abs()
    inputs[0, 0] = 0  # infinite before and after
    zero_units(net.head[0], 1)
    _, report = shrink_units(net, inputs)
    assert report.difference is not None
    assert report.difference < 1e-4
    zero_units(net.head[0], 0)  # infinite before, as long as the unit is there
    with pytest.raises(ValueError, match=r"`example_input` differ by inf"):
        shrink_units(net, inputs)


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


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_the_original_and_its_flags_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    zero_units(net[0], 1)
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net.bfloat16()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    smaller, _ = shrink_units(net, torch.randn(1, 1, 4, 4, dtype=torch.bfloat16))
    after = net.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert [module.training for module in smaller.modules()] == [module.training for module in net.modules()]
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    assert not smaller[0].weight.requires_grad
    assert smaller[0].bias.requires_grad
    assert len(smaller[1].running_mean) == smaller[1].num_features == 2
    assert not {id(p) for p in net.parameters()} & {id(p) for p in smaller.parameters()}
    smaller.eval()(torch.randn(3, 1, 4, 4, dtype=torch.bfloat16)).sum().backward()


def test_a_module_that_is_none_or_has_no_shape_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`module` must be a module"):
        shrink_units({"weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"The parameter '0.weight' has no shape yet"):
        shrink_units(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"The parameter '0.weight' has no values yet"):
        shrink_units(nn.Sequential(nn.Linear(2, 3, device="meta")))
