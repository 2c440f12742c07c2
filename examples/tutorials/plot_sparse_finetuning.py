"""
Fine-tune a pretrained network, sparsely
========================================

A network that was pretrained on one task is often fine-tuned on another, and usually stays as large as it was. Here it
becomes sparse during fine-tuning: a strong L1 penalty acts on the weights where the gradients agree with it.

The example needs no download. Both tasks use the handwritten digits of scikit-learn: a small network is pretrained on
the digits 0 to 4 and fine-tuned on the digits 5 to 9.
"""

from __future__ import annotations

import copy
import logging
import warnings

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcsr import CompressionMonitor, Gate, GradientCoherentRegularization, KeepZeros, Schedule, module_bytes

warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*have collapsed.*")  # said of plain L1, under which the network collapses
torch.set_num_threads(1)  # the layers are small

# %%
# The two tasks
# -------------
#
# The images have 8×8 pixels. Three quarters of each task are for training, the rest is for testing.

images, labels = load_digits(return_X_y=True)
pixels = (torch.from_numpy(images).float() - 5) / 6
digits = torch.from_numpy(labels).long()


def task(first: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images of five digits, whose classes are 0 to 4."""
    chosen = torch.nonzero((digits >= first) & (digits < first + 5)).flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    train, test = chosen[: 3 * len(chosen) // 4], chosen[3 * len(chosen) // 4 :]
    classes = digits - first
    return TensorDataset(pixels[train], classes[train]), TensorDataset(pixels[test], classes[test])


pretraining, fine_tuning = task(0), task(5)
print(f"images to train on: {len(pretraining[0])} and {len(fine_tuning[0])}")


# %%
# An ordinary ``LightningModule`` with a backbone, a head and SGD. It contains no regularization.
class Classifier(LightningModule):
    """A backbone of four layers and a head."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        layers = [nn.Linear(64, 128), *(nn.Linear(128, 128) for _ in range(3))]
        self.backbone = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.head = nn.Linear(128, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(self.backbone(inputs))
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, classes = batch
        return nn.functional.cross_entropy(self(inputs), classes)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, classes = batch
        self.log("accuracy", (self(inputs).argmax(1) == classes).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class History(Callback):
    """Records accuracy and sparsity after each epoch, for the figure."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.sparsity: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accuracy.append(float(trainer.callback_metrics["accuracy"]))
        self.sparsity.append(float(trainer.callback_metrics["sparsity/model"]))


def train(
    model: Classifier, data: tuple[TensorDataset, TensorDataset], epochs: int, *callbacks: Callback, seed: int = 0
) -> History:
    """Train the model on a task, in place, and return its history."""
    history = History()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, CompressionMonitor(exclude=[r"^head\."]), history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    shuffle = torch.Generator().manual_seed(seed)
    images_to_train_on = DataLoader(data[0], 32, shuffle=True, generator=shuffle)
    trainer.fit(model, images_to_train_on, DataLoader(data[1], 512))
    return history


# %%
# The pretraining
# ---------------
#
# The pretraining has no penalty, like that of a network from elsewhere.

seed_everything(0, verbose=False)
pretrained = Classifier()
history = train(pretrained, pretraining, epochs=15)
print(f"accuracy on the digits 0 to 4: {history.accuracy[-1]:.1%}")


# %%
# Fine-tuning, three ways
# -----------------------
#
# Each fine-tuning starts from the pretrained backbone and a new head, and trains both. The head is small and new, so
# the penalty leaves it out (``exclude``). The penalty stops after 70 % of the training, and
# :class:`~lightning_gcsr.KeepZeros` keeps the zeros while the other weights recover.
#
# *Plain* is the same L1 penalty at the same strength, without a gate. The printed sparsity is that of the backbone.

EPOCHS = 40


def penalty(strength: float, coherent: bool) -> list[Callback]:
    """L1 on the backbone, with the gate or without."""
    return [
        GradientCoherentRegularization(
            "l1",
            strength=strength,
            gate=Gate() if coherent else None,
            schedule=Schedule(stop=0.7),
            exclude=[r"^head\."],
        ),
        KeepZeros(exclude=[r"^head\."]),
    ]


def fine_tune(*callbacks: Callback) -> tuple[Classifier, History]:
    """The pretrained backbone with a new head, trained on the other task."""
    seed_everything(1, verbose=False)
    model = copy.deepcopy(pretrained)
    model.head.reset_parameters()
    return model, train(model, fine_tuning, EPOCHS, *callbacks)


results = {
    "no penalty": fine_tune(),
    "plain": fine_tune(*penalty(0.03, coherent=False)),
    "gradient-coherent": fine_tune(*penalty(0.03, coherent=True)),
}
for name, (model, history) in results.items():
    dense, stored = module_bytes(model)
    reached = f"accuracy {history.accuracy[-1]:.1%}, sparsity {history.sparsity[-1]:.1%}"
    print(f"{name:18} {reached}, {stored:,} of {dense:,} bytes")

# %%
# At this strength, plain L1 sets every weight of the backbone to zero, and the network predicts the same class for
# every image. The callback warns about this; the warning is silenced here. With the gate, the network learns the task,
# and only a few weights are left. The figure shows both over the epochs; the dotted line is where the penalty stops.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, (_, history) in results.items():
    left.plot(range(1, EPOCHS + 1), history.accuracy, label=name)
    right.plot(range(1, EPOCHS + 1), history.sparsity, label=name)
left.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
right.set(xlabel="epoch", ylabel="sparsity", ylim=(-0.02, 1.02))
left.legend()
for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.axvline(0.7 * EPOCHS, color="gray", linewidth=0.8, linestyle=":")

# %%
# How strong?
# -----------
#
# Try a smaller and a larger strength.

for strength in (0.01, 0.1):
    for name, coherent in (("plain", False), ("gradient-coherent", True)):
        _, history = fine_tune(*penalty(strength, coherent))
        reached = f"accuracy {history.accuracy[-1]:.1%}, sparsity {history.sparsity[-1]:.2%}"
        print(f"{name:18} at {strength:<5g} {reached}")

# %%
# :func:`~lightning_gcsr.find_strength` searches for a strength, and with ``target_sparsity=0.95`` you choose the
# sparsity instead; see :doc:`/strength`.
#
# What is left of each layer
# --------------------------

kept = results["gradient-coherent"][0]
for name, parameter in kept.named_parameters():
    if parameter.dim() > 1:
        weights = int(parameter.count_nonzero())
        print(f"{name:18} {weights:6,} of {parameter.numel():6,} weights")

# %%
# The network can now be saved in a small file (:doc:`/compress`). For your own network, take the same steps: load its
# weights, pass the callbacks to the Trainer, and exclude the layers that must stay dense. :doc:`/howto/finetuning`
# covers frozen layers, adaptive optimizers and weight decay.
