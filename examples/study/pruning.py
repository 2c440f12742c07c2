"""Gradual magnitude pruning by Lightning's own callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from lightning_gcsr.core.parameter_selection import select_parameters

PRUNED_AFTER = 0.7
"""The share of the training after which gradual pruning has reached its sparsity and only trains on."""


def gradual_pruning(module: nn.Module, sparsity: float, epochs: int, prunings: int | None) -> GradualPruning:
    """Lightning's callback on the weights that a penalty may reach, on the cubic schedule of arXiv:1710.01878.

    Args:
        module: The network.
        sparsity: The sparsity at the end.
        epochs: The length of the training.
        prunings: In how many steps to prune; ``None`` for one at the end of each epoch, as the callback does.
    """
    selected = {id(parameter) for parameter in select_parameters(module).values()}
    wanted = [(owner, "weight") for owner in module.modules() if id(getattr(owner, "weight", None)) in selected]
    times = prunings or max(1, int(PRUNED_AFTER * epochs))
    return GradualPruning(wanted, sparsity, times, at_epoch_ends=prunings is None)


class GradualPruning(ModelPruning):
    """Lightning's pruning of the smallest weights of the whole network, on the usual cubic schedule.

    Args:
        parameters: Modules, and the names of their parameters.
        sparsity: The sparsity at the end.
        times: After how many prunings that is reached.
        at_epoch_ends: Whether to prune at the end of each epoch; else at even distances over the first part of the
            training.
    """

    def __init__(
        self, parameters: list[tuple[nn.Module, str]], sparsity: float, times: int, at_epoch_ends: bool
    ) -> None:
        super().__init__(
            "l1_unstructured",
            parameters_to_prune=parameters,
            amount=lambda epoch: self.next_amount(epoch),
            apply_pruning=at_epoch_ends,
            use_global_unstructured=True,
            use_lottery_ticket_hypothesis=False,  # Lightning's default sets the weights back to their start
        )
        self.final_sparsity, self.times, self.at_epoch_ends = sparsity, times, at_epoch_ends

    def next_amount(self, pruned: int) -> float:
        """After so many prunings, the share to prune of what is left, since torch counts from there."""
        before, after = (
            self.final_sparsity * (1 - (1 - min(count / self.times, 1.0)) ** 3) for count in (pruned, pruned + 1)
        )
        return (after - before) / (1 - before)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.at_epoch_ends:
            return
        steps = int(PRUNED_AFTER * trainer.estimated_stepping_batches)
        done, due = ((step * self.times) // steps for step in (trainer.global_step - 1, trainer.global_step))
        for pruned in range(done, min(due, self.times)):
            self.apply_pruning(self.next_amount(pruned))
