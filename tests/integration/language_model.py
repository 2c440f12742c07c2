"""A small causal transformer that learns to write like Python's own documentation, character by character."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CHARACTERS = 60_000
CONTEXT = 32
WIDTH = 32
HEADS = 2
LAYERS = 2
LR = 3e-3
WARMUP = 20
MICRO_BATCH = 16
ACCUMULATE = 2


def read_text() -> tuple[Tensor, int]:
    """The first characters of what ``help()`` knows of the language, as numbers, and how many different ones."""
    text = "\n".join(topics[name] for name in sorted(topics))[:CHARACTERS].lower()
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


TEXT, VOCABULARY = read_text()


def unigram_entropy() -> float:
    """The loss of who knows how frequent each character is, and nothing else, in nats."""
    frequencies = torch.bincount(TEXT).double() / len(TEXT)
    return float(torch.special.entr(frequencies).sum())


class Excerpts(Dataset[Tensor]):
    """Excerpts from anywhere in the text, the same ones in the same order every time."""

    def __init__(self, steps: int) -> None:
        count = steps * ACCUMULATE * MICRO_BATCH
        starts = torch.randint(len(TEXT) - CONTEXT, (count,), generator=torch.Generator().manual_seed(0))
        self.excerpts = TEXT[starts[:, None] + torch.arange(CONTEXT + 1)]

    def __len__(self) -> int:
        return len(self.excerpts)

    def __getitem__(self, index: int) -> Tensor:
        return self.excerpts[index]


def excerpts(steps: int) -> DataLoader[Tensor]:
    """The data of so many optimizer steps."""
    return DataLoader(Excerpts(steps), batch_size=MICRO_BATCH)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        # Without a bias: the loss does not depend on that of the keys, so Adam would blow up the rounding in it.
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.queries_keys_values(self.attention_norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.projection(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A decoder whose output weights are its embedding; there is no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(characters) + self.positions.weight)))


class LanguageModel(LightningModule):
    """AdamW under a learning rate that warms up. The same weights every time.

    Args:
        loss_term: Added to the loss, from the module.
    """

    def __init__(self, loss_term: Callable[[nn.Module], Tensor] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Transformer()
        self.loss_term = loss_term
        self.losses: list[float] = []
        """The loss of every micro-batch, without the term."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(float(loss.detach()))
        return loss if self.loss_term is None else loss + self.loss_term(self.net)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def final_loss(self) -> float:
        """The mean of the last 20 micro-batches."""
        return sum(self.losses[-20:]) / 20


TRAINER: dict[str, Any] = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": 1.0}
"""How it is trained."""
