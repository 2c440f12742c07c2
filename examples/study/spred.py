"""spred: L1 as weight decay on two factors of each weight."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from optimizers import base_optimizer
from problems import Problem
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_gcsr.core.parameter_selection import select_parameters


class Product(nn.Module):
    """w = u·v, element by element, from u = w/√s and v = √s, with s the root mean square of the weights.

    Factors of equal magnitude would stay so, and their product could then never change its sign.
    """

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return u * v

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a weight at the start."""
        root = weight.square().mean().sqrt().sqrt().clamp_min(1e-6)
        return weight / root, root.expand_as(weight).clone()


class Factors(Callback):
    """Trains the weights as products, and multiplies them out at the end.

    Ziyin and Wang, *spred: Solving L1 penalty with SGD*, ICML 2023 (arXiv:2210.01212). The decay (λ/2)·(u² + v²) has
    its least value λ·|w| over all factors of w. Products come as near to zero as one likes and are never zero, so
    products below ``cut`` are set to zero at the end, as part of the method.

    Args:
        module: The network, of which the weights that a penalty may reach become products.
        cut: The magnitude below which a product is zero.
    """

    def __init__(self, module: nn.Module, cut: float) -> None:
        self.module, self.cut = module, cut

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        chosen = {id(parameter) for parameter in select_parameters(self.module).values()}
        owners = [owner for owner in self.module.modules() if id(getattr(owner, "weight", None)) in chosen]
        for owner in owners:
            parametrize.register_parametrization(owner, "weight", Product())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for owner in list(self.module.modules()):
            if parametrize.is_parametrized(owner, "weight"):
                parametrize.remove_parametrizations(owner, "weight")
                weight: Any = owner.weight
                with torch.no_grad():
                    weight.mul_(weight.abs() >= self.cut)


def spred_optimizer(module: nn.Module, problem: Problem, strength: float) -> torch.optim.Optimizer:
    """SGD or AdamW, with a weight decay of λ on the factors."""
    factors = [p for name, p in module.named_parameters() if ".parametrizations." in f".{name}"]
    others = [p for name, p in module.named_parameters() if ".parametrizations." not in f".{name}"]
    groups = [{"params": factors, "weight_decay": problem.weight_decay + strength}, {"params": others}]
    return base_optimizer(groups, problem)
