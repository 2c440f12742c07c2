"""What each of four processes does with sharded weights; a module of its own, so that new processes can import it."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from integration.models import MemoryLogger, make_trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcsr import (
    CoherentRegularizer,
    CompressionMonitor,
    Gate,
    GradientCoherentRegularization,
    GroupLasso,
    KeepZeros,
    Schedule,
    Sparsity,
    count_tensors,
    module_bytes,
)
from lightning_gcsr.callbacks.reporting.figures import magnitudes
from lightning_gcsr.core.step_plans import KEPT

from .workers import SaveAfterAnEpoch

WORLD = 4
STEPS = 6
BATCH = 8
STRENGTH = 0.05

MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "FSDP2": ((4,), ("data",)),
    "tensor parallel": ((4,), ("tensor",)),
    "FSDP2 × tensor parallel": ((2, 2), ("data", "tensor")),
}

NOW = Schedule(warmup=0)
DECISIONS: dict[str, dict[str, Any]] = {
    "direction, model": {"gate": Gate("direction", "model", threshold=0.55)},
    "direction, parameter": {"gate": Gate("direction", "parameter", threshold=0.6)},
    "agreement, element": {"gate": Gate(tolerance=0.0, averaging=0.0)},
    "averaged, element": {"gate": Gate(averaging=0.9, tolerance=0.5), "schedule": Schedule(warmup=3)},
    "averaged, model": {"gate": Gate("direction", "model", threshold=0.4, averaging=0.7)},
    "temporal, model": {"gate": Gate("temporal", "model", threshold=0.05)},
    "temporal, element": {"gate": Gate("temporal", "element")},
    "no measure": {"gate": None},
    "fan-in, by name": {
        "strength": {r"^0": 0.02, ".": 0.05},
        "strength_scale": "fan_in",
        "gate": Gate("agreement", "model"),
    },
}
RUNS = {
    f"{name}, {update}": decision | {"update": update}
    for name, decision in DECISIONS.items()
    for update in ("gradient", "proximal", "dual_averaging")
}
RUNS["averaged, element, proximal, AdamW"] = RUNS["averaged, element, proximal"] | {"adamw": True}
RUNS["averaged, element, dual_averaging, AdamW"] = RUNS["averaged, element, dual_averaging"] | {"adamw": True}


def network() -> nn.Sequential:
    """A network whose layers divide by four, but for the last one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def shard(net: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """Cut the first two layers over the tensor dimension of the mesh, and what there is over its data dimension."""
    names = mesh.mesh_dim_names or ()
    if "tensor" in names:
        parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if "data" in names:
        for layer in (net[0], net[2], net[4]):
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
    return net


def data() -> TensorDataset:
    """A regression on which the gate opens and shuts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 8, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1], x[:, 2].abs()], dim=1))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loop(net: nn.Sequential, part: int, parts: int, **kwargs: Any) -> dict[str, Any]:
    """A hand-written loop over this process's part of each batch; what can be compared with one process."""
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False)
    if kwargs.pop("adamw", False):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, foreach=False)
    regularizer = CoherentRegularizer(net, **{"strength": STRENGTH, "schedule": NOW} | kwargs)
    found: dict[str, Any] = {key: [] for key in ("coherence", "injected", "grad_norm", "penalty_grad_norm", "sent")}
    found["by parameter"] = []
    x, y = data().tensors
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH).chunk(parts)[part]
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[rows]), y[rows]).backward()
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            report = regularizer.before_step(optimizer)
        found["sent"].append(sent.call_count)
        optimizer.step()
        regularizer.after_step(optimizer)
        for key in ("coherence", "injected", "grad_norm", "penalty_grad_norm"):
            found[key].append(float(getattr(report, key)))
        found["by parameter"].append(report.injected_by_parameter.tolist())
    found["weights"] = {name: whole(parameter.detach()) for name, parameter in net.named_parameters()}
    found["penalty"] = float(regularizer.penalty_value())
    found["norms"] = regularizer.weight_norms()
    found["spans"] = regularizer.spans()
    counts = count_tensors(dict(net.named_parameters()))
    found["counts"] = [(count.name, count.shape, count.zeros, count.bytes.best) for count in counts]
    found["bytes"] = module_bytes(net)
    sparsity = Sparsity(sync_on_compute=False)
    sparsity.update(net)
    found["sparsity"] = float(sparsity.compute())
    return found


