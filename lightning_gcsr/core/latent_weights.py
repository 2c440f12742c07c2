"""Dual averaging: the optimizer trains dense latent weights z, and the network computes with w = prox(z, T).

The threshold T of a weight grows by the size of the proximal step, lr·λ·κ, in the steps in which its gate is open. So z
keeps what the loss wants of a weight, and a weight at zero can come back by what it has gathered over many steps.
Dual averaging with one threshold for all weights is due to Xiao (2010), for networks to arXiv:1807.04222 and to PAT in
torchao; that the threshold grows only through an open gate is new here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gcsr.core.chunks import Chunk
from lightning_gcsr.core.numerics import wide
from lightning_gcsr.core.penalties import Penalty

__all__ = ["follow_replaced_weights", "open_share", "shrink_latent_weights", "use_latent_weights"]


def use_latent_weights(chunk: Chunk, starts: bool) -> None:
    """Put the latent weights into the parameters, for the optimizer to train.

    Args:
        chunk: The weights.
        starts: Whether latent weights are made where there are none yet, equal to the weights.
    """
    if "latent" in chunk.kept:
        chunk.put_kept_weight("latent")
    elif starts:
        chunk.keep("threshold", chunk.real_dtype)
        chunk.keep("latent", chunk.members[0].parameter.dtype).copy_(chunk.whole_weight())


def shrink_latent_weights(
    chunk: Chunk, penalty: Penalty, step: float | Tensor, gate: Tensor | None, skipped: bool, of_zeros: bool = False
) -> None:
    """Z ← the optimizer's weights, T ← T + step·gate, and the weights become prox(z, T).

    Args:
        chunk: The weights.
        penalty: The penalty.
        step: lr·λ·κ, one for all weights or one for each; 0 where the penalty does not act. With a negative step
            thresholds fall, as far as 0.
        gate: 1 where a weight is open and 0 where it is not; ``None`` where all are alike.
        skipped: Whether the optimizer did not step: then latent weights and thresholds stay as they are.
        of_zeros: Whether the step is made by the thresholds of zeros alone, and the gate has no part in it.
    """
    if "latent" not in chunk.kept:
        return
    weight, latent, threshold = chunk.weight(), *(chunk.of_rows(chunk.kept[what]) for what in ("latent", "threshold"))
    if skipped:
        weight.copy_(latent)
    else:
        if of_zeros:  # before the latent weights are new: a weight is zero where it was for the network
            gate = penalty.whole_units(penalty.prox(wide(latent), threshold) == 0).to(threshold.dtype)
        latent.copy_(weight)
        if gate is None:
            threshold.add_(step)
        elif isinstance(step, Tensor):
            threshold.addcmul_(open_share(gate, penalty, threshold.dtype), step.to(threshold.dtype))
        else:
            threshold.add_(open_share(gate, penalty, threshold.dtype), alpha=step)
        if of_zeros:
            threshold.clamp_(min=0)
        chunk.put_rows(chunk.kept["latent"], latent)
        chunk.put_rows(chunk.kept["threshold"], threshold)
    chunk.put_weight(penalty.shrink_(weight, threshold))


def open_share(gate: Tensor, penalty: Penalty, dtype: torch.dtype) -> Tensor:
    """The share of a step by which the threshold of each weight grows: its gate, or the mean gate of its group."""
    return gate if penalty.elementwise else penalty.group_mean(gate.to(dtype))


def follow_replaced_weights(chunk: Chunk, penalty: Penalty) -> None:
    """Let the latent weights follow where somebody replaced the weights since the last step.

    z ← w + T·r(w), wherever w is not prox(z, T) any more: the z of which w is the proximal map. Replaced weights are
    noticed by their version, which an assignment to ``parameter.data`` does not change.
    """
    if "latent" not in chunk.kept or chunk.versions == chunk.weight_versions():
        return
    latent, threshold = chunk.of_rows(chunk.kept["latent"]), chunk.of_rows(chunk.kept["threshold"])
    latent.copy_(penalty.unshrunk(chunk.weight(), threshold, latent))
    chunk.put_rows(chunk.kept["latent"], latent)
