"""What is trained, on what data, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from data import check_data, is_text
from networks import TEXT_NETWORKS, check_network

from lightning_gcsr.validation import argument_error, check_choice, check_finite_number, check_integer

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Problem:
    """A network, its data, and an optimizer whose learning rate falls to zero as a cosine.

    ``optimizer`` is ``"sgd"``, with ``momentum``, or ``"adamw"``. ``weight_decay`` is that of the optimizer, and
    ``lr_warmup`` the number of steps over which the learning rate rises first. ``train_images`` is the number of
    training images, of text the number of sequences; ``None`` takes all.
    """

    data: str
    network: str
    epochs: int
    lr: float
    momentum: float = 0.9
    batch_size: int = 128
    train_images: Optional[int] = None
    augment: Optional[str] = None
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    lr_warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            if isinstance(value := getattr(self, name), int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))  # 1 and 1.0 are one run
        check_data(self.data)
        check_network(self.network)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("lr_warmup", self.lr_warmup, 0)
        check_finite_number("lr", self.lr, 0)
        check_finite_number("momentum", self.momentum, 0, 0.999)
        check_finite_number("weight_decay", self.weight_decay, 0)
        check_choice("augment", self.augment, [None, "crop", "crop_flip"])
        if self.train_images is not None:
            check_integer("train_images", self.train_images, 1)
        if is_text(self.data) is not (self.network in TEXT_NETWORKS):
            rule = f"must be one for {'text' if is_text(self.data) else 'images'} with data={self.data!r}"
            raise argument_error("network", self.network, rule, f"Those for text are {sorted(TEXT_NETWORKS)}.")
        if self.augment is not None and is_text(self.data):
            raise argument_error("augment", self.augment, "must be left out for text", "It shifts and mirrors images.")

    @property
    def title(self) -> str:
        """What the report calls it."""
        under = "" if self.optimizer == "sgd" else ", AdamW"
        return f"{self.data.removeprefix('folder:')}, {self.network}{under}"

    @property
    def optimizer_title(self) -> str:
        """The optimizer and its settings, for people."""
        kind = f"SGD with momentum {self.momentum:g}" if self.optimizer == "sgd" else "AdamW"
        return kind + (f", weight decay {self.weight_decay:g}" if self.weight_decay else "")

    def lr_factor(self, step: int, steps: int) -> float:
        """What the learning rate of a step is multiplied by: a linear rise, then a cosine to zero."""
        if step < self.lr_warmup:
            return (step + 1) / self.lr_warmup
        return (1 + math.cos(math.pi * (step - self.lr_warmup) / max(1, steps - self.lr_warmup))) / 2
