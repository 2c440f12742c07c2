"""A small network and its data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEIGHTS = ("0.weight", "2.weight", "4.weight")


def small_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three linear layers with biases, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return net.to(dtype)


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, the same in every call."""
    generator = torch.Generator().manual_seed(2)
    numbers = [torch.randn(size, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    return [(number[:, :6], number[:, 6:]) for number in numbers]


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared error."""
    return (net(batch[0]) - batch[1]).square().mean()  # torch 2.5 has no `mse_loss` in 16 bits on a CPU
