"""The networks of the study by name. torchvision's parts where it has them, sized for images of about 32×32 pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from attention import CharacterTransformer, VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.models.vgg import cfgs as vgg_configurations
from torchvision.models.vgg import make_layers

from lightning_gcsr.validation import check_choice

Shape = tuple[int, ...]
"""Channels, height and width of an image, or the length of a sequence."""


def make_network(name: str, shape: Shape, classes: int) -> nn.Module:
    """A fresh network: inputs of this shape in, one logit for each class out."""
    check_network(name)
    if (len(shape) == 1) is not (name in TEXT_NETWORKS):
        what, fit = ("text", TEXT_NETWORKS) if len(shape) == 1 else ("images", set(NETWORKS) - TEXT_NETWORKS)
        raise ValueError(f"`network` must be one for {what}, got network={name!r}. Use one of {sorted(fit)}.")
    least = SMALLEST_IMAGE.get(name, 1)
    if name in SMALLEST_IMAGE and min(shape[1:]) < least:
        raise ValueError(
            f"`network` {name!r} needs images of at least {least}×{least} pixels, got {shape[2]}×{shape[1]}."
            " Use another network, or enlarge the images."
        )
    network = NETWORKS[name](shape, classes)
    if isinstance(network, (CharacterTransformer, VisionTransformer)):
        return network
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def check_network(name: str) -> None:
    """Raise a ``ValueError`` that lists the known names, unless this is one."""
    check_choice("network", name, NETWORKS)


def _perceptron(*hidden: int, dropout: float = 0.0) -> Callable[[Shape, int], nn.Module]:
    def make(shape: Shape, classes: int) -> nn.Module:
        sizes = [math.prod(shape), *hidden]
        after: list[nn.Module] = [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
        layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), *after)]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], classes))

    return make


def _lenet_5(shape: Shape, classes: int) -> nn.Module:
    """The variant with 20 and 50 channels and 500 hidden units, on which pruning methods are compared."""
    channels, height, width = shape
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * pixels, 500),
        nn.ReLU(),
        nn.Linear(500, classes),
    )


def _alexnet(slimness: int = 1) -> Callable[[Shape, int], nn.Module]:
    """AlexNet with the kernels of its first layer and the hidden layers cut down to small images."""

    def make(shape: Shape, classes: int) -> nn.Module:
        pixels = shape[1] // 8 * (shape[2] // 8)
        widths = [width // slimness for width in (64, 192, 384, 256, 256, 1024)]
        return nn.Sequential(
            nn.Conv2d(shape[0], widths[0], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(widths[0], widths[1], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(widths[1], widths[2], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(widths[2], widths[3], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(widths[3], widths[4], 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(widths[4] * pixels, widths[5]),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(widths[5], widths[5]),
            nn.ReLU(),
            nn.Linear(widths[5], classes),
        )

    return make


def _vgg_16(batch_norm: bool, slimness: int = 1) -> Callable[[Shape, int], nn.Module]:
    """VGG-16 with hidden layers of 512, for small images."""

    def make(shape: Shape, classes: int) -> nn.Module:
        layers = [layer if isinstance(layer, str) else layer // slimness for layer in vgg_configurations["D"]]
        features = make_layers(layers, batch_norm=batch_norm)
        width = 512 // slimness
        if shape[0] != 3:
            features[0] = nn.Conv2d(shape[0], 64 // slimness, 3, padding=1)
        return nn.Sequential(
            features,
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(width * (shape[1] // 32) * (shape[2] // 32), width),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )

    return make


class ResNet20(nn.Module):
    """Nine of torchvision's basic blocks with 16, 32 and 64 channels, as used on CIFAR."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for n, m in ((16, 16), (16, 32), (32, 64)):
            stride = m // n
            shortcut = nn.Sequential(conv1x1(n, m, stride), nn.BatchNorm2d(m)) if stride > 1 else None
            layers += [BasicBlock(n, m, stride, shortcut), BasicBlock(m, m), BasicBlock(m, m)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


NETWORKS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "deep_mlp": _perceptron(*[128] * 7),
    "lenet_300_100": _perceptron(300, 100),
    "lenet_300_100_dropout": _perceptron(300, 100, dropout=0.5),
    "lenet_5": _lenet_5,
    "alexnet": _alexnet(),
    "alexnet_slim": _alexnet(slimness=4),
    "vgg_16": _vgg_16(batch_norm=False),
    "vgg_16_bn": _vgg_16(batch_norm=True),
    "vgg_16_slim": _vgg_16(batch_norm=False, slimness=4),
    "vgg_16_bn_slim": _vgg_16(batch_norm=True, slimness=4),
    "resnet_20": ResNet20,
    "vision_transformer": VisionTransformer,
    "character_transformer": CharacterTransformer,
}
"""Those that are called slim have a quarter of the width."""
TEXT_NETWORKS = {"character_transformer"}
"""Those that read characters; all others see images."""
SMALLEST_IMAGE = {"lenet_5": 16} | dict.fromkeys(("alexnet", "alexnet_slim"), 8)
SMALLEST_IMAGE |= dict.fromkeys(("vgg_16", "vgg_16_bn", "vgg_16_slim", "vgg_16_bn_slim"), 32)
"""Pixels a side below which pooling leaves nothing."""
