"""Train the network of digits.py on several devices, with the same callbacks and no change to them.

    python examples/multi_device.py --strategy ddp --devices 2 --accelerator cpu
    python examples/multi_device.py --accelerator gpu --devices 8

Every optimizer step sees 64 images, for any number of processes and micro-batches: the batch size of a device is
64 // (processes × micro-batches). Where 64 is divisible by their product, a sampler of this script makes them the
*same* 64 images for any number of processes, so each step equals the step of a single process up to float rounding.
Rounding differences grow over hundreds of steps, as in any training. With `--precision 64-true`, one and two devices
print the same figures.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Literal, NoReturn

import torch
from digits import TRAINING_IMAGES, DigitsClassifier, digits  # examples/digits.py: this script's folder is on the path
from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_gcsr import CompressionMonitor, CompressionRatio, GradientCoherentRegularization, Sparsity

SEED = 0
TEST_IMAGES = 497
STEP_IMAGES = 64


class SharedDigits(LightningDataModule):
    """Each process's share of the digits.

    Args:
        accumulate: Micro-batches in an optimizer step.
    """

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.accumulate = accumulate
        self.train_images, self.test_images = (loader.dataset for loader in digits(SEED))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        processes, rank = self._trainer.world_size, self._trainer.global_rank
        # Every process draws the same order and takes each n-th image of it, so that the batches of all processes
        # together are the batch that a single process would have.
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            self.train_images, processes, rank, shuffle=True, seed=SEED, drop_last=True
        )
        batch_size = batch_size_of_a_device(processes, self.accumulate)
        return DataLoader(self.train_images, batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # One batch for each process. A DistributedSampler would repeat images to make the shares equal.
        processes, rank = self._trainer.world_size, self._trainer.global_rank
        share = range(rank, TEST_IMAGES, processes)
        return DataLoader(Subset(self.test_images, share), batch_size=len(share))

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None  # Lightning sets it before it asks for a loader
        return self.trainer


def batch_size_of_a_device(processes: int, accumulate: int) -> int:
    """The batch size of one device at which a step sees 64 images in all, or fewer if 64 cannot be divided evenly."""
    return STEP_IMAGES // (processes * accumulate)


def same_in_all_processes(trainer: Trainer, module: nn.Module) -> bool:
    """Whether all processes hold exactly the same parameters. Every process must call this function."""
    parameters = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    gathered = trainer.strategy.all_gather(parameters.to(trainer.strategy.root_device))
    everywhere = gathered.reshape(-1, len(parameters))  # one row for each process
    return all(torch.allclose(row, everywhere[0], rtol=0, atol=0, equal_nan=True) for row in everywhere)


def report(trainer: Trainer, model: nn.Module, step_images: int) -> None:
    """Print the results."""
    # Calling a metric does not synchronize, unlike `compute`; only one process is here.
    sparsity, ratio = Sparsity(), CompressionRatio()
    zeros, compression = float(sparsity(model)), float(ratio(model))
    devices = f"{trainer.world_size} × {trainer.strategy.root_device.type}"
    strategy = type(trainer.strategy).__name__
    accuracy = f"{float(trainer.callback_metrics['test_accuracy']):.1%}"
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("devices", "strategy", "test accuracy", "sparsity", "compression ratio"):
        table.add_column(column, justify="right")
    shown = f"{compression:,.1f}×" if compression != float("inf") else "all zero"
    table.add_row(devices, strategy, accuracy, f"{zeros:.2%}", shown)
    magnitude = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    console = Console(width=110, highlight=False, soft_wrap=True)
    console.print()
    console.print(table)
    if step_images != STEP_IMAGES:
        console.print(f"A step saw {step_images} images; these devices cannot share the usual {STEP_IMAGES} evenly.")
    elif trainer.world_size > 1:
        same_images = f"A step saw the same {STEP_IMAGES} images as on one device"
        console.print(f"{same_images}. Results differ only by rounding, which grows from step to step.")
    console.print(f"Sum of |w| over all parameters: {magnitude:.9f}")
    if isinstance(trainer.logger, TensorBoardLogger):
        console.print(f"TensorBoard logs: {trainer.logger.log_dir}")


def fail(message: str, code: int) -> NoReturn:
    """End the program with a message on the standard error."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def main(
    strategy: Literal["auto", "ddp"] = "auto",
    devices: PositiveInt | Literal["auto"] = "auto",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    precision: Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"] = "32-true",
    strength: NonNegativeFloat = 0.03,
    epochs: PositiveInt = 40,
    accumulate_grad_batches: PositiveInt = 1,
    output: Path = Path("runs/multi_device"),
) -> None:
    """Train the digits under gradient-coherent L1 on one or several devices, and check that they agree.

    Args:
        strategy: How the processes share the work; auto takes ddp where there are several.
        devices: How many devices, each with a process of its own; auto takes every GPU, or one CPU process.
        accelerator: Where to train; auto takes GPUs if there are any.
        precision: The number format, as Lightning names it.
        strength: The strength of the L1 penalty; the same for any number of devices.
        epochs: Passes over the training images.
        accumulate_grad_batches: Micro-batches that each process accumulates to one optimizer step.
        output: Each call makes a folder version_0, version_1, ... in it, with its TensorBoard logs.
    """
    # The data are in memory; workers would only slow this down.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    for name in ("LeafSpec", "all_gather is deprecated"):  # between Lightning and newer versions of torch
        warnings.filterwarnings("ignore", f".*{name}.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the layers are too small for more threads to help
    seed_everything(SEED, verbose=False)
    data = SharedDigits(accumulate_grad_batches)
    try:
        trainer = Trainer(
            strategy=strategy,
            devices=devices,
            accelerator=accelerator,
            precision=precision,
            max_epochs=epochs,
            accumulate_grad_batches=accumulate_grad_batches,
            callbacks=[
                GradientCoherentRegularization("l1", strength=strength),
                CompressionMonitor(verbose=False),
            ],
            logger=TensorBoardLogger(output.parent, name=output.name),
            log_every_n_steps=10,
            use_distributed_sampler=False,  # the sampler above works for one process, too
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except MisconfigurationException as error:  # devices that this machine does not have
        fail(f"error: {error}", 2)
    processes = trainer.world_size
    batch_size = batch_size_of_a_device(processes, accumulate_grad_batches)
    if batch_size == 0:
        parts = f"{processes} devices × {accumulate_grad_batches} micro-batches"
        fail(f"error: {parts} cannot share the {STEP_IMAGES} images of a step. Use fewer --devices.", 2)
    step_images = processes * accumulate_grad_batches * batch_size
    steps = TRAINING_IMAGES // step_images
    # Drop the last incomplete batch, so that all processes have the same number of batches.
    trainer.limit_train_batches = steps * accumulate_grad_batches

    model = DigitsClassifier(max_epochs=epochs)
    trainer.fit(model, datamodule=data)

    same = same_in_all_processes(trainer, model)
    if trainer.is_global_zero:
        report(trainer, model, step_images)
        if not same:
            fail(f"error: the {processes} processes do not hold the same weights", 1)
        alone = "There is one process, so there are no weights to compare with"
        print(f"All {processes} processes hold the same weights" if processes > 1 else alone)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