def loops(rank: int, path: Path) -> dict[str, Any]:
    """Every run on every mesh."""
    found = {}
    for mesh_name, (shape, names) in MESHES.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        part, parts = (mesh["data"].get_local_rank(), mesh["data"].size()) if "data" in names else (0, 1)
        for name, kwargs in RUNS.items():
            found[mesh_name, name] = loop(shard(network(), mesh), part, parts, **kwargs)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    found["FSDP2", "group lasso"] = loop(
        shard(network(), mesh), rank, WORLD, penalty="group_lasso", gate=Gate(scope="parameter")
    )
    return found


def replicated_parameter_with_sharded_input(rank: int, path: Path) -> dict[str, Any]:
    """The gradient is a sum of summands on the processes; the penalty must not be added to each of them."""
    mesh = init_device_mesh("cpu", (4,))
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    x = torch.arange(24, dtype=torch.float64).view(8, 3) / 24
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, foreach=False)
    (distribute_tensor(x, mesh, [Shard(0)]) @ module.weight.t()).square().sum().backward()
    partial = module.weight.grad.placements[0].is_partial()
    regularizer = CoherentRegularizer(module, strength=0.5, gate=Gate("direction", "model"), update="gradient")
    report = regularizer.before_step(optimizer)
    return {
        "was partial": partial,
        "gradient": whole(module.weight.grad),
        "grad_norm": float(report.grad_norm),
    }


def refusals(rank: int, path: Path) -> dict[str, Any]:
    """Groups that are cut apart."""
    found = {}
    for name, penalty in {"inputs": GroupLasso(dim=1), "outputs": GroupLasso(dim=0)}.items():
        net = shard(network(), init_device_mesh("cpu", (4,), mesh_dim_names=("tensor",)))
        try:
            CoherentRegularizer(net, penalty, strength=0.1)
        except ValueError as error:
            found[name] = str(error)
    return found


def nonfinite(rank: int, path: Path) -> dict[str, Any]:
    """A gradient that is not finite on one process only."""
    found = {}
    for scope in ("model", "element"):
        net = shard(network(), init_device_mesh("cpu", (4,), mesh_dim_names=("data",)))
        x, y = data().tensors
        nn.functional.mse_loss(net(x[:BATCH]), y[:BATCH]).backward()
        before = [whole(parameter.grad).clone() for parameter in net.parameters()]
        if rank == 2:
            net[0].weight.grad.to_local()[0, 0] = torch.nan
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
        regularizer = CoherentRegularizer(net, strength=0.5, gate=Gate(scope=scope), schedule=NOW, update="gradient")
        regularizer.before_step(optimizer)
        # Without the row in which the NaN stands: it is on process 2, which holds the rows 8 to 11 of 16.
        changes = [whole(p.grad) - b for p, b in zip(net.parameters(), before, strict=True)]
        found[scope] = {
            "elsewhere in the tensor": bool(changes[0][:8].any()),
            "in the part": bool(torch.nan_to_num(changes[0][8:12]).any()),
            "in other tensors": bool(changes[2].any()),
            "nonfinite_steps": int(regularizer.nonfinite_steps),
        }
    return found


class ShardedRegression(LightningModule):
    """The same network in a module that Lightning shards; `mesh` in place of the strategy's for one process."""

    def __init__(self, manual: bool = False, adamw: bool = False) -> None:
        super().__init__()
        self.adamw = adamw
        self.net = network()
        self.automatic_optimization = not manual

    def configure_model(self) -> None:
        if self.device_mesh is None or hasattr(self, "sharded"):
            return
        self.sharded = True
        tensor, parallel = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        if tensor.size() > 1:
            parallelize_module(self.net, tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if parallel.size() > 1:
            fully_shard(self.net, mesh=parallel)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adamw:
            return torch.optim.AdamW(self.parameters(), lr=0.02, foreach=False)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, foreach=False)


