"""
An image classifier with a tenth of its weights
===============================================

A small convolutional network learns handwritten digits twice: once as it is, and once with a callback that makes nine
in ten weights zero during training. The model, its loss and its optimizer do not change.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization, load_compressed, save_compressed

warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.set_num_threads(1)  # the layers are small

# %%
# The data and the model
# ----------------------
#
# The 1,797 images of scikit-learn have 8×8 pixels. A quarter of them is for testing.

images, labels = load_digits(return_X_y=True)
pixels = (torch.from_numpy(images).float().view(-1, 1, 8, 8) - 5) / 6
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
data = TensorDataset(pixels[order], torch.from_numpy(labels).long()[order])
train_data, test_data = torch.utils.data.Subset(data, range(1350)), torch.utils.data.Subset(data, range(1350, 1797))


class Classifier(LightningModule):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, classes = batch
        return nn.functional.cross_entropy(self.net(inputs), classes)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, classes = batch
        self.log("accuracy", (self.net(inputs).argmax(1) == classes).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


# %%
# Two trainings
# -------------
#
# The second training adds :class:`~lightning_gcsr.GradientCoherentRegularization` with the target sparsity. In both,
# :class:`~lightning_gcsr.CompressionMonitor` logs the sparsity, and the small callback ``History`` records it for the
# figure below.


class History(Callback):
    """Keeps accuracy and sparsity after each epoch."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.sparsity: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accuracy.append(float(trainer.callback_metrics["accuracy"]))
        self.sparsity.append(float(trainer.callback_metrics["sparsity/model"]))


def train(*callbacks: Callback) -> tuple[Classifier, History]:
    """Train the network from the same seed."""
    seed_everything(0, verbose=False)
    model, history = Classifier(), History()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=20,
        callbacks=[*callbacks, CompressionMonitor(verbose=False), history],
        logger=False,  # leave this out to watch the training in TensorBoard
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, DataLoader(train_data, 64, shuffle=True), DataLoader(test_data, 512))
    return model, history


dense, dense_history = train()
sparse, sparse_history = train(GradientCoherentRegularization("l1", target_sparsity=0.9))

for name, history in (("no penalty", dense_history), ("90 % zeros", sparse_history)):
    print(f"{name}: accuracy {history.accuracy[-1]:.1%}, sparsity {history.sparsity[-1]:.1%}")

# %%
# The sparsity follows a curve that reaches the target after 80 % of the training. Afterwards the network settles.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, history in (("no penalty", dense_history), ("target_sparsity=0.9", sparse_history)):
    left.plot(range(1, 21), history.accuracy, label=name)
    right.plot(range(1, 21), history.sparsity, label=name)
left.set(xlabel="epoch", ylabel="test accuracy", ylim=(0.5, 1.01))
right.set(xlabel="epoch", ylabel="sparsity", ylim=(-0.02, 1.02))
left.legend(loc="lower right")
for axis in (left, right):
    axis.grid(alpha=0.3)

# %%
# The small file
# --------------
#
# In the file of :func:`~lightning_gcsr.save_compressed` zeros take almost no space. Every value comes back unchanged.

with tempfile.TemporaryDirectory() as folder:
    torch.save(sparse.state_dict(), Path(folder) / "large.pt")
    save_compressed(sparse, Path(folder) / "small.safetensors")
    for path in sorted(Path(folder).iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    loaded = Classifier()
    loaded.load_state_dict(load_compressed(Path(folder) / "small.safetensors"))

assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), loaded.parameters(), strict=True))

# %%
# For your own model, pass the same two callbacks to its Trainer. :doc:`/settings` helps to choose other settings, and
# :doc:`/compress` describes the file.
