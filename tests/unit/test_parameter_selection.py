"""Which parameters are regularized."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gcsr.core.parameter_selection import left_out_by_default, parameter_aliases, select_parameters
from lightning_gcsr.core.strengths import assign_strengths


class PlainNorm(nn.Module):
    """A norm that someone else wrote, with a weight of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class LayerNorm2d(PlainNorm):
    """Named as convolution networks name theirs."""


class LlamaRMSNorm(PlainNorm):
    """Named as language models name theirs."""


class NormalizedLinear(PlainNorm):
    """No norm layer, although the word is in its name."""


class Normalizer(PlainNorm):
    """No norm layer either."""


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


class Vision(nn.Module):
    """A model that asks to spare some of its parameters, by the convention of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 3))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 3))
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.table = nn.Parameter(torch.ones(5, 3))
        self.head = nn.Linear(3, 2)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "table"}


# --- select_parameters ---------------------------------------------------------------------------------------------


def test_weights_are_selected_and_biases_are_not() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.Embedding(5, 2), nn.LSTM(2, 2))
    assert list(select_parameters(net)) == ["0.weight", "1.weight", "2.weight", "3.weight_ih_l0", "3.weight_hh_l0"]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(2),
        nn.BatchNorm2d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2, affine=True),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
        nn.LayerNorm((2, 3)),
        nn.LayerNorm((2, 3, 4)),
        nn.RMSNorm((2, 3)),
        PlainNorm(),
        LayerNorm2d(),
        LlamaRMSNorm(),
    ],
    ids=lambda norm: f"{type(norm).__name__}-{next(norm.parameters()).dim()}d",
)
def test_norm_layers_are_left_out(norm: nn.Module) -> None:
    assert list(select_parameters(nn.Sequential(norm, nn.Linear(2, 2)))) == ["1.weight"]


def test_a_subclass_of_a_norm_layer_is_a_norm_layer() -> None:
    class Scale(nn.LayerNorm):
        pass

    assert list(select_parameters(nn.Sequential(Scale((2, 2)), nn.Linear(2, 2)))) == ["1.weight"]


@pytest.mark.parametrize("layer", [NormalizedLinear(), Normalizer()])
def test_a_layer_with_norm_within_its_name_is_kept(layer: nn.Module) -> None:
    assert list(select_parameters(nn.Sequential(layer))) == ["0.weight"]


def test_a_weight_inside_a_norm_named_container_belongs_to_its_own_layer() -> None:
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm((2, 2)), nn.Linear(2, 2)

    assert list(select_parameters(PreNorm())) == ["inner.weight"]


def test_what_a_model_asks_to_spare_is_left_out_unless_it_is_named() -> None:
    assert list(select_parameters(Vision())) == ["head.weight"]
    assert list(select_parameters(nn.Sequential(Vision()))) == ["0.head.weight"]
    assert list(select_parameters(Vision(), include=["table"])) == ["table"]


def test_dimensions_of_size_one_do_not_count_but_in_the_weight_of_a_layer() -> None:
    net = nn.Module()
    net.scale = nn.Parameter(torch.ones(3, 1, 1))
    net.token = nn.Parameter(torch.ones(1, 1, 3))
    net.head = nn.Linear(3, 1)
    net.depthwise = nn.Conv1d(4, 4, 3, groups=4)
    assert list(select_parameters(net)) == ["head.weight", "depthwise.weight"]


def test_what_is_broadcast_over_the_batch_is_no_weight_of_a_layer() -> None:
    net = nn.Module()
    net.place = nn.Parameter(torch.ones(1, 4, 3))
    net.table = nn.Parameter(torch.ones(4, 3))
    net.one_filter = nn.Conv2d(4, 1, 3)
    assert list(select_parameters(net)) == ["table", "one_filter.weight"]
    assert list(select_parameters(net, include=["place"])) == ["place"]


def test_a_table_whose_name_says_position_is_no_weight_of_a_layer() -> None:
    tables = ["pos", "position", "pos_embed", "positional_embedding", "posemb", "absolute_pos_embed", "cls_token"]
    tables += ["relative_position_bias_table", "positions", "pos_enc", "class_embedding", "pos_bias_u"]
    weights = ["pos_proj", "pos_weight", "compose", "position_wise", "lora_A", "in_proj_weight", "kernel", "token"]
    net = nn.ParameterDict({name: nn.Parameter(torch.ones(4, 3)) for name in [*tables, *weights]})
    assert sorted(select_parameters(net)) == sorted(weights)
    assert sorted(left_out_by_default(net)) == sorted(tables)
    assert list(select_parameters(net, include=["^pos$"])) == ["pos"]
    layers = nn.ModuleDict({"position": nn.Embedding(4, 3), "pos_embed": nn.Linear(3, 3)})
    assert list(select_parameters(layers)) == ["position.weight", "pos_embed.weight"]


def test_frozen_parameters_are_selected_too() -> None:
    net = small_net().requires_grad_(False)
    assert list(select_parameters(net)) == ["0.weight", "2.weight"]


def test_tied_weights_come_once_under_the_first_name() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    net["head"].weight = net["embedding"].weight
    selected = select_parameters(net)
    assert list(selected) == ["embedding.weight"]
    assert selected["embedding.weight"] is net["head"].weight


def test_a_layer_used_twice_comes_once() -> None:
    layer = nn.Linear(2, 2)
    assert list(select_parameters(nn.Sequential(layer, nn.ReLU(), layer))) == ["0.weight"]


def test_the_marker_of_a_compiled_submodule_is_not_in_the_names() -> None:
    net = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm((2, 2)))), nn.Linear(2, 2))
    assert [name for name, _ in net.named_parameters() if "_orig_mod" in name]
    assert list(select_parameters(net)) == ["0.0.weight", "1.weight"]
    assert list(select_parameters(net, include=[r"^0\.0\."])) == ["0.0.weight", "0.0.bias"]


def test_the_marker_of_a_compiled_module_is_not_in_the_names() -> None:
    assert list(select_parameters(torch.compile(small_net()))) == ["0.weight", "2.weight"]


def test_names_and_objects_are_those_of_the_module_in_its_order() -> None:
    net = small_net()
    named = dict(net.named_parameters())
    selected = select_parameters(net, include=["bias", r"2\.", r"0\.weight"])
    assert list(selected) == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    assert all(parameter is named[name] for name, parameter in selected.items())


def test_include_replaces_the_default() -> None:
    assert list(select_parameters(small_net(), include=[r"^1\."])) == ["1.weight", "1.bias"]


def test_exclude_leaves_out_of_the_default() -> None:
    assert list(select_parameters(small_net(), exclude=[r"^0"])) == ["2.weight"]


def test_exclude_leaves_out_of_include() -> None:
    assert list(select_parameters(small_net(), include=["weight"], exclude=[r"^1", r"^2"])) == ["0.weight"]


def test_exclude_may_match_what_was_not_selected() -> None:
    assert list(select_parameters(small_net(), exclude=["bias"])) == ["0.weight", "2.weight"]


def test_a_pattern_is_searched_anywhere_in_the_name() -> None:
    assert list(select_parameters(small_net(), include=["eigh"])) == ["0.weight", "1.weight", "2.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_told_near_names(argument: str) -> None:
    message = rf"`{argument}` must match the name of a parameter, got {argument}='2\.wieght'\. Near names: '2\.weight'"
    with pytest.raises(ValueError, match=message):
        select_parameters(small_net(), **{argument: ["2.wieght"]})


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_one_bad_pattern_among_good_ones_is_an_error(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}` must match .* got {argument}='nowhere'"):
        select_parameters(small_net(), **{argument: ["0.weight", "nowhere"]})


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_does_not_compile_is_an_error(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}` must hold regular expressions that compile \(.*\), got"):
        select_parameters(small_net(), **{argument: ["weight", "*"]})


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_bare_string_is_no_list_of_patterns(argument: str) -> None:
    with pytest.raises(TypeError, match=rf"`{argument}` must be a list .*got .*Write {argument}=\['weight'\]"):
        select_parameters(small_net(), **{argument: "weight"})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_of_patterns_is_an_error(argument: str, empty: object) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}` must have at least one regular expression, got .*Use None"):
        select_parameters(small_net(), **{argument: empty})


@pytest.mark.parametrize(
    ("net", "arguments", "known"),
    [
        (nn.Sequential(nn.LayerNorm(3)), {}, r"'0\.weight', '0\.bias'\."),
        (small_net(), {"exclude": ["weight"]}, r"'0\.weight', '0\.bias', '1\.weight'"),
        (nn.ReLU(), {}, "no parameters"),
    ],
    ids=["only-norms", "all-excluded", "no-parameters"],
)
def test_nothing_to_regularize_is_an_error(net: nn.Module, arguments: dict, known: str) -> None:
    with pytest.raises(ValueError, match=rf"There is nothing to regularize.*`include`.* The module has: {known}"):
        select_parameters(net, **arguments)


def test_a_pattern_for_a_module_without_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`include` must match .* got include='weight'\. There are none\."):
        select_parameters(nn.ReLU(), include=["weight"])


def test_a_lazy_parameter_is_an_error_that_says_what_to_do() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"The lazy parameter '1\.weight' has no shape yet\. Run one batch"):
        select_parameters(net)
    net(torch.ones(1, 2))
    assert list(select_parameters(net)) == ["0.weight", "1.weight"]


def test_integer_parameters_are_skipped() -> None:
    net = nn.Module()
    net.codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    net.mask = nn.Parameter(torch.ones(2, 2, dtype=torch.bool), requires_grad=False)
    net.weight = nn.Parameter(torch.ones(2, 2))
    net.phase = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    assert list(select_parameters(net)) == ["weight", "phase"]
    with pytest.raises(ValueError, match="`include` must match the name of a parameter, got include='codes'"):
        select_parameters(net, include=["codes"])


def tied_net() -> nn.ModuleDict:
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "body": nn.Linear(3, 3)})
    net["head"].weight = net["embedding"].weight
    return net


def test_a_pattern_may_name_a_tied_parameter_by_any_of_its_names() -> None:
    net = tied_net()
    assert list(select_parameters(net, include=["head.weight"])) == ["embedding.weight"]
    assert list(select_parameters(net, exclude=[r"^head"])) == ["body.weight"]
    selected = select_parameters(net)
    strengths = assign_strengths(selected, {"head": 0.1, ".": 0.2}, aliases=parameter_aliases(net))
    assert strengths == {"embedding.weight": 0.1, "body.weight": 0.2}


def test_near_names_know_all_names_of_a_tied_parameter() -> None:
    with pytest.raises(ValueError, match=r"Near names: 'head\.weight'"):
        select_parameters(tied_net(), include=["haed.weight"])