def trained(
    path: Path,
    strategy: Any,
    part: int,
    parts: int,
    accumulate: int = 1,
    manual: bool = False,
    keep_zeros: bool = False,
    **kwargs: Any,
) -> Any:
    """Train through Lightning, two epochs, and return what can be compared.

    In Lightning's default precision, which leaves the float64 of network and data as it is; ModelParallelStrategy has
    no "64-true".
    """
    rows = [torch.arange(BATCH).chunk(parts)[part] + step * BATCH for step in range(STEPS)]
    loader = DataLoader(TensorDataset(*(t[torch.cat(rows)] for t in data().tensors)), batch_size=BATCH // parts)
    logger, callback = MemoryLogger(), GradientCoherentRegularization(**{"strength": STRENGTH} | kwargs)
    model = ShardedRegression(manual)
    trainer = make_trainer(
        path,
        [callback, CompressionMonitor(), *([KeepZeros()] if keep_zeros else [])],
        logger=logger,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        **strategy,
    )
    trainer.fit(model, loader)
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    keys = ("gcsr/", "sparsity/", "compression/")
    log = {key: logger.values(key) for key in logger.logged if key.startswith(keys)}
    return {"weights": weights, "log": log, "steps": callback.regularizer.state_dict()["steps"]}


LIGHTNING_MESHES = {"FSDP2": (4, 1), "tensor parallel": (1, 4), "FSDP2 × tensor parallel": (2, 2)}
TARGET: dict[str, Any] = {"strength": None, "target_sparsity": 0.5, "gate": Gate(averaging=0.5)}
LIGHTNING_RUNS = {
    "direction, model, gradient": RUNS["direction, model, gradient"],
    "agreement, element, proximal": RUNS["agreement, element, proximal"],
    "accumulated": RUNS["direction, model, proximal"] | {"accumulate": 3},
    "by hand": RUNS["direction, model, gradient"] | {"manual": True},
    "default": {},
    "averaged, zeros kept": RUNS["averaged, element, proximal"]
    | {"schedule": Schedule(warmup=3, stop=0.5), "keep_zeros": True},
    "dual averaging": RUNS["averaged, element, dual_averaging"] | {"strength": 0.005},
    "target": TARGET,
    "target, no measure, fan-in": TARGET | {"gate": None, "strength_scale": "fan_in"},
}


MESH_OF = dict(zip(LIGHTNING_RUNS, itertools.cycle(LIGHTNING_MESHES), strict=False))
"""The mesh of each run through Lightning; plain loops go over all meshes with all decisions."""


def through_lightning(rank: int, path: Path) -> dict[str, Any]:
    """Every run through Lightning's ModelParallelStrategy, on one mesh."""
    found = {}
    for name, kwargs in LIGHTNING_RUNS.items():
        parallel, tensor = LIGHTNING_MESHES[MESH_OF[name]]
        strategy = ModelParallelStrategy(parallel, tensor, process_group_backend="gloo")
        part = rank // tensor  # the mesh is row by row
        found[name] = trained(path, {"strategy": strategy, "devices": WORLD}, part, parallel, **kwargs)
    return found


FSDP, BOTH = ({"data_parallel_size": n, "tensor_parallel_size": WORLD // n} for n in (WORLD, 2))
RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any], list[Callback]]] = {
    "averages": (DECISIONS["averaged, element"] | {"update": "proximal"}, BOTH, []),
    "latent weights": (DECISIONS["averaged, element"] | {"strength": 0.005}, FSDP, []),
    "in one file": (TARGET, BOTH | {"save_distributed_checkpoint": False}, []),
    "zeros kept": ({"strength": 0.005, "gate": None, "schedule": Schedule(stop=0.4)}, FSDP, [KeepZeros()]),
}
"""Arguments, strategy and other callbacks of runs that are resumed."""


