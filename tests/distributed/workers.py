"""What each process does; a module of its own, because a new process must be able to import it."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from integration.models import (
    ManualRegression,
    MemoryLogger,
    Regression,
    make_trainer,
    mlp,
    momentum,
    samples,
    weights_of,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_gcsr import (
    CompressedCheckpoint,
    CompressionMonitor,
    CompressionRatio,
    CoupledGroupLasso,
    Gate,
    GradientCoherentRegularization,
    KeepZeros,
    Schedule,
    Sparsity,
    load_compressed,
)

WORLD = 2
BATCH = 4
"""Samples of a process in a batch; one process alone gets WORLD·BATCH."""
SAMPLES = 48
EPOCHS = 2

NOW = Schedule(warmup=0)
DECISIONS: dict[str, dict[str, Any]] = {
    "direction, model": {"gate": Gate("direction", "model", threshold=0.9), "schedule": NOW},
    "agreement, element": {"gate": Gate(tolerance=0.0, averaging=0.0), "schedule": NOW},
    "default": {"gate": Gate()},
    "temporal, parameter": {"gate": Gate("temporal", "parameter", threshold=0.5), "schedule": NOW},
    "no measure": {"gate": None},
}

EXAMPLE = torch.zeros(1, 4, dtype=torch.float64)
TARGET: dict[str, Any] = {"strength": None, "target_sparsity": 0.5, "gate": Gate(averaging=0.5)}

RUNS: dict[str, dict[str, Any]] = {
    **{
        f"{name}, {update}": {"callback": decision | {"update": update}}
        for name, decision in DECISIONS.items()
        for update in ("gradient", "proximal", "dual_averaging")
    },
    "accumulated, gradient": {"callback": DECISIONS["direction, model"] | {"update": "gradient"}, "accumulate": 3},
    "accumulated, proximal": {"callback": DECISIONS["agreement, element"] | {"update": "proximal"}, "accumulate": 3},
    "by hand": {"callback": DECISIONS["direction, model"] | {"update": "gradient"}, "manual": True},
    "averaged, zeros kept": {
        "callback": {
            "gate": Gate(averaging=0.9, tolerance=0.5),
            "schedule": Schedule(warmup=0.25, stop=0.5),
            "update": "proximal",
        },
        "keep_zeros": True,
    },
    "target": {"callback": TARGET},
    "target, coupled groups": {
        "callback": TARGET | {"penalty": CoupledGroupLasso(example_input=EXAMPLE, block_size=2)}
    },
    "target, accumulated": {"callback": TARGET | {"gate": None}, "accumulate": 2},
    "target, by hand, zeros kept": {
        "callback": TARGET | {"schedule": Schedule(stop=0.75)},
        "manual": True,
        "keep_zeros": True,
    },
    # Until the second backward the gradients of a static graph are reduced only before the step.
    "by hand, static graph": {
        "callback": DECISIONS["direction, model"] | {"update": "gradient"},
        "manual": True,
        "static_graph": True,
    },
}


def batches_of(rank: int, world: int) -> DataLoader[Any]:
    """Each batch of one process, split over the processes: different data for each, the same sum."""
    together = torch.arange(SAMPLES).view(-1, WORLD, BATCH)
    mine = together[:, rank] if world == WORLD else together
    dataset = Subset(samples(SAMPLES, dtype=torch.float64), mine.flatten().tolist())
    return DataLoader(dataset, batch_size=mine[0].numel())


def train(path: Path, run: dict[str, Any], rank: int = 0, world: int = 1, **kwargs: Any) -> dict[str, Any]:
    """Train as one of the processes, or alone, and return what can be compared."""
    model_class = ManualRegression if run.get("manual") else Regression
    model = model_class(net=mlp().double(), make_optimizer=momentum)
    callback = GradientCoherentRegularization(**{"strength": 0.05} | run["callback"])
    keep_zeros = [KeepZeros()] if run.get("keep_zeros") else []
    logger = MemoryLogger()
    strategy = {}
    if world > 1:
        strategy = {
            "strategy": DDPStrategy(process_group_backend="gloo", static_graph=run.get("static_graph", False)),
            "devices": world,
            "use_distributed_sampler": False,
        }
    trainer = make_trainer(
        path,
        [callback, *keep_zeros],
        precision="64-true",
        max_epochs=EPOCHS,
        logger=logger,
        accumulate_grad_batches=run.get("accumulate", 1),
        **strategy,
        **kwargs,
    )
    trainer.fit(model, batches_of(rank, world))
    assert callback.regularizer is not None
    return {
        "weights": weights_of(model),
        "log": {key: logger.values(key) for key in logger.logged if key.startswith("gcsr/")},
        "steps": callback.regularizer.state_dict()["steps"],
        "zeros": {name: zeros for kept in keep_zeros for name, zeros in kept.state_dict()["zeros"].items()},
    }


def all_runs(rank: int, path: Path) -> dict[str, Any]:
    """Every run under DDP."""
    return {name: train(path, run, rank, WORLD) for name, run in RUNS.items()}


TENSORS: dict[str, list[list[Tensor]]] = {
    "unequal counts": [
        [torch.tensor([[0.0, 1.0, 0.0, 3.0]]), torch.zeros(2, 3)],
        [torch.tensor([0.0, 0.05, 0.5, 0.7, 0.9])],
    ],
    "nothing on one process": [[], [torch.tensor([0.0, 1.0])]],
    "all zero": [[torch.zeros(3)], [torch.zeros(2)]],
    "nothing anywhere": [[], []],
}
"""By process."""


def metrics(rank: int, path: Path) -> dict[str, Any]:
    """What each process computes from its tensors, twice to see that a synchronization leaves no trace."""
    found = {}
    for name, tensors in TENSORS.items():
        for threshold in (0.0, 0.1):
            sparsity, ratio = Sparsity(threshold), CompressionRatio(threshold)
            for metric in (sparsity, ratio):
                if tensors[rank]:
                    metric.update(tensors[rank])
                found[name, threshold, type(metric).__name__] = float(_compute(metric))
                metric._computed = None
                assert float(_compute(metric)) == found[name, threshold, type(metric).__name__]
    return found


def _compute(metric: Any) -> Tensor:
    metric._update_count = max(1, metric._update_count)  # torchmetrics warns of a metric without an update
    return metric.compute()


def logging(rank: int, path: Path) -> dict[str, Any]:
    """One CSV file for all; the numbers for callbacks that monitor are there in each process."""
    logger = CSVLogger(path, name="csv", version=0)
    model = Regression(net=mlp().double(), make_optimizer=momentum)
    trainer = make_trainer(
        path,
        [GradientCoherentRegularization(strength=0.5, update="proximal"), CompressionMonitor(histograms=True)],
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=WORLD,
        use_distributed_sampler=False,
        precision="64-true",
        max_epochs=EPOCHS,
        logger=logger,
        log_every_n_steps=2,
    )
    trainer.fit(model, batches_of(rank, WORLD))
    ours = ("gcsr/", "sparsity/", "compression/")
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(ours)}


def shown(rank: int, path: Path) -> dict[str, Any]:
    """What the monitor prints in each process and keeps for its images, with one TensorBoard logger for all."""
    logger = TensorBoardLogger(path, name="tensorboard", version=0)
    model = Regression(net=mlp().double(), make_optimizer=momentum)
    monitor = CompressionMonitor(images_every_n_steps=6)
    trainer = make_trainer(
        path,
        [monitor, GradientCoherentRegularization(strength=0.5, update="proximal")],
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=WORLD,
        use_distributed_sampler=False,
        precision="64-true",
        max_epochs=EPOCHS,
        logger=logger,
    )
    with contextlib.redirect_stdout(io.StringIO()) as output:
        trainer.fit(model, batches_of(rank, WORLD))
    state = monitor.state_dict()
    return {
        "output": output.getvalue(),
        "summary": monitor.summary.rows(),
        "tables": {k: v["table"] for k, v in state.items()},
    }


class SaveAfterAnEpoch(Callback):
    """Saves a checkpoint of the first epoch, in a training that is as long as the one that goes on from it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


