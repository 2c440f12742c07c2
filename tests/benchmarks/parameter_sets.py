"""Parameters with the shapes of well-known networks, and gradients for them; nothing is ever computed with these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torchvision import models

__all__ = ["PARAMETER_SETS", "evenly", "make_parameters"]


def transformer() -> nn.Module:
    """84 encoder layers of width 64: 1,008 small tensors."""
    layer = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=256, batch_first=True)
    return nn.TransformerEncoder(layer, 84, enable_nested_tensor=False)


PARAMETER_SETS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": models.resnet18,
    "VGG-16": models.vgg16,
    "transformer": transformer,
}


def evenly(weights: int, tensors: int) -> nn.Module:
    """So many weights in so many square matrices, or about as many."""
    side = max(1, round((weights / tensors) ** 0.5))
    return nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(tensors))


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
