"""A step never asks the device for a number: on a GPU that would make the host wait for all that is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_gcsr import CoherentRegularizer, GradientCoherentRegularization

DECISIONS: list[dict[str, Any]] = [
    {"coherence": coherence, "scope": scope}
    for coherence in ("direction", "agreement", "temporal")
    for scope in ("model", "parameter", "element")
] + [{"coherence": None}]
DECISIONS += [
    {"coherence": coherence, "scope": scope, "averaging": 0.9}
    for coherence in ("direction", "agreement")
    for scope in ("model", "parameter", "element")
]
DECISIONS += [{"averaging": 0.9, "tolerance": 0.5, "warmup_steps": 5}]


class NoHostNumbers(TorchDispatchMode):
    """Raises where a tensor becomes a Python number, as ``item``, ``float``, ``bool`` and ``tolist`` make it."""

    def __enter__(self) -> Any:
        # On a CPU `tolist` reads the memory without going through torch's dispatcher.
        self.no_list = mock.patch.object(Tensor, "tolist", side_effect=AssertionError("tolist asks the device"))
        self.no_list.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        self.no_list.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
            raise AssertionError(f"{func} asks the device for a number")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ask", [Tensor.item, float, bool, lambda t: t.tolist(), lambda t: torch.equal(t, t)])
def test_the_watch_notices(ask: Any) -> None:
    number = torch.ones(())
    with NoHostNumbers(), pytest.raises(AssertionError, match="asks the device"):
        ask(number)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("decision", DECISIONS, ids=str)
def test_a_step_asks_for_no_number(decision: dict[str, Any], penalty: Any, update: Any) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1), momentum=0.9, foreach=False)
    regularizer = CoherentRegularizer(net, penalty, strength=0.1, update=update, **decision)
    scale = torch.tensor(1024.0)
    for _ in range(3):
        for wanted in (False, True):
            optimizer.zero_grad()
            (net(torch.randn(6, 5)).square().mean() * scale).backward()
            with NoHostNumbers():
                report = regularizer.before_step(optimizer, loss_scale=scale, report=wanted)
                regularizer.after_step(optimizer)
    assert report is not None
    assert 0 <= float(report.injected) <= 1


class Watched(GradientCoherentRegularization):
    """Asks the device for no number around a step, whatever else it does."""

    steps = 0

    def _before_step(self, *arguments: Any) -> None:
        self.steps += 1
        with NoHostNumbers():
            super()._before_step(*arguments)

    def _after_step(self, *arguments: Any) -> None:
        with NoHostNumbers():
            super()._after_step(*arguments)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_callback_asks_for_no_number_around_a_step_however_often_it_logs(
    every: int, precision: Any, tmp_path: Path
) -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = Watched("l1", strength=0.1)
    trainer = Trainer(
        max_epochs=2,
        callbacks=[callback],
        precision=precision,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=every,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Model(), DataLoader(torch.randn(24, 5), batch_size=4))
    assert callback.steps == 12
    assert "gcsr/injected" in trainer.callback_metrics
