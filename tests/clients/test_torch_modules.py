"""Modules of torch and torchmetrics that work in a way of their own: the target is met in the weights that compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_gcsr import Sparsity

from .training import TARGET, Client, sparsity, train


class Recurrent(nn.Module):
    """A recurrent layer over the inputs, cut into four steps of four numbers."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(4, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layer(inputs.unflatten(1, (4, 4)))[0][:, -1])


class Attention(nn.Module):
    """Self-attention over the same four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(4, 16), nn.Linear(64, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        steps = self.embedding(inputs.unflatten(1, (4, 4)))
        return self.head(self.attention(steps, steps, steps, need_weights=False)[0].flatten(1))


class Checkpointed(nn.Module):
    """A perceptron whose first part is computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Linear(32, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, inputs, use_reentrant=False))


def perceptron() -> nn.Sequential:
    """A perceptron from 16 numbers to one."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "multi-head attention": Attention,
    "gradient checkpointing": Checkpointed,
    "torch.compile": lambda: torch.compile(perceptron(), backend="eager"),
}


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam with a learning rate that suits all of them."""
    return torch.optim.AdamW(parameters, lr=5e-3)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_target_is_met_in_modules_that_work_in_a_way_of_their_own(network: str) -> None:
    torch.manual_seed(0)
    model = Client(adam, NETWORKS[network]())
    callback = train(model)
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)
    assert float(Sparsity()(model)) == pytest.approx(sparsity(callback), abs=1e-6)
    assert not any("_orig_mod" in name for name in callback.regularizer.parameters)


def test_zeros_under_spectral_norm_are_in_the_weight_that_computes() -> None:
    torch.manual_seed(0)
    net = perceptron()
    spectral_norm(net[0])
    callback = train(Client(adam, net))
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)
    weights = [net[0].weight.detach(), net[2].weight.detach()]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(sparsity(callback), abs=1e-6)


def test_the_directions_of_weight_norm_are_refused_and_its_norms_make_rows_of_zeros() -> None:
    """A row of zeros has no direction: the loss would be NaN once a row has become zero."""
    torch.manual_seed(0)
    net = perceptron()
    weight_norm(net[0])
    with pytest.raises(ValueError, match=r"'net.0.parametrizations.weight.original1' holds the directions .* exclude="):
        train(Client(adam, net))
    callback = train(Client(adam, net), include=["original0"], target_sparsity=0.5)
    assert sparsity(callback) == 0.5
    assert int((net[0].weight == 0).all(1).sum()) == 16


class Measured(Client):
    """Keeps many metrics of torchmetrics, with states and weights that are not to be trained."""

    def __init__(self) -> None:
        super().__init__(adam)
        metrics = {"mae": torchmetrics.MeanAbsoluteError(), "r2": torchmetrics.R2Score()}
        self.metrics = torchmetrics.MetricCollection(metrics, prefix="train/")
        self.best = torchmetrics.MinMetric()
        self.sparsity = Sparsity()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        predicted = self.net(batch[0])
        loss = nn.functional.mse_loss(predicted, batch[1])
        self.metrics.update(predicted, batch[1])
        self.log_dict(self.metrics, on_step=False, on_epoch=True)
        self.best.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("sparsity", self.sparsity(self.net))


def test_metrics_within_the_module_are_neither_regularized_nor_in_the_way() -> None:
    model = Measured()
    callback = train(model)
    assert set(callback.regularizer.parameters) == {"net.0.weight", "net.2.weight"}
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)
    assert float(model.trainer.callback_metrics["sparsity"]) == pytest.approx(sparsity(callback), abs=1e-6)
    assert {"train/mae", "train/r2"} <= model.trainer.callback_metrics.keys()
