r"""Configure the callbacks in a file: LightningCLI on the handwritten digits. This script does not mention them.

    python examples/cli/main.py fit --config examples/cli/digits.yaml

trains as digits.yaml says, and writes TensorBoard logs, the sparsest checkpoint and the complete configuration to
runs/cli/version_0, version_1, ... Options on the command line override the file. Options such as

    --trainer.callbacks.strength 0.01 --trainer.callbacks.gate.tolerance 0.2

apply to the *last* callback of the list, so GradientCoherentRegularization is the last in digits.yaml. Append another
callback, and its options, like this:

    --trainer.callbacks+=LearningRateMonitor --trainer.callbacks.logging_interval step

`--print_config` after all other options prints the complete configuration without training. To see the arguments of a
callback:

    python examples/cli/main.py fit --trainer.callbacks.help lightning_gcsr.GradientCoherentRegularization

To validate the checkpoint again (Lightning notes that its folder is not that of the new run):

    python examples/cli/main.py validate --config examples/cli/digits.yaml \
        --ckpt_path runs/cli/version_0/checkpoints/sparsest.ckpt
"""

from __future__ import annotations

import itertools
import warnings

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

TRAINING_IMAGES = 1300


class DigitsClassifier(LightningModule):
    """A deep multilayer perceptron for images of 8×8 pixels. The module contains no regularization.

    Args:
        width: Units in each hidden layer.
        depth: Number of hidden layers.
        lr: Learning rate of SGD with momentum at the start; it falls to zero along a cosine.
    """

    def __init__(self, width: int = 128, depth: int = 7, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        sizes = [64, *[width] * depth]
        hidden = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 10))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("test_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Digits(LightningDataModule):
    """1,300 training and 497 test images of 8×8 pixels, from scikit-learn.

    Args:
        batch_size: Images in a batch, on each device.
        split_seed: Seed of the split into training and test images.
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split_seed))
        x, y = torch.from_numpy(images).float()[order], torch.from_numpy(labels).long()[order]
        x = (x - x[:TRAINING_IMAGES].mean()) / x[:TRAINING_IMAGES].std()
        self.training_images = TensorDataset(x[:TRAINING_IMAGES], y[:TRAINING_IMAGES])
        self.test_images = TensorDataset(x[TRAINING_IMAGES:], y[TRAINING_IMAGES:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.training_images, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test_images, 512)


if __name__ == "__main__":
    # The data are in memory; workers would only slow this down.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
    torch.set_num_threads(1)  # the layers are too small for more threads to help
    LightningCLI(DigitsClassifier, Digits)