RESUMED: dict[str, dict[str, Any]] = {
    "delay": {"strength": 0.05, "gate": None, "schedule": Schedule(delay=8)},
    "target": TARGET,
}


def resumed(rank: int, path: Path) -> dict[str, Any]:
    """The weights of runs that are saved after an epoch and go on from there in another Trainer."""

    def trainer(callbacks: list[Callback]) -> Trainer:
        return make_trainer(
            path,
            callbacks,
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=WORLD,
            use_distributed_sampler=False,
            precision="64-true",
            max_epochs=EPOCHS,
        )

    found = {}
    for name, arguments in RESUMED.items():
        checkpoint = path / f"{name}.ckpt"
        first = trainer([GradientCoherentRegularization(**arguments), SaveAfterAnEpoch(checkpoint)])
        first.fit(Regression(net=mlp().double(), make_optimizer=momentum), batches_of(rank, WORLD))
        model = Regression(net=mlp().double(), make_optimizer=momentum)
        second = GradientCoherentRegularization(**arguments)
        trainer([second]).fit(model, batches_of(rank, WORLD), ckpt_path=checkpoint)
        assert second.regularizer is not None
        found[name] = {"weights": weights_of(model), "steps": second.regularizer.state_dict()["steps"]}
    return found


def compressed(rank: int, path: Path) -> dict[str, Any]:
    """What each process finds in the file, right after ``fit``, beside a best checkpoint and without one."""
    found: dict[str, Any] = {}
    for name, callbacks in {"best": [ModelCheckpoint(path / "best")], "last": []}.items():
        model, callback = Regression(net=mlp().double(), make_optimizer=momentum), CompressedCheckpoint()
        trainer = make_trainer(
            path / name,
            [callback, *callbacks],
            enable_checkpointing=bool(callbacks),
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=WORLD,
            use_distributed_sampler=False,
            precision="64-true",
        )
        trainer.fit(model, batches_of(rank, WORLD))
        assert callback.path is not None
        found[name] = {"path": callback.path, "loaded": load_compressed(callback.path), "weights": weights_of(model)}
    return found


WORK = (all_runs, metrics, logging, shown, resumed, compressed)


Work = Callable[[int, Path], dict[str, Any]]


def _process(rank: int, path: Path, port: int, world: int, works: tuple[Work, ...]) -> None:
    torch.set_num_threads(1)
    # With a LOCAL_RANK in its environment Lightning starts no processes of its own.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        found = {}
        for work in works:
            folder = path / work.__name__
            folder.mkdir(exist_ok=True)
            found[work.__name__] = work(rank, folder)
        torch.save(found, path / f"{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def in_processes(path: Path, world: int, works: tuple[Work, ...]) -> list[dict[str, Any]]:
    """Do all the work in so many processes and return what each found, by the name of the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(path, port, world, works), nprocs=world)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(world)]
