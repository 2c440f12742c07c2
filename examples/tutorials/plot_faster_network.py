"""
From training to a faster network
=================================

Scattered zeros in a matrix make its file smaller, but no multiplication faster. Here a penalty on coupled groups makes
whole units zero, which are then removed: the result is an ordinary, smaller network with the same outputs.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gcsr import CoupledGroupLasso, GradientCoherentRegularization, KeepZeros, Schedule, shrink_units

warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.set_num_threads(1)  # the layers are small

# %%
# An ordinary training
# --------------------
#
# A multilayer perceptron on the digits of scikit-learn, wider than it has to be.

images, labels = load_digits(return_X_y=True)
pixels = (torch.from_numpy(images).float() - 5) / 6
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
data = TensorDataset(pixels[order], torch.from_numpy(labels).long()[order])
train_data, test_data = Subset(data, range(1350)), Subset(data, range(1350, 1797))


class Classifier(LightningModule):
    """Three hidden layers of 256 units. Its ``forward`` is what the penalty runs to find the units."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(256, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, classes = batch
        return nn.functional.cross_entropy(self(inputs), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


# %%
# The penalty on units
# --------------------
#
# With :class:`~lightning_gcsr.CoupledGroupLasso` everything that makes one unit is a group: its row of weights and its
# bias become zero together. The outputs of the network are in no group. ``target_sparsity`` is the share of zero units
# at the end. The penalty waits until the network has learned something, and stops after 70 % of the training;
# :class:`~lightning_gcsr.KeepZeros` keeps the zeros while the rest recovers.

seed_everything(0, verbose=False)
model = Classifier()
penalty = CoupledGroupLasso(example_input=train_data[:2][0])
schedule = Schedule(delay=0.3, stop=0.7)
regularization = GradientCoherentRegularization(penalty, target_sparsity=0.75, schedule=schedule)
trainer = Trainer(
    accelerator="cpu",
    max_epochs=20,
    callbacks=[regularization, KeepZeros()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(train_data, 64, shuffle=True))

# %%
# Remove the units
# ----------------
#
# :func:`~lightning_gcsr.shrink_units` takes the network and an example input, and returns a copy without the units
# that do nothing.

network = model.net.eval()
inputs, classes = test_data[:]
smaller, report = shrink_units(network, inputs)
for layer, units in report.units.items():
    print(f"layer {layer}: {units.before} units, now {units.after}")

# %%
# The outputs are the same to rounding, and so is the accuracy.

with torch.no_grad():
    difference = float((network(inputs) - smaller(inputs)).abs().max())
    for name, net in (("trained", network), ("without its zero units", smaller)):
        accuracy = float((net(inputs).argmax(1) == classes).float().mean())
        parameters = sum(parameter.numel() for parameter in net.parameters())
        print(f"{name}: accuracy {accuracy:.1%}, {parameters:,} parameters")
print(f"largest difference of an output: {difference:.1e}")
assert difference < 1e-3


# %%
# How much faster?
# ----------------
#
# The networks run in turn, so that other load on the machine affects both. Your machine will print other numbers.
def milliseconds(*networks: nn.Module, repeats: int = 50) -> list[float]:
    """The median time of a batch of all test images."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(repeats):
        for net, measured in zip(networks, times, strict=True):
            start = time.perf_counter()
            net(inputs)
            measured.append(1_000 * (time.perf_counter() - start))
    return [statistics.median(measured) for measured in times]


with torch.inference_mode():
    before, after = milliseconds(network, smaller)
print(f"{before:.2f} ms before, {after:.2f} ms after: {before / after:.1f} times as fast")

# %%
# :doc:`/howto/structured` covers residual networks, convolutions and attention, and :doc:`/howto/handover` the export
# to ONNX and other runtimes.
