"""A data set, split and on the device, and the batches that are cut from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Dataset:
    """Inputs and labels, split into three.

    Inputs are images, float32 of shape (n, channels, height, width), standardized by the training images, with labels
    of shape (n,); or sequences of characters, int64 of shape (n, length), with the next characters as labels, of the
    same shape.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image, or the length of a sequence."""
        return tuple(self.train[0].shape[1:])


class Batches:
    """Batches of tensors that are on the device already; shuffled anew in each epoch where a seed is given.

    ``augment`` is ``None``, ``"crop"`` (shifted by up to four pixels, zeros move in) or ``"crop_flip"`` (mirrored in
    half of the cases, too).
    """

    def __init__(
        self, data: tuple[Tensor, Tensor], size: int, seed: int | None = None, augment: str | None = None
    ) -> None:
        self.images, self.labels = data
        self.size, self.augment = size, augment
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for rows in torch.split(order.to(self.labels.device), self.size):
            images = self.images[rows]
            yield (self._augmented(images) if self.augment else images), self.labels[rows]

    def _augmented(self, images: Tensor, shift: int = 4) -> Tensor:
        count, _, height, width = images.shape
        down, right = torch.randint(0, 2 * shift + 1, (2, count), generator=self.generator).to(images.device)
        rows = torch.arange(height, device=images.device) + down[:, None]
        columns = torch.arange(width, device=images.device) + right[:, None]
        if self.augment == "crop_flip":
            flipped = torch.rand(count, generator=self.generator).to(images.device) < 0.5
            columns = torch.where(flipped[:, None], columns.flip(1), columns)
        padded = torch.nn.functional.pad(images, (shift,) * 4)
        which = torch.arange(count, device=images.device)[:, None, None]
        return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
