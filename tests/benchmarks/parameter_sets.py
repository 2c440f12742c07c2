"""Parameters with the shapes of well-known networks, and gradients for them; nothing is ever computed with these."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn
from torchvision import models

__all__ = ["BUDGET_SETS", "PARAMETER_SETS", "evenly", "make_parameters"]


def evenly(weights: int, tensors: int) -> nn.Module:
    """So many weights in so many square matrices, or about as many."""
    side = max(1, round((weights / tensors) ** 0.5))
    return nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(tensors))


def perceptron() -> nn.Module:
    """A perceptron for the digits: 8 tensors, 0.1 million weights."""
    sizes = (64, 300, 200, 100, 10)
    return nn.Sequential(*[nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)])


def encoder(width: int, layers: int, heads: int) -> nn.Module:
    """A transformer encoder."""
    layer = nn.TransformerEncoderLayer(width, heads, dim_feedforward=4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


BUDGET_SETS: dict[str, Callable[[], nn.Module]] = {
    "perceptron, 8 tensors, 0.1 M": perceptron,
    "1,000 tensors of 32×32": lambda: evenly(1024 * 1000, 1000),
    "ResNet-18, 11 M": models.resnet18,
    "transformer encoder 6×384, 11 M": lambda: encoder(384, 6, 6),
}
"""The networks that the budget of a step is stated for."""

PARAMETER_SETS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": models.resnet18,
    "VGG-16": models.vgg16,
    "transformer": lambda: encoder(64, 84, 4),  # 1,008 small tensors
}
"""The networks that every setting is measured with."""


def make_parameters(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The module with a gradient on every parameter; both random, so that no branch is foreseen."""
    torch.manual_seed(0)
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.05)
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return module
