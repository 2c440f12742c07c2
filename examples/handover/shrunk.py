"""The networks that the other files here hand over: a ResNet-20 and a small vision transformer, shrunk.

Their weights are random, and some of their coupled groups are zero, as training with a penalty on these would leave
them: speed and sizes are those of trained networks, accuracy is not at issue.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lightning_gcsr import coupled_groups, shrink_units

Network = Callable[[Tensor], Any]


class Block(nn.Module):
    """Two convolutions and what is added to them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(images)).relu()
        out: Tensor = (self.norm2(self.conv2(hidden)) + self.shortcut(images)).relu()
        return out


def resnet_20() -> nn.Module:
    """The ResNet-20 for CIFAR-10, with 272,474 parameters and convolutions in its two shortcuts."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for stage, outputs in enumerate((16, 32, 64)):
        for block in range(3):
            layers.append(Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vision_transformer() -> nn.Module:
    """Four layers of eight heads, on patches of 4×4 pixels."""
    network: Any = VisionTransformer(32, 4, num_layers=4, num_heads=8, hidden_dim=128, mlp_dim=512, num_classes=10)
    nn.init.normal_(network.heads[0].weight, std=0.1)  # torchvision begins with zeros
    made: nn.Module = network
    return made


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNet-20": resnet_20, "ViT": vision_transformer}


class Pair(NamedTuple):
    """A network with zeros, what is left of it, and images for both."""

    name: str
    dense: nn.Module
    smaller: nn.Module
    images: Tensor


@torch.no_grad()
def make_pair(name: str, share: float = 0.6, images: int = 8, seed: int = 0) -> Pair:
    """A network of which a share of the coupled groups is zero, and the smaller one."""
    torch.manual_seed(seed)
    network, batch = NETWORKS[name](), torch.randn(images, 3, 32, 32)
    network(batch)  # for the statistics of batch norm
    network.eval()
    groups = [group for group in coupled_groups(network, batch) if float(torch.rand(())) < share]
    for part in (part for group in groups for part in group.slices if part.role == "makes"):
        network.get_parameter(part.name).index_fill_(part.dim, torch.tensor(part.indices), 0.0)
    smaller, report = shrink_units(network, batch)
    print(f"{name}: {report.parameters.before:,} parameters, shrunk {report.parameters.after:,}")
    return Pair(name, network, smaller, batch)


@torch.no_grad()
def milliseconds(networks: list[Network], images: Tensor, repeats: int = 20) -> list[float]:
    """The median time of each network; they take turns, after two runs that do not count."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(repeats + 2):
        for network, measured in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(images)
            measured.append(1_000 * (time.perf_counter() - start))
    return [statistics.median(measured[2:]) for measured in times]


@torch.no_grad()
def compare(what: str, pair: Pair, network: Network, closeness: float = 1e-4) -> None:
    """Print the times of the dense network, the shrunk one, and the one handed over; exit where its outputs differ."""
    expected = pair.smaller(pair.images)
    difference = float((torch.as_tensor(network(pair.images)) - expected).abs().max() / expected.abs().max())
    dense, smaller, handed_over = milliseconds([pair.dense, pair.smaller, network], pair.images)
    print(
        f"{pair.name}, {what}: {dense:.1f} ms dense, {smaller:.1f} ms shrunk, {handed_over:.1f} ms handed over;"
        f" outputs differ by {difference:.1e}"
    )
    if difference > closeness:
        raise SystemExit(f"The outputs differ by more than {closeness:g} of the largest one.")
