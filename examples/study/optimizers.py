"""The optimizers of the study: SGD and AdamW, and the methods that change what their steps do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import Problem
from pytorch_optimizer.base.optimizer import BaseOptimizer
from torch import nn

from lightning_gcsr.core.parameter_selection import select_parameters


def base_optimizer(groups: Any, problem: Problem) -> torch.optim.Optimizer:
    """SGD or AdamW, as the problem says."""
    if problem.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=problem.lr, momentum=problem.momentum, weight_decay=problem.weight_decay)
    return torch.optim.AdamW(groups, lr=problem.lr, weight_decay=problem.weight_decay)


def grouped_parameters(module: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Two groups: the weights that a penalty may reach, with these settings, and the others."""
    chosen = list(select_parameters(module).values())
    numbers = {id(parameter) for parameter in chosen}
    others = [parameter for parameter in module.parameters() if id(parameter) not in numbers]
    return [{"params": chosen, **settings}, {"params": others}]


def cautious_sgd(module: nn.Module, problem: Problem, strength: float) -> torch.optim.Optimizer:
    """SGD with cautious weight decay of this strength, which is that of an L2 penalty in the loss."""
    decay = strength / (1 - problem.momentum)  # as the proximal update: momentum amplifies a steady gradient
    groups = grouped_parameters(module, cautious_decay=decay)
    return CautiousSGD(groups, lr=problem.lr, momentum=problem.momentum, weight_decay=problem.weight_decay)


class CautiousSGD(torch.optim.SGD):
    """SGD with cautious weight decay (arXiv:2510.12402): only where the step moves the weight towards zero, too.

    The rule is that of the package pytorch-optimizer, which has it for one optimizer of its own. Here it follows the
    step, on the weights as the step left them.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            if decay := group.get("cautious_decay"):
                for parameter in group["params"]:
                    update = self.state[parameter].get("momentum_buffer", parameter.grad)
                    if update is not None:
                        BaseOptimizer.apply_cautious_weight_decay(parameter, update, group["lr"], decay)
        return loss


def linearized_bregman(
    module: nn.Module, problem: Problem, strength: float, initial_density: float
) -> torch.optim.Optimizer:
    """LinBreg under SGD, AdaBreg under AdamW, from a sparse start.

    Bungert, Roith, Tenbrinck and Burger, *A Bregman learning framework for sparse neural networks*, JMLR 2022
    (arXiv:2105.04319), algorithms 1 to 3. As there, training starts with few weights, which are scaled up so that
    signals keep their variance, and others come in as the loss asks for them.

    Args:
        module: The network, whose weights are thinned out here.
        problem: Learning rate, momentum and weight decay.
        strength: λ of the L1 norm, at which a weight enters.
        initial_density: The share of the weights that are not zero at the start.
    """
    with torch.no_grad():
        for weight in select_parameters(module).values():
            kept = torch.rand(weight.shape, device=weight.device) < initial_density
            weight.mul_(kept).div_(initial_density**0.5)
    groups = grouped_parameters(module, bregman=strength)
    if problem.optimizer == "sgd":
        return LinBreg(groups, lr=problem.lr, momentum=problem.momentum, weight_decay=problem.weight_decay)
    return AdaBreg(groups, lr=problem.lr, weight_decay=problem.weight_decay)


class _BregmanStep:
    """v ← the optimizer's step on v, with the gradient at w; w ← δ·soft(v, λ), with δ = 1.

    v starts at w + λ·sign(w), an element of the subdifferential of ‖w‖²/2δ + λ‖w‖₁, so that the first w is unchanged.
    """

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # the gradient is taken at w
            with torch.enable_grad():
                loss = closure()
        duals = self.__dict__.setdefault("_duals", {})
        groups = [group for group in self.param_groups if group.get("bregman") is not None]
        for group in groups:
            for weight in group["params"]:
                dual = duals.setdefault(id(weight), weight + group["bregman"] * weight.sign())
                weight.copy_(dual)
        super().step()  # type: ignore[misc]
        for group in groups:
            for weight in group["params"]:
                duals[id(weight)].copy_(weight)
                weight.copy_(nn.functional.softshrink(weight, group["bregman"]))
        return loss


class LinBreg(_BregmanStep, torch.optim.SGD):
    """Linearized Bregman iterations, with momentum."""


class AdaBreg(_BregmanStep, torch.optim.AdamW):
    """Linearized Bregman iterations whose dual variable takes Adam's steps."""
