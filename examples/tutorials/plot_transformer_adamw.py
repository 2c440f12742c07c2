"""
A sparse transformer under AdamW
================================

A causal transformer learns to write like Python's own documentation, character by character, under AdamW with a
warm-up of the learning rate. The penalty needs no tuning: only a target sparsity is given, and the embeddings stay
dense.
"""

from __future__ import annotations

import logging
import math
import warnings
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization

warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and newer versions of torch
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.set_num_threads(1)  # the layers are small

# %%
# The text
# --------
#
# The texts of ``help()`` come with Python. The last tenth of them is for validation.

text = "\n".join(topics[name] for name in sorted(topics))[:120_000].lower()
alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
numbers = torch.tensor([alphabet[character] for character in text])
CONTEXT = 32


def excerpts(source: Tensor, count: int) -> Any:
    """Excerpts from random places in the source, each with the character that follows."""
    starts = torch.randint(len(source) - CONTEXT, (count,), generator=torch.Generator().manual_seed(0))
    return list(source[starts[:, None] + torch.arange(CONTEXT + 1)])


train_text, validation_text = excerpts(numbers[:108_000], 9_600), excerpts(numbers[108_000:], 512)
print(f"{len(alphabet)} characters, for example: {text[:60]!r}")


# %%
# The model
# ---------
#
# Two layers of torch's own transformer, embeddings, and a head.
class Writer(LightningModule):
    """Predicts the next character."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(alphabet), width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(alphabet))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def loss(self, batch: Tensor) -> Tensor:
        states = self.layers(self.embedding(batch[:, :-1]) + self.position, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# %%
# Two trainings
# -------------
#
# ``exclude`` takes regular expressions on the names of parameters. Embeddings and positions stay dense here, so they
# are excluded from the penalty and from the count.

DENSE = ["embedding", "position"]


def train(target: float | None) -> tuple[float, float]:
    """The loss on the validation text, and the sparsity."""
    seed_everything(0, verbose=False)
    penalties = []
    if target is not None:
        penalties = [GradientCoherentRegularization("l1", target_sparsity=target, exclude=DENSE)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[*penalties, CompressionMonitor(exclude=DENSE, verbose=False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Writer(), DataLoader(train_text, 64, shuffle=True), DataLoader(validation_text, 512))
    return float(trainer.callback_metrics["val_loss"]), float(trainer.callback_metrics["sparsity/model"])


frequencies = torch.bincount(numbers).double() / len(numbers)
print(f"character frequencies alone: loss {float(torch.special.entr(frequencies).sum()):.2f}")
for target in (None, 0.9):
    loss, sparsity = train(target)
    name = "no penalty" if target is None else f"target_sparsity={target}"
    print(f"{name}: loss {loss:.2f}, perplexity {math.exp(loss):.1f}, sparsity {sparsity:.1%}")

# %%
# The ``weight_decay`` of AdamW works beside the penalty. :doc:`/method` explains the strength under AdamW,
# :doc:`/howto/finetuning` covers pretrained weights, and :doc:`/compress` the small file.
