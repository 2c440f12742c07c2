"""What one parameter contributes to a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gcsr.core.terms import collect_terms


def test_terms_are_those_of_the_optimizer_that_have_gradients() -> None:
    net = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
    for i in (0, 1, 3):
        net[i].weight.grad = torch.ones(2, 2)
    optimizer = torch.optim.SGD([net[i].weight for i in (1, 2, 0)], lr=0.1)
    names = {id(net[i].weight): str(i) for i in (0, 1, 2, 3)}
    terms = collect_terms(optimizer, names, {"0": 1.0, "1": 0.5, "2": 1.0, "3": 1.0}, 2.0)
    assert [(term.name, term.relative, term.loss_scale, term.rows) for term in terms] == [
        ("1", 0.5, 2.0, None),
        ("0", 1.0, 2.0, None),
    ]
    assert terms[0].gradient is net[1].weight.grad


def test_empty_parameters_and_untouched_embeddings_have_no_term() -> None:
    empty, embedding = nn.Parameter(torch.empty(0, 3)), nn.Embedding(4, 2, sparse=True)
    empty.grad = torch.empty(0, 3)
    embedding(torch.empty(0, dtype=torch.long)).sum().backward()
    optimizer = torch.optim.SGD([empty, embedding.weight], lr=0.1)
    names = {id(empty): "empty", id(embedding.weight): "embedding"}
    assert collect_terms(optimizer, names, {"empty": 1.0, "embedding": 1.0}, 1.0) == []


def test_a_gradient_that_is_sparse_in_every_dimension_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    torch.gather(weight, 1, torch.tensor([[0], [1], [2]]), sparse_grad=True).sum().backward()
    with pytest.raises(ValueError, match=r"sparse in 2 dimensions; only sparse rows are supported.*`exclude`"):
        collect_terms(torch.optim.SGD([weight], lr=0.1), {id(weight): "weight"}, {"weight": 1.0}, 1.0)
