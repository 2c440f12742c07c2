"""Coupled groups against torch-pruning's GroupNormPruner, at about 40 to 70 % fewer operations.

ResNet-20 and a small vision transformer are trained on CIFAR-10 for the same number of epochs by each method. Units are
removed one by one, or in blocks. A network of the shape that coupled groups leave is also trained from the start. Each
run adds a row to a CSV file; a run whose row is there is not repeated, so the script can be stopped and started again.
At the end it prints all rows as a table. The images are expected as an image folder,
``DATA_ROOT/cifar10/train/CLASS/*`` and ``DATA_ROOT/cifar10/test/CLASS/*``.
"""

from __future__ import annotations

import copy
import csv
import itertools
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jsonargparse import auto_cli
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from lightning_gcsr import (
    Clock,
    CoherentRegularizer,
    CoupledGroupLasso,
    Schedule,
    coupled_groups,
    shrink_units,
    speed_report,
)

sys.path.append(str(Path(__file__).parent / "study"))  # whose data and networks these are
from batches import Batches, Dataset
from images import load_images
from networks import make_network

GROUPS = {
    ("resnet_20", 1): {30: 0.35, 50: 0.55, 60: 0.66, 70: 0.76},
    ("resnet_20", 8): {30: 0.3, 40: 0.4, 50: 0.52},
    ("vision_transformer", 1): {30: 0.45, 50: 0.75, 60: 0.9},
    ("vision_transformer", 8): {30: 0.45, 50: 0.75},
    ("wide_vision_transformer", 8): {30: 0.5, 45: 0.68},
}
"""For a network and a size of blocks, the fraction of zero groups that saves about so many per cent of operations."""
TRANSFORMERS = {
    "vision_transformer": {"hidden_dim": 64, "num_heads": 4, "mlp_dim": 256},
    "wide_vision_transformer": {"hidden_dim": 128, "num_heads": 2, "mlp_dim": 512},
}
KEPT = {
    "resnet_20": [r"^features\.0\.", r"\.conv2\.", r"\.downsample\."],
    **{name: [r"^conv_proj\.", r"\.mlp\.3\.", r"\.self_attention\."] for name in TRANSFORMERS},
}
"""The layers whose units no method removes: those whose outputs are added up, and heads. Hidden units are left."""


@dataclass(frozen=True)
class Plan:
    """What tells a training from the others; the first columns of the CSV file."""

    network: str
    method: str
    level: int
    """By about how many per cent the operations are to be fewer."""
    block_size: int
    """How many units are removed together."""
    fine_tuning: float
    """The part of the epochs in which the smaller network is trained, without a penalty."""
    delay: float
    """The part of those before in which coupled groups wait until the network has learned something."""
    seed: int
    epochs: int
    images: int


COLUMNS = [field.name for field in fields(Plan)]
COLUMNS += ["accuracy", "mflop", "mflop_dense", "parameters"]
COLUMNS += ["ms", "ms_low", "ms_high", "ms_dense", "ms_dense_low", "ms_dense_high", "seconds"]


def network_for(name: str) -> nn.Module:
    """A fresh network: that of the study, or torchvision's vision transformer, which has ``nn.MultiheadAttention``."""
    if name in TRANSFORMERS:
        transformer: nn.Module = VisionTransformer(
            image_size=32, patch_size=4, num_layers=4, num_classes=10, **TRANSFORMERS[name]
        )
        return transformer
    return make_network(name, (3, 32, 32), 10)