def rows_of(part: int, parts: int) -> DataLoader[Any]:
    """This part of each batch."""
    rows = torch.arange(STEPS * BATCH).view(STEPS, parts, -1)[:, part].flatten()
    return DataLoader(TensorDataset(*(tensor[rows] for tensor in data().tensors)), batch_size=BATCH // parts)


def fitted(
    path: Path,
    name: str,
    mesh: dict[str, Any],
    saves_to: Path | None = None,
    ckpt_path: Path | None = None,
) -> dict[str, Any]:
    """Two epochs under AdamW on the processes; with an empty mesh on this process alone."""
    kwargs: dict[str, Any] = {}
    part, parts = 0, 1
    if mesh:
        strategy = ModelParallelStrategy(**mesh, process_group_backend="gloo")
        kwargs = {"strategy": strategy, "devices": WORLD, "use_distributed_sampler": False}
        part, parts = dist.get_rank() // mesh["tensor_parallel_size"], mesh["data_parallel_size"]
    arguments, _, others = RESUMED[name]
    model, callback = (
        ShardedRegression(adamw=True),
        GradientCoherentRegularization(**{"strength": STRENGTH} | arguments),
    )
    callbacks = [callback, *copy.deepcopy(others), *([SaveAfterAnEpoch(saves_to)] if saves_to else [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(path, callbacks, max_epochs=2, **kwargs).fit(model, rows_of(part, parts), ckpt_path=ckpt_path)
    weights = {key: whole(parameter.detach()) for key, parameter in model.named_parameters()}
    return {
        "weights": weights,
        "kept": {
            f"{what} of {name}": value
            for what, values in callback.regularizer.state_dict().items()
            if what in KEPT
            for name, value in values.items()
        },
        "anew": [str(warning.message) for warning in caught if "begin anew" in str(warning.message)],
    }


def resumed(rank: int, path: Path) -> dict[str, Any]:
    """Sharded runs that were saved after an epoch, and others that go on from there in a Trainer of their own.

    Lightning hands the state of a sharded checkpoint to the callbacks only after `on_fit_start`.
    """
    found: dict[str, Any] = {}
    for name, (_, mesh, _) in RESUMED.items():
        file = path / name
        found[name, "uninterrupted"] = fitted(path, name, mesh, file)
        found[name, "resumed"] = fitted(path, name, mesh, ckpt_path=file)
    found["averages", "sharded otherwise"] = fitted(path, "averages", FSDP, ckpt_path=path / "averages")
    found["in one file", "sharded otherwise"] = fitted(path, "in one file", FSDP, ckpt_path=path / "in one file")
    forget(path / "in one file", path / "forgotten", rank)
    found["in one file", "forgotten"] = fitted(path, "in one file", FSDP, ckpt_path=path / "forgotten")
    return found


def forget(file: Path, target: Path, rank: int) -> None:
    """Copy a checkpoint without what is known of sharded weights, as checkpoints were before it was saved."""
    if rank == 0:
        checkpoint = torch.load(file, weights_only=True)
        for state in checkpoint["callbacks"].values():
            for key in ("averages", "latent_weights", "thresholds", "counts", "mean_squares"):
                state.pop(key, None)
        torch.save(checkpoint, target)
    dist.barrier()


def shown(rank: int, path: Path) -> dict[str, Any]:
    """What the monitor prints, keeps and counts of weights that are sharded, on each mesh."""
    found = {}
    for name, (parallel, tensor) in LIGHTNING_MESHES.items():
        strategy = ModelParallelStrategy(parallel, tensor, process_group_backend="gloo")
        found[name] = shown_by(path, {"strategy": strategy, "devices": WORLD}, rank // tensor, parallel)
    return found


def shown_by(path: Path, strategy: dict[str, Any], part: int, parts: int) -> dict[str, Any]:
    """The same of one training."""
    rows = [torch.arange(BATCH).chunk(parts)[part] + step * BATCH for step in range(STEPS)]
    loader = DataLoader(TensorDataset(*(t[torch.cat(rows)] for t in data().tensors)), batch_size=BATCH // parts)
    monitor, model = CompressionMonitor(images_every_n_steps=STEPS), ShardedRegression()
    callbacks = [GradientCoherentRegularization(strength=STRENGTH, **DECISIONS["agreement, element"]), monitor]
    logger = TensorBoardLogger(path, name="tensorboard")
    trainer = make_trainer(path, callbacks, logger=logger, use_distributed_sampler=False, **strategy)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        trainer.fit(model, loader)
    tables = {key: state["table"] for key, state in monitor.state_dict().items()}
    counts = magnitudes({key: weight for key, weight in model.named_parameters() if weight.dim() > 1})
    return {"output": output.getvalue(), "tables": tables, "counts": counts, "summary": monitor.summary.rows()}


WORK = (loops, replicated_parameter_with_sharded_input, refusals, nonfinite, through_lightning, resumed, shown)
