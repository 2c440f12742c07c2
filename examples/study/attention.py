"""Two small transformers: over the patches of an image, and over the characters before the next one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention. Its projections are linear layers, so that every method finds their weights."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.inputs(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        projected: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, causal))
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        thought: Tensor = x + self.think(x)
        return thought


class Transformer(nn.Module):
    """Blocks over embedded positions; it keeps torch's own initialization."""

    def __init__(self, width: int, heads: int, blocks: int, length: int, causal: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(blocks)), nn.LayerNorm(width))

    def no_weight_decay(self) -> set[str]:
        """What no penalty reaches, by the convention of timm."""
        return {"positions"}

    def forward(self, embedded: Tensor) -> Tensor:
        features: Tensor = self.blocks(embedded + self.positions[: embedded.shape[1]])
        return features


class CharacterTransformer(nn.Module):
    """A causal transformer of two blocks, 64 wide, whose embedding and head are separate weights."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 64)
        self.body = Transformer(64, heads=4, blocks=2, length=shape[0], causal=True)
        self.head = nn.Linear(64, classes)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(characters)))
        return logits


class VisionTransformer(nn.Module):
    """A transformer of four blocks, 64 wide, over patches of 4×4 pixels, 2×2 of images below 16×16."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        side = 4 if min(height, width) >= 16 else 2
        self.patches = nn.Conv2d(channels, 64, side, stride=side)
        self.body = Transformer(64, heads=4, blocks=4, length=math.prod((height // side, width // side)), causal=False)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(self.patches(images).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(features.mean(1))
        return logits