class Training:
    """A training with a learning rate that falls to zero, in which the network may be exchanged."""

    def __init__(self, plan: Plan, network: nn.Module, data: Dataset) -> None:
        self.plan, self.network, self.data = plan, network, data
        self.batches = Batches(data.train, 128, plan.seed, "crop_flip")
        self.step = 0
        self.steps = plan.epochs * len(self.batches)
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """Begin a new optimizer, for the network as it is now."""
        parameters = self.network.parameters()
        self.optimizer: torch.optim.Optimizer
        if self.plan.network in TRANSFORMERS:
            self.optimizer, self.lr = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), 1e-3
        else:
            self.optimizer, self.lr = torch.optim.SGD(parameters, lr=0.05, momentum=0.9), 0.05

    @property
    def fine_tuning(self) -> int:
        """The number of epochs that are left to the smaller network."""
        return max(1, round(self.plan.fine_tuning * self.plan.epochs))

    @property
    def before_fine_tuning(self) -> int:
        """The number of epochs before these."""
        return self.plan.epochs - self.fine_tuning

    @property
    def progress(self) -> float:
        """How far the training is, from 0 to 1."""
        return self.step / self.steps

    def run_epoch(self, before: Callable[[], Any], after: Callable[[], Any]) -> None:
        """Train for an epoch, with something before and after each step of the optimizer."""
        self.network.train()
        for images, labels in self.batches:
            rate = self.lr * min(1.0, 20 * self.progress + 0.01) * (1 - self.progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            nn.functional.cross_entropy(self.network(images), labels).backward()
            before()
            self.optimizer.step()
            after()
            self.optimizer.zero_grad()
            self.step += 1


def nothing() -> None:
    """Do nothing."""


def fine_tuned(training: Training) -> nn.Module:
    """Train the smaller network for the epochs that are left."""
    training.renew_optimizer()
    for _ in range(training.fine_tuning):
        training.run_epoch(nothing, nothing)
    return training.network


def train_coupled_groups(training: Training, example: Tensor) -> None:
    """Train with coupled groups until fine-tuning begins."""
    network, plan = training.network, training.plan
    regularizer = CoherentRegularizer(
        network,
        CoupledGroupLasso(coupled_groups(network, example), block_size=plan.block_size),
        target_sparsity=GROUPS[plan.network, plan.block_size][plan.level],
        exclude=KEPT[plan.network],
        schedule=Schedule(delay=plan.delay),
    )

    def before() -> None:
        clock = Clock(training.step, training.progress * plan.epochs / training.before_fine_tuning)
        regularizer.before_step(training.optimizer, clock=clock, report=False)

    for _ in range(training.before_fine_tuning):
        training.run_epoch(before, lambda: regularizer.after_step(training.optimizer))


def by_coupled_groups(training: Training, example: Tensor, wanted: float) -> nn.Module:
    """Train with coupled groups, remove the zero ones, and train what is left."""
    train_coupled_groups(training, example)
    training.network = shrink_units(training.network.eval(), example)[0]
    return fine_tuned(training)


def small_from_the_start(training: Training, example: Tensor, wanted: float) -> nn.Module:
    """Find the shape that coupled groups leave, and train a fresh network of this shape for all of the epochs."""
    train_coupled_groups(training, example)
    torch.manual_seed(training.plan.seed)
    fresh = network_for(training.plan.network)
    with torch.no_grad():
        for new, trained in zip(fresh.parameters(), training.network.parameters(), strict=True):
            new[trained == 0] = 0.0
    smaller = shrink_units(fresh.eval(), example)[0]
    return dense(Training(training.plan, smaller, training.data), example, wanted)


def by_torch_pruning(training: Training, example: Tensor, wanted: float) -> nn.Module:
    """Train with the penalty of GroupNormPruner, prune to the operations that are wanted, and train what is left."""
    import torch_pruning

    network = training.network

    def pruner_for(module: nn.Module, ratio: float) -> Any:
        attention = {part: part.num_heads for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
        last = [part for name, part in module.named_modules() if name in ("head", "heads.head")]
        kept = KEPT[training.plan.network]
        untouched = [part for name, part in module.named_modules() if any(re.search(one, f"{name}.") for one in kept)]
        return torch_pruning.pruner.GroupNormPruner(
            module,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            reg=5e-4,
            pruning_ratio=ratio,
            global_pruning=True,
            ignored_layers=last + untouched,
            num_heads=attention,
            round_to=training.plan.block_size,
        )

    pruner = pruner_for(network, 0.5)
    for _ in range(training.before_fine_tuning):
        pruner.update_regularizer()
        training.run_epoch(lambda: pruner.regularize(network), nothing)
    low, high = 0.0, 0.99
    network.zero_grad(set_to_none=True)
    network.eval()
    for _ in range(7):
        ratio = (low + high) / 2
        training.network = copy.deepcopy(network)
        pruner_for(training.network, ratio).step()
        low, high = (ratio, high) if flops(training.network, example) > wanted else (low, ratio)
    return fine_tuned(training)


def dense(training: Training, example: Tensor, wanted: float) -> nn.Module:
    """Train without a penalty."""
    for _ in range(training.plan.epochs):
        training.run_epoch(nothing, nothing)
    return training.network


MethodName = Literal["dense", "coupled_groups", "small_from_the_start", "torch_pruning"]
METHODS: dict[str, Callable[[Training, Tensor, float], nn.Module]] = {
    "dense": dense,
    "coupled_groups": by_coupled_groups,
    "small_from_the_start": small_from_the_start,
    "torch_pruning": by_torch_pruning,
}


@torch.no_grad()
def flops(network: nn.Module, example: Tensor) -> int:
    """The floating-point operations for an input; the kernel of whole attention layers, which hides them, is off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        network(example)
    torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


@torch.no_grad()
def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The share of these images that the network puts into their class."""
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in Batches(data, 500))
    return right / len(data[1])


def run(plan: Plan, data: Dataset, wanted: float | None) -> dict[str, Any]:
    """One training, and what came out."""
    torch.manual_seed(plan.seed)
    example = data.test[0][:32]
    start = time.perf_counter()
    training = Training(plan, network_for(plan.network), data)
    wanted = wanted or (1 - plan.level / 100) * flops(training.network, example[:1])
    smaller = METHODS[plan.method](training, example[:1], wanted).eval()
    seconds = time.perf_counter() - start
    whole = network_for(plan.network)
    report = speed_report(whole, example, smaller, repeats=40, runtimes=False)
    row = asdict(plan) | {"accuracy": accuracy(smaller, data.test)}
    row |= {"mflop": flops(smaller, example[:1]) / 1e6, "mflop_dense": flops(whole, example[:1]) / 1e6}
    row["parameters"] = sum(parameter.numel() for parameter in smaller.parameters())
    for key, cost in (("ms", report.smaller), ("ms_dense", report.dense)):
        times = cost.milliseconds
        row |= {key: times.median, f"{key}_low": times.low, f"{key}_high": times.high}
    return row | {"seconds": seconds}


TITLES = {"dense": "no penalty", "coupled_groups": "coupled groups", "torch_pruning": "torch-pruning"}
TITLES["small_from_the_start"] = "this shape from the start"
TITLES |= {"resnet_20": "ResNet-20", "vision_transformer": "vision transformer"}
TITLES["wide_vision_transformer"] = "wide vision transformer"


def table(out: Path) -> str:
    """The rows of the CSV file in Markdown, means over the seeds; epochs and seeds only where they differ."""
    rows = pd.read_csv(out)
    rows["fewer"] = 100 * (1 - rows["mflop"] / rows["mflop_dense"])
    rows["fast"] = rows["ms_dense"] / rows["ms"]
    rows["seeds"] = 1
    columns = ["accuracy", "fewer", "parameters", "ms_dense", "ms", "fast"]
    keys = ["network", "epochs", "block_size", "fine_tuning", "level", "method"]
    means = rows.groupby(keys).agg({**dict.fromkeys(columns, "mean"), "seeds": "count"}).reset_index()
    lines = []
    for row in means.to_dict("records"):
        line = {"network": TITLES[row["network"]], "epochs": row["epochs"], "method": TITLES[row["method"]]}
        line |= {"test accuracy": f"{100 * row['accuracy']:.1f} %", "parameters": f"{row['parameters']:,.0f}"}
        smaller = row["method"] != "dense"
        line["block size"] = row["block_size"] if smaller else ""
        tuned = smaller and row["method"] != "small_from_the_start"
        line["fine-tuning"] = f"{100 * row['fine_tuning']:.0f} %" if tuned else ""
        line["fewer operations"] = f"{row['fewer']:.0f} %" if smaller else ""
        line["ms, dense"] = f"{row['ms_dense']:.0f}" if smaller else ""
        line["ms, smaller"] = f"{row['ms']:.0f}" if smaller else ""
        line["speed-up"] = f"{row['fast']:.2f}×" if smaller else ""
        lines.append(line | {"seeds": row["seeds"]})
    frame = pd.DataFrame(lines)
    alike = [column for column in ("epochs", "seeds") if frame[column].nunique() == 1]
    return str(frame.drop(columns=alike).to_markdown(index=False))


def main(
    out: Path,
    data_root: Path = Path("data"),
    networks: tuple[str, ...] = ("vision_transformer", "resnet_20"),
    methods: tuple[MethodName, ...] = ("dense", "coupled_groups", "small_from_the_start", "torch_pruning"),
    levels: tuple[int, ...] = (40, 50, 60, 70),
    seeds: tuple[NonNegativeInt, ...] = (0,),
    epochs: dict[str, PositiveInt] = {"vision_transformer": 6, "resnet_20": 4},  # noqa: B006  # not changed
    train_images: PositiveInt = 10_000,
    block_size: Literal[1, 8] = 8,
    fine_tuning: ClosedUnitInterval = 0.5,
    delay: ClosedUnitInterval = 0.5,
) -> None:
    """Train every network by every method, and measure it with one thread.

    Args:
        out: The CSV file that gets a row for each run.
        data_root: The folder that holds the image folder ``cifar10``.
        networks: Names of networks.
        methods: Names of methods.
        levels: By how many per cent the operations are to be fewer, where the network allows it.
        seeds: Seeds of the weights and of the order of the images.
        epochs: Passes over the images, for each network.
        train_images: How many images to train on.
        block_size: How many units are removed together, by both methods.
        fine_tuning: The part of the epochs in which the smaller network is trained, without a penalty.
        delay: The part of those before in which coupled groups wait until the network has learned something.
    """
    torch.set_num_threads(1)
    data = load_images("folder:cifar10", data_root, data_root, train_images)
    known = _read(out)
    smaller = [method for method in METHODS if method != "dense"]
    wanted = [("dense", 0), *((method, level) for level in levels for method in smaller)]
    for seed, (method, level), name in itertools.product(seeds, wanted, networks):
        together, at_end, waiting = (block_size, fine_tuning, delay) if level else (1, 0.0, 0.0)
        plan = Plan(name, method, level, together, at_end, waiting, seed, epochs[name], train_images)
        if method not in methods or level not in {0, *GROUPS[name, block_size]} or plan in known:
            continue
        # torch-pruning prunes to what coupled groups have come to, so that accuracies can be compared.
        row = run(plan, data, known.get(replace(plan, method="coupled_groups")))
        known[plan] = 1e6 * row["mflop"]
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()})
        print(row, flush=True)
    print(table(out))


def _read(out: Path) -> dict[Plan, float]:
    """The operations of the networks whose rows are in the file."""
    if not out.exists():
        return {}
    names = [field.name for field in fields(Plan)]
    return {Plan(*(row[name] for name in names)): 1e6 * row["mflop"] for row in pd.read_csv(out).to_dict("records")}


if __name__ == "__main__":
    auto_cli(main)
