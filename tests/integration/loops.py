"""The training loop as one writes it without a Trainer, to compare a Trainer's weights with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gcsr import Clock, CoherentRegularizer

from .models import THIS_STEP, MakeOptimizer, sgd


def train_by_hand(
    net: nn.Module,
    batches: Iterable[list[Tensor]],
    make_optimizer: MakeOptimizer = sgd,
    accumulate: int = 1,
    clip_value: float | None = None,
    **arguments: Any,
) -> CoherentRegularizer:
    """Train the network on these batches; every ``accumulate`` of them make a step. Returns the regularizer."""
    optimizer = make_optimizer(net.parameters())
    regularizer = CoherentRegularizer(net, **(THIS_STEP | arguments))
    batches = list(batches)
    for index, (inputs, targets) in enumerate(batches):
        if index % accumulate == 0:
            optimizer.zero_grad()
        (nn.functional.mse_loss(net(inputs), targets) / accumulate).backward()
        if index % accumulate < accumulate - 1:
            continue
        clock = Clock(index // accumulate, (index + 1 - accumulate) / len(batches))
        regularizer.before_step(optimizer, clock=clock)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(net.parameters(), clip_value)
        optimizer.step()
        regularizer.after_step(optimizer)
    return regularizer
