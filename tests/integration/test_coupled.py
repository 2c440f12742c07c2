"""A callback finds coupled groups by itself, makes whole ones zero, and what is left of the network is smaller."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gcsr import (
    CoherentRegularizer,
    CoupledGroupLasso,
    GradientCoherentRegularization,
    KeepZeros,
    Schedule,
    carry_optimizer_state,
    coupled_groups,
    shrink_units,
)

from .models import MemoryLogger, fit, make_trainer


class Residual(LightningModule):
    """A small residual network with batch norm and a class for the brighter half of an image."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer_count = optimizers
        self.automatic_optimization = optimizers == 1
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.head = nn.Linear(8, 2)
        self.example_input_array: Any = torch.zeros(1, 1, 6, 6)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem_norm(self.stem(images)).relu()
        logits: Tensor = self.head((hidden + self.body(hidden)).relu().mean((2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        images = batch[0]
        labels = (images[:, :, :3].mean((1, 2, 3)) > images[:, :, 3:].mean((1, 2, 3))).long()
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        if self.optimizer_count == 1:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.stem, self.body)]


def images() -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    dataset = torch.utils.data.TensorDataset(torch.randn(96, 1, 6, 6, generator=generator))
    return torch.utils.data.DataLoader(dataset, batch_size=16)


@pytest.mark.parametrize("example", ["tensor", "by name", "argument"])
def test_the_target_is_met_in_groups_and_zeros_are_kept_in_biases_and_norms(
    tmp_path: Path, example: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    model, penalty = Residual(), CoupledGroupLasso()
    if example == "by name":
        model.example_input_array = {"images": torch.zeros(1, 1, 6, 6)}
    elif example == "argument":
        model.example_input_array, penalty = None, CoupledGroupLasso(example_input=torch.zeros(1, 1, 6, 6))
    callback = GradientCoherentRegularization(penalty, target_sparsity=0.5, schedule=Schedule(stop=0.7))
    logger = MemoryLogger()
    fit(tmp_path, model, [KeepZeros(), callback], images(), max_epochs=40, logger=logger)
    assert logger.values("gcsr/zero_groups")[-1] == 0.5
    said = [record.getMessage() for record in caplog.records]
    assert any("on 24 groups, in tensors of " in line for line in said)
    assert any(
        re.search("KeepZeros: .* weights are zero and stay so, as do .* biases and entries of norms", s) for s in said
    )
    assert "gcsr: 12 of 24 groups are zero at the end." in said
    assert callback.regularizer is not None
    zeros = callback.regularizer.zero_groups()
    assert int(zeros["stem.weight"][:, 0, 0, 0].sum() + zeros["body.0.weight"][:, 0, 0, 0].sum()) == 12  # of 8 + 16
    for name, parameter in callback.regularizer.parameters.items():
        assert not parameter[zeros[name]].any()
    assert not zeros["body.3.bias"].all()
    model.eval()
    batch = images().dataset[:8][0]
    smaller, report = shrink_units(model, batch)
    assert report.units["stem"].after + report.units["body.0"].after == 12
    assert report.flops.after < 0.7 * report.flops.before
    assert torch.allclose(smaller(batch), model(batch), atol=1e-5)


def test_the_zero_groups_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], CoherentRegularizer.zero_groups
    monkeypatch.setattr(CoherentRegularizer, "zero_groups", lambda self: calls.append(self) or original(self))
    callback = GradientCoherentRegularization(CoupledGroupLasso(), strength=1e-3, schedule=Schedule(stop=2, warmup=0))
    fit(tmp_path, Residual(), [callback, KeepZeros()], images(), max_steps=6)
    assert calls == [callback.regularizer]


def test_a_pickled_callback_that_keeps_zeros_does_not_hold_the_module(tmp_path: Path) -> None:
    callback = GradientCoherentRegularization(CoupledGroupLasso(), strength=1e-3, schedule=Schedule(stop=2, warmup=0))
    keeping = KeepZeros()
    fit(tmp_path, Residual(), [callback, keeping], images(), max_steps=6)
    assert b"Residual" not in pickle.dumps(keeping)


@pytest.mark.parametrize("block_size", [1, 16])
def test_a_target_that_was_missed_is_said_in_groups(tmp_path: Path, block_size: int) -> None:
    callback = GradientCoherentRegularization(CoupledGroupLasso(block_size=block_size), target_sparsity=0.5)
    with pytest.warns(UserWarning, match=r"gcsr: \d+\.\d % of the groups are zero .* for 50 %\. Train for longer"):
        fit(tmp_path, Residual(), [callback], images(), max_steps=3)


def test_a_target_between_two_numbers_of_blocks_is_met_by_one_of_them(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    penalty = CoupledGroupLasso(block_size=8)
    callback = GradientCoherentRegularization(penalty, target_sparsity=0.3, include=[r"^body\.0\."])
    fit(tmp_path, Residual(), [callback], images(), max_epochs=40)
    assert "gcsr: 8 of 16 groups are zero at the end." in [record.getMessage() for record in caplog.records]
    assert not [str(each.message) for each in recwarn if "target_sparsity" in str(each.message)]


class Untraceable(Residual):
    """A network whose body fails on the example."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if self.training else images[:, :, :, :0])


def test_what_a_callback_cannot_find_groups_in_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def refused(model: LightningModule, match: str, penalty: CoupledGroupLasso | None = None) -> None:
        callback = GradientCoherentRegularization(penalty or CoupledGroupLasso(), strength=0.1)
        with pytest.raises(MisconfigurationException, match=match):
            fit(tmp_path, model, callback, images())
        assert model.global_step == 0

    model = Residual()
    model.example_input_array = None
    refused(model, r"needs an example input .* Set `example_input_array` .* or write CoupledGroupLasso\(example_input")
    refused(Untraceable(), r"cannot follow the module\. .*'stem' raises.*Pass the groups of a part of the module")
    flat = Residual()
    for parameter in [*flat.stem.parameters(), *flat.stem_norm.parameters(), *flat.body.parameters()]:
        parameter.requires_grad_(False)
    refused(flat, r"found no unit that can be removed; `shrink_units` says why\. .* frozen are 'stem\.weight', ")
    refused(Residual(optimizers=2), r"needs one optimizer that steps all of its weights, and 2 do")


def test_the_groups_of_a_part_can_be_given(tmp_path: Path) -> None:
    model = Residual()
    groups = coupled_groups(model.body, torch.zeros(1, 8, 6, 6), prefix="body.")
    callback = GradientCoherentRegularization(CoupledGroupLasso(groups), strength=0.001)
    trainer = make_trainer(tmp_path, [callback], max_epochs=1)
    trainer.fit(model, images())
    assert callback.regularizer is not None
    assert list(callback.regularizer.parameters) == ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]


def test_a_second_fit_goes_on_in_the_smaller_network_with_the_momentum_of_the_first(tmp_path: Path) -> None:
    class Carries(Callback):
        def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
            carry_optimizer_state(first.optimizers[0], trainer.optimizers[0], model, pl_module, report)
            carried.append(trainer.optimizers[0].state[pl_module.head.weight]["momentum_buffer"].clone())

    carried: list[Tensor] = []
    model = Residual()
    first = make_trainer(tmp_path, [], max_epochs=1)
    first.fit(model, images())
    with torch.no_grad():
        for layer in (model.stem, model.stem_norm, model.body[3]):
            layer.weight[2], layer.bias[2] = 0.0, 0.0
    smaller, report = shrink_units(model, model.example_input_array)
    trainer = make_trainer(tmp_path, [Carries()], max_epochs=1)
    trainer.fit(smaller, images())
    before = first.optimizers[0].state[model.head.weight]["momentum_buffer"]
    assert torch.equal(carried[0], before[:, [0, 1, 3, 4, 5, 6, 7]])
    assert trainer.optimizers[0].state[smaller.head.weight]["momentum_buffer"].shape == (2, 7)
