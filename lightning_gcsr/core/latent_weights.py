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

__all__ = ["follow_replaced_weights", "shrink_latent_weights", "use_latent_weights"]


def use_latent_weights(chunk: Chunk, starts: bool) -> None:
    """Put the latent weights into the parameters, for the optimizer to train.

    Args:
        chunk: The weights.
        starts: Whether latent weights are made where there are none yet, equal to the weights.
    """
    if "latent" in chunk.kept:
        chunk.write_weights([wide(latent) for latent in chunk.of_rows(chunk.kept["latent"])])
    elif starts:
        chunk.keep("threshold", wide_real=True)
        _copy(chunk, chunk.keep("latent"), chunk.whole_weights())


def shrink_latent_weights(chunk: Chunk, penalty: Penalty, growth: list[float] | list[Tensor], skipped: bool) -> None:
    """Z ← the optimizer's weights, T ← T + growth, and the weights become prox(z, T).

    Args:
        chunk: The weights.
        penalty: The penalty.
        growth: What the thresholds grow by, one entry for each entry of the chunk; empty for nothing.
        skipped: Whether the optimizer did not step: then latent weights and thresholds stay as they are.
    """
    if "latent" not in chunk.kept:
        return
    latents, thresholds = chunk.of_rows(chunk.kept["latent"]), chunk.of_rows(chunk.kept["threshold"])
    if not skipped:
        _copy(chunk, latents, chunk.weight_views())
        if growth:
            torch._foreach_add_(thresholds, growth)  # type: ignore[arg-type]
        chunk.put_rows(chunk.kept["latent"], latents)
        chunk.put_rows(chunk.kept["threshold"], thresholds)
    chunk.write_weights(penalty.images([wide(latent) for latent in latents], thresholds))
    chunk.versions = chunk.weight_versions()


def follow_replaced_weights(chunk: Chunk, penalty: Penalty) -> None:
    """Let the latent weights follow where somebody replaced the weights since the last step.

    z ← w + T·r(w), wherever w is not prox(z, T) any more: the z of which w is the proximal map. Replaced weights are
    noticed by their version, which an assignment to ``parameter.data`` does not change.
    """
    if "latent" not in chunk.kept or chunk.versions == chunk.weight_versions():
        return
    weights = chunk.read(chunk.weight_views(), "weight")
    latents, thresholds = chunk.of_rows(chunk.kept["latent"]), chunk.of_rows(chunk.kept["threshold"])
    images = penalty.images([wide(latent) for latent in latents], thresholds)
    for latent, threshold, weight, image in zip(latents, thresholds, weights, images, strict=True):
        follows = weight + threshold * penalty.gradient(weight)
        latent.copy_(torch.where(image.to(latent.dtype) == weight.to(latent.dtype), latent, follows.to(latent.dtype)))
    chunk.put_rows(chunk.kept["latent"], latents)


def _copy(chunk: Chunk, latents: list[Tensor], views: list[Tensor]) -> None:
    torch._foreach_copy_(chunk.parts(latents[0], views) if chunk.joined else latents, views)
