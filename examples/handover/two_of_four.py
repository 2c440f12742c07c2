"""Train a perceptron on the digits into NVIDIA's 2:4 pattern: at most two nonzeros among any four weights of a row.

At seven tenths of the training every group of four weights keeps its two largest, and ``KeepZeros`` keeps the zeros.
The kernels for this pattern need an NVIDIA GPU; elsewhere only the accuracy is shown.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_gcsr import KeepZeros

sys.path.append(str(Path(__file__).parents[1]))
from digits import DigitsClassifier, digits

START = 0.7


def two_of_four(weight: Tensor) -> Tensor:
    """The weight with the two largest of any four neighbours in a row, and zeros for the others."""
    fours = weight.reshape(len(weight), -1, 4)
    kept = torch.zeros_like(fours).scatter_(2, fours.abs().topk(2, dim=2).indices, 1.0)
    return (fours * kept).view_as(weight)


class Projection(Callback):
    """Projects the weights of linear layers onto the 2:4 pattern once."""

    done = False

    @torch.no_grad()
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.max_epochs is not None
        if not self.done and trainer.current_epoch >= START * trainer.max_epochs:
            for layer in pl_module.modules():
                if isinstance(layer, nn.Linear) and layer.in_features % 4 == 0:
                    layer.weight.copy_(two_of_four(layer.weight))
            self.done = True


@torch.no_grad()
def accuracy(model: nn.Module, batches: object) -> float:
    """The share of the digits that are recognized."""
    right = [(model(images).argmax(1) == labels).float() for images, labels in batches]  # type: ignore[attr-defined]
    return float(torch.cat(right).mean())


def main(epochs: int = 40, seeds: int = 1) -> None:
    """Train without and with the pattern, and print the accuracies."""
    for name in ("dense", "2:4"):
        for seed in range(seeds):
            seed_everything(seed, verbose=False)
            train, validation = digits(seed=seed)
            model = DigitsClassifier(max_epochs=epochs)
            callbacks = [Projection(), KeepZeros(START)] if name == "2:4" else []
            trainer = Trainer(
                max_epochs=epochs,
                callbacks=callbacks,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(model, train)
            weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
            zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
            fits = all(torch.equal(weight, two_of_four(weight)) for weight in weights)
            print(
                f"{name}, seed {seed}: {accuracy(model.net.eval(), validation):.2%} right, {zeros:.0%} zeros,"
                f" in the 2:4 pattern: {fits}"
            )


if __name__ == "__main__":
    main()
