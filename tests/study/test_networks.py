"""Networks: the shapes they take, and as many parameters as their definitions say."""

import pytest
import torch
from networks import NETWORKS, SMALLEST_IMAGE, TEXT_NETWORKS, Shape, make_network
from torch import nn

from lightning_gcsr.core.parameter_selection import select_parameters

GREY: Shape = (1, 28, 28)
COLOUR: Shape = (3, 32, 32)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - TEXT_NETWORKS))
@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["28×28", "32×32"])
def test_one_logit_for_each_class(name: str, shape: Shape) -> None:
    if min(shape[1:]) < SMALLEST_IMAGE.get(name, 1):
        with pytest.raises(ValueError, match=f"{name!r} needs images of at least .* got 28×28"):
            make_network(name, shape, 7)
        return
    network = make_network(name, shape, 7).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", SMALLEST_IMAGE)
def test_smallest_image_is_the_smallest_that_works(name: str) -> None:
    least = SMALLEST_IMAGE[name]
    with torch.no_grad():
        assert make_network(name, (1, least, least + 3), 3).eval()(torch.randn(1, 1, least, least + 3)).shape == (1, 3)
    for shape in ((1, least - 1, least + 3), (1, least + 3, least - 1)):
        size = f"{shape[2]}×{shape[1]}"
        message = f"`network` {name!r} needs images of at least {least}×{least} pixels, got {size}"
        with pytest.raises(ValueError, match=message):
            make_network(name, shape, 3)


def test_oblong_images_fit_every_network() -> None:
    for name in ("deep_mlp", "lenet_300_100", "lenet_5", "alexnet", "resnet_20", "vision_transformer"):
        with torch.no_grad():
            assert make_network(name, (2, 17, 25), 3).eval()(torch.randn(2, 2, 17, 25)).shape == (2, 3), name


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "count"), [("lenet_300_100", 266_610), ("lenet_5", 431_080)])
def test_lenets_have_the_published_size(name: str, count: int) -> None:
    assert parameters(make_network(name, GREY, 10)) == count


def test_resnet_20_has_the_published_size() -> None:
    def block(n: int, m: int) -> int:
        shortcut = n * m + 2 * m if n != m else 0
        return 9 * n * m + 2 * m + 9 * m * m + 2 * m + shortcut

    blocks = 3 * block(16, 16) + block(16, 32) + 2 * block(32, 32) + block(32, 64) + 2 * block(64, 64)
    count = 9 * 3 * 16 + 2 * 16 + blocks + 64 * 10 + 10
    assert 260_000 < count < 280_000
    network = make_network("resnet_20", COLOUR, 10)
    assert parameters(network) == count
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 20  # and the linear one


def test_vgg_16_has_sixteen_layers_and_batch_norms_only_where_asked() -> None:
    for name, norms in (("vgg_16", 0), ("vgg_16_bn", 13)):
        modules = list(make_network(name, COLOUR, 10).modules())
        assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in modules) == 16
        assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == norms


def test_weights_start_at_a_variance_that_carries_signals() -> None:
    network = make_network("deep_mlp", (1, 8, 8), 10)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx((2 / module.in_features) ** 0.5, rel=0.1)
            assert not module.bias.any()


def test_unknown_network_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"`network` must be one of .* Did you mean 'resnet_20'\?") as error:
        make_network("resnet20", COLOUR, 10)
    for name in NETWORKS:
        assert repr(name) in str(error.value)


def test_slim_networks_have_about_a_sixteenth_of_the_weights() -> None:
    for name in ("vgg_16", "vgg_16_bn", "alexnet"):
        ratio = parameters(make_network(name, COLOUR, 10)) / parameters(make_network(f"{name}_slim", COLOUR, 10))
        assert 15 < ratio < 16, name


def test_vision_transformer_has_a_position_for_each_patch_that_no_penalty_reaches() -> None:
    network = make_network("vision_transformer", GREY, 10)
    positions = dict(network.named_parameters())["body.positions"]
    assert positions.shape == (49, 64)
    assert "body.positions" not in select_parameters(network)


def test_networks_for_text_and_for_images_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"`network` must be one for text, got network='deep_mlp'"):
        make_network("deep_mlp", (64,), 96)
    with pytest.raises(ValueError, match=r"`network` must be one for images, got network='character_transformer'"):
        make_network("character_transformer", GREY, 10)
