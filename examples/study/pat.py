"""PAT: pruning-aware training of torchao, as two methods of the study.

The optimizer trains dense latent weights, and the network computes with their proximal map. It is a prototype of
torchao, described beside its source: https://github.com/pytorch/ao/tree/main/torchao/prototype/pat.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import torch
from optimizers import base_optimizer, grouped_parameters
from problems import Problem
from torch import nn

PAT_METHODS = ("pat_top_k", "pat_lasso")


def has_torchao() -> bool:
    """Whether torchao is installed, in a version that has what is needed."""
    try:  # without importing it, which takes seconds
        major, minor = importlib.metadata.version("torchao").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (0, 18)


def pat_lasso(
    module: nn.Module, problem: Problem, strength: float, healing_start: int | None = None
) -> torch.optim.Optimizer:
    """PAT's ``ProxLasso``: soft thresholding of each latent weight by strength × the sum of the learning rates so far.

    Args:
        module: The network.
        problem: The optimizer of the latent weights.
        strength: PAT's λ, which meets the optimizer's own step: it is that of the loss under SGD without momentum.
        healing_start: The step from which on zeros stay zero and nothing is shrunk; ``None`` for never.
    """
    settings = {"prox_type": "ProxLasso", "group_type": "ElemGrouper", "reg_lambda": strength}
    return _prune_optimizer(module, problem, settings, healing_start or sys.maxsize)


def pat_top_k(module: nn.Module, problem: Problem, sparsity: float, healing_start: int) -> torch.optim.Optimizer:
    """PAT's ``GlobalMinSparsityConstraint`` on single weights: the smallest latent weights of the network are zero.

    Their share rises to ``sparsity`` along a cubic until ``healing_start``; from this step on the zeros stay.
    """
    settings = {
        "prox_type": "GlobalMinSparsityConstraint",
        "group_type": "KElementGrouper",
        "k": 1,
        "min_sparsity": sparsity,
        "min_sparsity_schedule": True,
    }
    return _prune_optimizer(module, problem, settings, healing_start)


def _prune_optimizer(
    module: nn.Module, problem: Problem, settings: dict[str, Any], healing_start: int
) -> torch.optim.Optimizer:
    from torchao.prototype.pat.optim import PruneOptimizer

    class ClosureFirst(PruneOptimizer):  # type: ignore[misc]
        """PAT's optimizer for Lightning, which takes the gradients in a closure: at the pruned weights, as PAT does."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            super().step()
            return loss

    optimizer = base_optimizer(grouped_parameters(module, **settings), problem)
    wrapped: torch.optim.Optimizer = ClosureFirst(optimizer, healing_start_step=healing_start)
    return wrapped
