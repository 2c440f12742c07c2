"""Regularize in a loop under Accelerate, with accumulated and clipped gradients, resumable from its checkpoints."""

import torch
from accelerate import Accelerator
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcsr import Clock, CoherentRegularizer, Sparsity


def main(output: str = "runs/accelerate", epochs: int = 20, done: int = 0) -> nn.Module:
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    regularizer = CoherentRegularizer(model, "l1", target_sparsity=0.8)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    data = DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size=32)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    accelerator.register_for_checkpointing(regularizer)
    if done:
        accelerator.load_state(output)
    step, steps = done * len(data) // 2, 20 * len(data) // 2  # of the optimizer
    for _ in range(done, epochs):
        for batch, labels in data:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(batch), labels))
                if accelerator.sync_gradients:  # the gradients are complete
                    regularizer.before_step(optimizer, clock=Clock(step, step / steps), report=False)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    regularizer.after_step(optimizer, skipped=accelerator.optimizer_step_was_skipped)
                    step += 1
                optimizer.zero_grad()
    accelerator.save_state(output)
    print(f"sparsity {Sparsity()(accelerator.unwrap_model(model)):.1%}")
    trained: nn.Module = accelerator.unwrap_model(model)
    return trained


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
