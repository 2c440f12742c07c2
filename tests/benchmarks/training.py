"""What the callback adds to whole training steps, through a Trainer: the network's own work is in them.

    python tests/benchmarks/training.py

The same training runs with and without the callback in turns, and the medians of its steps are compared; likewise
with the monitor, and with logging at every step, which tells what logging costs at Lightning's cadence of 50.
"""

from __future__ import annotations

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
from timing import machine

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


class Clock(Callback):
    """The seconds of each step, the first two left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if trainer.global_step > 2:
            self.times.append(time.perf_counter() - self._start)


def step_seconds(
    make: Callable[[], tuple[nn.Module, Tensor]], steps: int, callbacks: list[Callback], every: int, accelerator: str
) -> float:
    """The mean seconds of a step; what happens at some of them only counts in full."""
    torch.manual_seed(0)
    network, inputs = make()
    data = DataLoader(TensorDataset(inputs, torch.randint(10, (len(inputs),))), batch_size=len(inputs))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=steps + 2,
            accelerator=accelerator,
            devices=1,
            callbacks=[*callbacks, clock],  # last, so that it stops after all others have done their work
            logger=TensorBoardLogger(folder),
            log_every_n_steps=every,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Classifier(network), data)
    return statistics.median(clock.times) if every > steps else statistics.fmean(clock.times)


def main(accelerator: str = "cpu", rounds: int = 5, only: str = "") -> None:
    """Print the table.

    Args:
        accelerator: Where, such as cpu or gpu.
        rounds: How often each training is repeated, in turns.
        only: Only tasks with this in their name.
    """
    warnings.filterwarnings("ignore")
    never = 10**9
    contestants: dict[str, tuple[Callable[[], list[Callback]], int]] = {
        "alone": (list, never),
        "alone, logging every step": (list, 1),
        "with the callback": (lambda: [GradientCoherentRegularization("l1", strength=STRENGTH)], never),
        "logging every step": (lambda: [GradientCoherentRegularization("l1", strength=STRENGTH)], 1),
        "monitor every step": (lambda: [CompressionMonitor()], 1),
    }
    rows = []
    for task, (make, steps) in TASKS.items():
        if only not in task:
            continue
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, (callbacks, every) in contestants.items():
                times[name].append(step_seconds(make, steps, callbacks(), every, accelerator))
        found = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        rows.append(
            {
                "training": task,
                "step in ms": found["alone"],
                "callback adds": f"{found['with the callback'] / found['alone'] - 1:.1%}",
                "callback adds in ms": found["with the callback"] - found["alone"],
                "its logging adds in ms, each 50th step": (found["logging every step"] - found["with the callback"])
                / 50,
                "monitor adds in ms, each 50th step": (found["monitor every step"] - found["alone, logging every step"])
                / 50,
            }
        )
    print(f"On a {machine(torch.device('cuda' if accelerator == 'gpu' else 'cpu'))}, torch {torch.__version__}.\n")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".2f"))


if __name__ == "__main__":
    auto_cli(main)
