"""Models of transformers, peft and timm, trained as their users train them, reach the target in what they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization, Sparsity, prune_small

from .training import TARGET, sparsity

transformers = pytest.importorskip("transformers", reason="the extra `clients` is not installed")
STEPS = 200
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have collapsed:UserWarning"),  # tiny networks can do without a layer
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers for it
]


class Client(LightningModule):
    """A network that computes its loss from a batch, as those of transformers do, under AdamW and a linear schedule."""

    def __init__(self, net: Any, warmup: int = 20) -> None:
        super().__init__()
        self.net, self.warmup = net, warmup

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, self.warmup, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    model: LightningModule, data: list[dict[str, Tensor]], *callbacks: Callback, **arguments: Any
) -> GradientCoherentRegularization:
    callback = GradientCoherentRegularization(target_sparsity=TARGET)
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *callbacks],
        **arguments,
    )
    trainer.fit(model, DataLoader(data, batch_size=16))
    return callback


def sentences() -> list[dict[str, Tensor]]:
    """Of 8 tokens, each of which follows from the last."""
    tokens = (torch.arange(256)[:, None] + 7 * torch.arange(8)) % 64
    return [{"input_ids": row, "labels": row} for row in tokens]


def images() -> list[dict[str, Tensor]]:
    """Of 8 by 8 pixels, labelled by their brightest quarter."""
    pixels = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = pixels.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).flatten(1).argmax(1)
    return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]


def language_model() -> Any:
    """A GPT-2 whose output layer is tied to its embedding."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**tokens, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    )


def test_a_causal_language_model_with_tied_embeddings_keeps_its_zeros_in_its_own_files(tmp_path: Path) -> None:
    model = Client(language_model())
    callback = train(model, sentences(), precision="bf16-mixed", gradient_clip_val=1.0)
    assert callback.regularizer is not None
    matrices = {id(p): p for name, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    assert {id(p) for p in callback.regularizer.parameters.values()} == set(matrices)
    assert len(callback.regularizer.parameters) == len(matrices) == 6  # tied weights once
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)
    assert Sparsity()(model) == pytest.approx(sparsity(callback))

    model.net.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.net.parameters(), strict=True))
    assert float(Sparsity()(loaded)) == pytest.approx(TARGET, abs=0.01)


def test_a_vision_transformer_keeps_its_class_token_and_position_embeddings_dense() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=4)
    model = Client(transformers.ViTForImageClassification(config))
    callback = train(model, images())
    assert callback.regularizer is not None
    embeddings = model.net.vit.embeddings
    assert (embeddings.position_embeddings != 0).all()
    assert (embeddings.cls_token != 0).all()
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    assert {id(layer.weight) for layer in layers} == {id(p) for p in callback.regularizer.parameters.values()}
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)


def test_low_rank_adapters_alone_are_regularized_and_counted() -> None:
    peft = pytest.importorskip("peft", reason="the extra `clients` is not installed")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = Client(peft.get_peft_model(language_model(), config))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    callback = train(model, sentences(), CompressionMonitor())
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 4
    zeros = sum(int((p == 0).sum()) for p in adapters) / sum(p.numel() for p in adapters)
    assert zeros == pytest.approx(TARGET, abs=0.01)
    assert callback.regularizer is not None
    assert callback.regularizer.sparsity() == pytest.approx(zeros)
    assert float(model.trainer.callback_metrics["sparsity/model"]) == pytest.approx(zeros)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


class Vision(Client):
    """A vision transformer of timm, which takes images and gives logits."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = batch["pixel_values"].to(memory_format=torch.channels_last)
        return nn.functional.cross_entropy(self.net(images), batch["labels"])


def test_a_vision_transformer_of_timm_meets_the_target_in_averaged_weights_once_pruned() -> None:
    timm = pytest.importorskip("timm", reason="the extra `clients` is not installed")
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
    net = timm.create_model("vit_tiny_patch16_224", **sizes).to(memory_format=torch.channels_last)
    model = Vision(net)
    with pytest.warns(UserWarning, match="EMAWeightAveraging leaves averaged weights behind"):
        callback = train(model, images(), EMAWeightAveraging(decay=0.9))
    assert callback.regularizer is not None
    spared = {f"net.{name}" for name in net.no_weight_decay()}
    assert spared & {name for name, _ in model.named_parameters()} == {"net.pos_embed", "net.cls_token"}
    assert not spared & set(callback.regularizer.parameters)
    prune_small(net, 1e-4)  # which the warning advises
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)
