"""What the callback adds to whole training steps, through a Trainer: the network's own work is in them.

    python tests/benchmarks/trainings.py

What the callbacks take is measured in their own hooks, and compared with the step that they are part of: what a step
takes by itself varies by more than that. They log never or at each step, which tells what logging costs at Lightning's
cadence of 50.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

sys.path.insert(0, str(Path(__file__).parent))
from timing import Benchmark, machine

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization

STRENGTH = 1e-6


class Classifier(LightningModule):
    """A network on random data, with SGD."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class Encoder(nn.Module):
    """A small transformer over 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, nhead=4, dim_feedforward=512, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(1))
        return logits


def resnet() -> tuple[nn.Module, Tensor]:
    """ResNet-18 on 32×32, batch 128."""
    network = models.resnet18(num_classes=10)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network, torch.randn(128, 3, 32, 32)


def perceptron() -> tuple[nn.Module, Tensor]:
    """The digits' network, batch 64."""
    return nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    ), torch.randn(64, 64)


TASKS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int]] = {
    "ResNet-18 on 32×32, batch 128": (resnet, 4),
    "transformer, 64 tokens, batch 32": (lambda: (Encoder(), torch.randint(1000, (32, 64))), 40),
    "multi-layer perceptron on the digits, batch 64": (perceptron, 400),
}
"""What is trained, and in how many steps."""


HOOKS = ("on_after_backward", "on_before_optimizer_step", "_after_step", "on_train_batch_start", "on_train_batch_end")


class Clock(Callback):
    """The seconds of each step, and those of them that were spent in the hooks of another callback."""

    def __init__(self, watched: Callback) -> None:
        self.steps: list[float] = []
        self.hooks: list[float] = []
        self._spent = 0.0
        for hook in HOOKS:
            if hasattr(watched, hook):
                setattr(watched, hook, self._timed(getattr(watched, hook)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            hook(*arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._spent += time.perf_counter() - start

        return timed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._spent, self._start = 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > 2:  # the first steps make what later ones use
            self.steps.append(time.perf_counter() - self._start)
            self.hooks.append(self._spent)


def milliseconds(
    make: Callable[[], tuple[nn.Module, Tensor]], steps: int, callback: Callback, every: int, accelerator: str
) -> tuple[float, float]:
    """The median milliseconds of a step, and of the callback's hooks in it."""
    torch.manual_seed(0)
    network, inputs = make()
    data = DataLoader(TensorDataset(inputs, torch.randint(10, (len(inputs),))), batch_size=len(inputs))
    clock = Clock(callback)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=steps + 2,
            accelerator=accelerator,
            devices=1,
            # The clock comes last: of the start of a batch it misses the other's hook, which does next to nothing.
            callbacks=[callback, clock],
            logger=TensorBoardLogger(folder),
            log_every_n_steps=every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Classifier(network), data)
    return 1e3 * statistics.median(clock.steps), 1e3 * statistics.median(clock.hooks)


def measure(task: str, steps: int, accelerator: str) -> dict[str, Any]:
    """One row for a training."""
    make, _ = TASKS[task]

    def penalized() -> Callback:
        return GradientCoherentRegularization("l1", strength=STRENGTH)

    never = 10**9
    step, hooks = milliseconds(make, steps, penalized(), never, accelerator)
    _, logging_hooks = milliseconds(make, steps, penalized(), 1, accelerator)
    # Epochs are one batch long here, and the monitor counts at the end of an epoch anyway.
    _, counting = milliseconds(make, steps, CompressionMonitor(verbose=False, log_summary=False), 1, accelerator)
    return {
        "training": task,
        "step in ms": step,
        "callback in ms": hooks,
        "share of the step": hooks / step,
        "logging every 50th step, share": (logging_hooks - hooks) / 50 / step,
        "monitor every 50th step, share": counting / 50 / step,
    }


def benchmark(accelerator: str = "cpu", only: str = "", shorter: int = 1) -> Benchmark:
    """The table, and the callback's share of each training's step.

    Args:
        accelerator: Where, such as cpu or gpu.
        only: Only tasks with this in their name.
        shorter: By which number of steps is divided.
    """
    warnings.filterwarnings("ignore")
    for package in ("lightning.pytorch", "lightning_gcsr"):
        logging.getLogger(package).setLevel(logging.ERROR)
    rows = [measure(task, steps // shorter, accelerator) for task, (_, steps) in TASKS.items() if only in task]
    frame = pd.DataFrame(rows)
    for column in frame.columns[3:]:
        frame[column] = frame[column].map("{:.1%}".format)
    where = torch.device("cuda" if accelerator == "gpu" else "cpu")
    text = f"On a {machine(where)}, torch {torch.__version__}.\n\n{frame.to_markdown(index=False, floatfmt='.2f')}"
    return Benchmark(text, {f"training: {row['training']}": row["share of the step"] for row in rows})


def main(accelerator: str = "cpu", only: str = "") -> None:
    """Print the table.

    Args:
        accelerator: Where, such as cpu or gpu.
        only: Only tasks with this in their name.
    """
    print(benchmark(accelerator, only).text)


if __name__ == "__main__":
    auto_cli(main)
