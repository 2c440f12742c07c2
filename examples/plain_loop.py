"""Regularize in a hand-written training loop, without a Trainer: two calls around the optimizer's step."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_gcsr import CoherentRegularizer, Schedule, Sparsity

images, labels = load_digits(return_X_y=True)
x, y = (torch.from_numpy(images).float() - 5) / 6, torch.from_numpy(labels).long()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
regularizer = CoherentRegularizer(model, "l1", strength=0.01, schedule=Schedule(warmup=100))  # in steps

for epoch in range(20):
    for batch in torch.randperm(1300).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        report = regularizer.before_step(optimizer)  # measure the gradients, and decide where the penalty acts
        optimizer.step()
        regularizer.after_step(optimizer)  # apply the penalty there
    sparsity = Sparsity()
    sparsity.update(model)
    accuracy = (model(x[1300:]).argmax(dim=1) == y[1300:]).float().mean()
    print(
        f"epoch {epoch + 1:2d}  test accuracy {accuracy:.1%}  sparsity {sparsity.compute():.1%}"
        f"  coherence {report.coherence:+.2f}  injected {report.injected:.0%}"
    )
