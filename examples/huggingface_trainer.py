"""Regularize in a Hugging Face ``Trainer``: a callback around the optimizer's step, resumable from its checkpoints."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from lightning_gcsr import Clock, CoherentRegularizer, Sparsity, save_compressed


class Regularization(TrainerCallback):  # type: ignore[misc]
    def __init__(self, regularizer: CoherentRegularizer, max_grad_norm: float = 1.0) -> None:
        self.regularizer, self.max_grad_norm = regularizer, max_grad_norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:  # the Trainer clips before any hook, and the gate measures whole gradients
            raise ValueError(f"`max_grad_norm` must be 0, got {args.max_grad_norm}. Give it to the callback instead.")
        if state.global_step:
            self.regularizer.load_state_dict(torch.load(self.path(args, state), weights_only=True))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        clock = Clock(state.global_step, state.global_step / state.max_steps)
        self.regularizer.before_step(optimizer, clock=clock, report=False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.regularizer.after_step(optimizer, skipped=optimizer.step_was_skipped)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save(self.regularizer.state_dict(), self.path(args, state))

    def path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "regularizer.pt")


def main(output: str = "runs/huggingface", resume: str | bool = False, **arguments: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    sentences = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(512 * 16).view(512, 16) * 7) % 64]
    regularization = Regularization(CoherentRegularizer(model, "l1", target_sparsity=0.8))
    defaults = {"num_train_epochs": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "max_grad_norm": 0.0}
    settings = TrainingArguments(output, report_to="none", disable_tqdm=True, **(defaults | arguments))
    Trainer(model, settings, train_dataset=sentences, callbacks=[regularization]).train(resume or None)
    save_compressed(model, Path(output, "small.safetensors"))
    print(f"sparsity {Sparsity()(model):.1%}")
    return model


if __name__ == "__main__":
    main(*sys.argv[1:2])
