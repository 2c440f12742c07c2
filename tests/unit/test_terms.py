"""What one parameter contributes to a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gcsr import L1, L2
from lightning_gcsr.terms import Term, collect_terms


def make_term(
    gradient: torch.Tensor, weight: torch.Tensor, relative: float = 1.0, loss_scale: float | torch.Tensor = 1.0
) -> Term:
    return Term("w", nn.Parameter(weight), gradient, None, relative, {"lr": 0.1}, loss_scale)


def test_loss_gradient_is_without_loss_scale() -> None:
    for scale in (8.0, torch.tensor(8.0)):
        assert make_term(torch.tensor([8.0]), torch.ones(1), loss_scale=scale).loss_gradient.tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_measured_in_float32(dtype: torch.dtype) -> None:
    term = make_term(torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype), loss_scale=2.0**20)
    assert term.loss_gradient.dtype == term.weight.dtype == term.penalty_gradient(L1()).dtype == torch.float32
    assert (term.loss_gradient == 2.0**-20).all()


def test_penalty_gradient_is_multiplied_by_the_relative_strength() -> None:
    term = make_term(torch.zeros(2), torch.tensor([2.0, -4.0]), relative=0.5)
    assert term.penalty_gradient(L2()).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("scale", [4.0, torch.tensor(4.0)])
def test_inject_adds_with_the_loss_scale_where_the_gate_is_open(scale: float | torch.Tensor) -> None:
    gradient = torch.ones(3)
    term = make_term(gradient, torch.tensor([2.0, -2.0, 2.0]), relative=0.5, loss_scale=scale)
    term.inject(L1(), torch.tensor([True, True, False]), strength=0.25)
    assert gradient.tolist() == [1.5, 0.5, 1.0]
    term.inject(L1(), torch.tensor(False), strength=0.25)
    assert gradient.tolist() == [1.5, 0.5, 1.0]


def test_shrink_moves_weights_where_the_gate_is_open() -> None:
    term = make_term(torch.ones(3), torch.tensor([0.1, -2.0, 2.0]), relative=0.5)
    term.shrink(L1(), torch.tensor([True, True, False]), strength=10.0)
    assert term.parameter.tolist() == pytest.approx([0.0, -1.5, 2.0])


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
