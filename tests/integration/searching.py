"""A small model whose strength is searched for, and what the tests of the search share."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gcsr import StrengthFinderResult, find_strength

from .models import Regression, loader, make_trainer

GENTLE, DEADLY = 1e-4, 10.0
"""A strength that the model hardly feels, and one that kills it within a few steps."""


class Learner(Regression):
    """Learns within twenty steps, and keeps a list of what it saw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        self.seen.append(batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class DroppingLearner(Learner):
    """The same with dropout and noise, which draw random numbers."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        noise = 0.1 * float(np.random.rand()) if self.training else 0.0
        return nn.functional.mse_loss(self.net(nn.functional.dropout(inputs, 0.2, self.training)), targets) * (
            1 + noise
        )


def learning_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Learns most of what can be learned in twenty steps."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def learner(**kwargs: Any) -> Learner:
    """The model of most tests."""
    return Learner(**({"make_optimizer": learning_sgd} | kwargs))


def trainer_for(path: Path, callbacks: Iterable[Callback] = (), **kwargs: Any) -> Trainer:
    """A quiet Trainer for five epochs of four batches."""
    return make_trainer(path, callbacks, **({"max_epochs": 5} | kwargs))


def search(trainer: Trainer, model: LightningModule, *data: Any, **kwargs: Any) -> StrengthFinderResult:
    """A quick search, from a strength that is hardly felt to one that kills."""
    arguments: dict[str, Any] = {"progress": False}
    if "target_sparsities" not in kwargs:
        arguments["strengths"] = [GENTLE, DEADLY]
    if not data and "datamodule" not in kwargs:
        data = (loader(), loader())
    return find_strength(trainer, model, *data, **(arguments | kwargs))


def shuffled(**kwargs: Any) -> DataLoader[Any]:
    """A loader that shuffles."""
    return DataLoader(loader().dataset, batch_size=4, shuffle=True, **kwargs)


def fields(thing: Any) -> dict[str, Any]:
    """Every field that can be reached from here by its path, as something that can be compared."""
    found: dict[str, Any] = {}
    seen: dict[int, str] = {}
    waiting: list[tuple[str, Any]] = [("", thing)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu()
            found[path] = (id(value), value.dtype, value.requires_grad, data.numpy().tobytes())
        elif isinstance(value, np.ndarray):
            found[path] = value.tobytes()
        elif isinstance(value, torch.Generator):
            found[path] = value.get_state().numpy().tobytes()
        elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum, Path)):
            found[path] = repr(value)
        elif isinstance(value, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)):
            found[path] = id(value)
        elif id(value) in seen:
            found[path] = seen[id(value)]
        else:
            seen[id(value)] = path
            found[path] = (type(value).__qualname__, id(value) if not isinstance(value, types.MethodType) else 0)
            if isinstance(value, dict):
                waiting.extend((f"{path}[{key!r}]", item) for key, item in value.items())
            elif isinstance(value, (list, tuple)):
                waiting.extend((f"{path}[{i}]", item) for i, item in enumerate(value))
            elif isinstance(value, (set, frozenset)):
                found[path + "{}"] = sorted(map(repr, value))
            elif isinstance(value, types.MethodType):
                waiting.append((f"{path}.__self__", value.__self__))
            elif hasattr(value, "__dict__"):
                waiting.extend((f"{path}.{name}", item) for name, item in vars(value).items())
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The paths of the fields that came, went or changed."""
    return [path for path in before.keys() | after.keys() if before.get(path, before) != after.get(path, after)]


class RaisesAt:
    """Raises in the n-th training step over all copies of a model that share it."""

    def __init__(self, step: int, make: Callable[[], BaseException]) -> None:
        self.left, self.make = step, make

    def __deepcopy__(self, memo: dict[int, Any]) -> RaisesAt:
        return self

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.make()


class Failing(DroppingLearner):
    """Raises in one of its training steps, or in none; one bias is frozen and one layer not in training mode."""

    def __init__(self, raises: RaisesAt | None = None) -> None:
        super().__init__(make_optimizer=learning_sgd)
        self.raises = raises
        self.net[0].bias.requires_grad_(False)
        self.net[2].eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.raises is not None:
            self.raises()
        return super().training_step(batch, batch_idx)


__all__ = [
    "DEADLY",
    "GENTLE",
    "DroppingLearner",
    "Failing",
    "Learner",
    "RaisesAt",
    "differences",
    "fields",
    "learner",
    "learning_sgd",
    "search",
    "shuffled",
    "trainer_for",
]
