"""A small network, its data, and training it with the slow regularized step and SGD written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reference import oracle

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


class SlowSGD:
    """Stochastic gradient descent with momentum and dampening, one tensor at a time."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.0, dampening: float = 0.0) -> None:
        self.parameters, self.lr, self.momentum, self.dampening = list(parameters), lr, momentum, dampening
        self.buffers: list[Tensor | None] = [None] * len(self.parameters)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move every parameter by these gradients."""
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            buffer = self.buffers[i]
            later = (1 - self.dampening) * gradient  # dampening spares the first gradient
            buffer = gradient.clone() if buffer is None else self.momentum * buffer + later
            self.buffers[i] = buffer
            with torch.no_grad():
                parameter -= self.lr * buffer

    @property
    def proximal_factor(self) -> float:
        """What a gradient that never changes moves a weight by in the long run, in units of it."""
        return self.lr * ((1 - self.dampening) / (1 - self.momentum) if self.momentum else 1.0)


def train_slowly(
    spec: oracle.Spec,
    strengths: Sequence[Sequence[float]],
    measure: str | None,
    scope: str,
    threshold: float,
    update: str,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    averaging: float = 0.0,
    tolerance: float = 0.0,
) -> tuple[nn.Sequential, list[oracle.Step]]:
    """Train ``small_net`` on ``batches``, one a step; ``strengths`` has a strength for each of ``WEIGHTS`` and step."""
    net = small_net()
    named = dict(net.named_parameters())
    optimizer = SlowSGD(list(named.values()), lr, momentum, dampening)
    previous: list[Tensor] | None = None
    history: list[list[Tensor]] = []
    steps = []
    for batch, now in zip(batches(len(strengths)), strengths, strict=True):
        gradients = dict(zip(named, torch.autograd.grad(loss_of(net, batch), list(named.values())), strict=True))
        of_loss = [gradients[name].clone() for name in WEIGHTS]
        weights = [named[name].detach() for name in WEIGHTS]
        history.append(of_loss)
        averages = None
        if averaging > 0:
            averages = [oracle.average(series, averaging) for series in zip(*history, strict=True)]
        step = oracle.regularized_step(
            spec, weights, of_loss, previous, now, measure, scope, threshold, tolerance, averages
        )
        previous = of_loss
        if update == "gradient":
            gradients.update(zip(WEIGHTS, step.gradients, strict=True))
        optimizer.step(list(gradients.values()))
        if update == "proximal":
            for name, gate, strength in zip(WEIGHTS, step.gates, now, strict=True):
                shrunk = oracle.prox(spec, named[name].detach(), optimizer.proximal_factor * strength)
                with torch.no_grad():
                    named[name].copy_(torch.where(gate, shrunk, named[name]))
        steps.append(step)
    return net, steps
