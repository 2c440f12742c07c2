"""Weights in blocks: each is in one block once, and nothing that a step does depends on how they are cut and joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gcsr import L1, L2, CoherentRegularizer, GateReport, GroupLasso, Penalty
from lightning_gcsr.core import blocks
from lightning_gcsr.core.blocks import Block, Portion, blocks_of
from lightning_gcsr.core.gradient_average import GradientMemory
from lightning_gcsr.core.terms import Term

GROUP = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0}


@pytest.fixture
def block_size(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def change(size: int) -> None:
        monkeypatch.setattr(blocks, "SIZE", size)

    return change


def terms_of(*shapes: tuple[int, ...], layout: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Term]:
    generator = torch.Generator().manual_seed(0)
    terms = []
    for i, shape in enumerate(shapes):
        weight = nn.Parameter(layout(torch.randn(shape, generator=generator)))
        weight.grad = layout(torch.randn(shape, generator=generator))
        terms.append(Term(str(i), weight, weight.grad, None, 1.0, GROUP, 1.0))
    return terms


def sizes(found: list[Block]) -> list[list[int]]:
    return [[gradient.numel() for gradient in block.gradients] for block in found]


# --- how weights are cut and joined --------------------------------------------------------------------------------


def test_large_tensors_are_cut_and_small_ones_of_one_shape_joined(block_size: Callable[[int], None]) -> None:
    block_size(12)
    found = blocks_of(terms_of((5, 5), (2, 3), (2, 3), (2, 2), (3, 2), (7,)), L1(), None)
    assert sizes(found) == [[12], [12], [1], [7], [6, 6], [4], [6]]
    assert [list(block.positions) for block in found] == [[0], [0], [0], [5], [1, 2], [3], [4]]


def test_groups_are_cut_between_rows_or_not_at_all_and_never_joined(block_size: Callable[[int], None]) -> None:
    block_size(12)
    shapes = (7, 4), (2, 2), (2, 2), (2, 20)
    assert sizes(blocks_of(terms_of(*shapes), GroupLasso(dim=0), None)) == [[12], [12], [4], [4], [4], [20], [20]]
    assert sizes(blocks_of(terms_of(*shapes), GroupLasso(dim=1), None)) == [[28], [4], [4], [40]]


class Unknown(Penalty):
    """A penalty that says nothing about itself."""

    def value(self, weight: Tensor) -> Tensor:
        return weight.square().sum() ** 2

    def gradient(self, weight: Tensor) -> Tensor:
        return 4 * weight.square().sum() * weight

    def prox(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return weight / (1 + step)


def test_tensors_stay_whole_under_a_penalty_that_says_nothing(block_size: Callable[[int], None]) -> None:
    block_size(4)
    assert sizes(blocks_of(terms_of((5, 5), (1, 1), (1, 1)), Unknown(), None)) == [[25], [1], [1]]


@pytest.mark.parametrize("difference", ["group", "relative", "dtype", "device"])
def test_only_tensors_that_are_treated_alike_are_joined(difference: str) -> None:
    first, second = terms_of((2, 2), (2, 2))
    assert len(blocks_of([first, second], L1(), None)) == 1
    if difference == "group":
        second.group = dict(GROUP)
    elif difference == "relative":
        second.relative = 0.5
    else:
        target: Any = torch.float64 if difference == "dtype" else "meta"
        second.parameter = nn.Parameter(second.parameter.detach().to(target))
        second.gradient = second.gradient.to(target)
    assert len(blocks_of([first, second], L1(), None)) == 2


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 1),
    "with gaps": lambda tensor: torch.stack([tensor, tensor])[0:1].squeeze(0)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("penalty", [L1(), GroupLasso()], ids=repr)
@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_every_weight_is_in_one_block_beside_its_own_gradient(
    size: int, penalty: Penalty, layout: str, block_size: Callable[[int], None]
) -> None:
    block_size(size)
    terms = terms_of((4, 6, 3, 2), (4, 6, 3, 2), (1, 2, 1, 2), layout=LAYOUTS[layout])
    memory = GradientMemory(0.5)
    for term in terms:  # each weight is known by its number, in all three tensors
        number = torch.arange(term.gradient.numel()).reshape(term.gradient.shape) + 1000.0 * int(term.name)
        term.parameter.data.copy_(number)
        term.gradient.copy_(number)
        memory.recall(term.name, term.gradient).copy_(number)
    seen: list[float] = []
    for block in blocks_of(terms, penalty, memory):
        for gradient, weight, remembered in zip(block.gradients, block.weights, block.memories, strict=True):
            assert torch.equal(gradient, weight)
            assert torch.equal(gradient, remembered)
            seen += gradient.flatten().tolist()
            gradient.zero_()
    assert sorted(seen) == sorted(number for term in terms for number in term.parameter.flatten().tolist())
    assert not any(term.gradient.any() for term in terms)


def test_a_gradient_that_lies_otherwise_than_its_weight_meets_it_all_the_same(
    block_size: Callable[[int], None],
) -> None:
    block_size(6)
    [term] = terms_of((4, 6, 3, 2))
    term.gradient = term.parameter.detach().clone().to(memory_format=torch.channels_last)
    for block in blocks_of([term], L1(), None):
        assert torch.equal(block.gradients[0], block.weights[0])


def test_scalars_and_empty_tensors_are_blocks_too() -> None:
    assert sizes(blocks_of(terms_of((), (0, 3), ()), L1(), None)) == [[1, 1], [0]]
    assert sizes(blocks_of(terms_of((0, 3)), GroupLasso(), None)) == [[0]]
    assert sizes(blocks_of(terms_of((), (2,)), Unknown(), None)) == [[1], [2]]


# --- a portion ------------------------------------------------------------------------------------------------------


def test_loss_gradient_is_without_loss_scale() -> None:
    for scale in (8.0, torch.tensor(8.0)):
        [term] = terms_of((3, 3))
        term.loss_scale = scale
        [block] = blocks_of([term], L1(), None)
        assert torch.equal(Portion(block, L1()).loss_gradient, term.gradient / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
def test_sixteen_bits_are_measured_in_float32(dtype: torch.dtype, count: int) -> None:
    terms = terms_of(*[(3, 3)] * count, layout=lambda tensor: tensor.to(dtype))
    for term in terms:
        term.loss_scale = 2.0**20
    [block] = blocks_of(terms, L2(), None)
    portion = Portion(block, L2())
    assert portion.loss_gradient.dtype == portion.penalty_gradient.dtype == torch.float32
    expected = torch.stack([term.gradient.float() for term in terms]) / 2.0**20
    assert torch.equal(portion.loss_gradient.flatten(), expected.flatten())


# --- the whole step -------------------------------------------------------------------------------------------------


def five_layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    widths = [(6, 4), (4, 4), (4, 4), (4, 4), (4, 6)]
    layers: list[nn.Module] = []
    for inputs, outputs in widths:
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype)


def trained(dtype: torch.dtype, scale: float = 1.0, **arguments: Any) -> tuple[nn.Module, list[GateReport | None]]:
    net = five_layers(dtype)
    groups = [{"params": net[:4].parameters()}, {"params": net[4:].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    regularizer = CoherentRegularizer(net, **arguments)
    reports = []
    for step in range(5):
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        ((net(batch) - batch.flip(1)).square().mean() * scale).backward()
        if step == 2:
            net[2].weight.grad[0, 0] = torch.inf
        reports.append(regularizer.before_step(optimizer, scale, report=step % 2 == 0))
        for parameter in net.parameters():
            parameter.grad = (parameter.grad / scale).nan_to_num(posinf=0)
        optimizer.step()
        regularizer.after_step(optimizer)
    return net, reports


CASES: list[dict[str, Any]] = [{"coherence": None}, {"averaging": 0.9, "tolerance": 0.3}]
CASES += [{"coherence": c, "scope": s} for c in ("direction", "temporal", "agreement") for s in ("model", "parameter")]
CASES += [{"coherence": c, "scope": "element"} for c in ("direction", "temporal", "agreement")]
CASES += [{"coherence": "direction", "scope": "parameter", "averaging": 0.9}]


@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("penalty", ["l1", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_depends_on_the_size_of_blocks(
    case: dict[str, Any], update: Any, penalty: Any, size: int, block_size: Callable[[int], None]
) -> None:
    arguments = {**case, "penalty": penalty, "update": update, "strength": {"^0": 0.1, ".": 0.02}}
    whole, expected = trained(torch.float64, **arguments)
    block_size(size)
    cut, found = trained(torch.float64, **arguments)
    for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert torch.equal(one == 0, other == 0)
    for report, other_report in zip(found, expected, strict=True):
        assert (report is None) == (other_report is None)
        if report is not None and other_report is not None:
            assert report.names == other_report.names
            assert torch.equal(report.injected_weights, other_report.injected_weights)
            torch.testing.assert_close(
                torch.stack([*report.sums]), torch.stack([*other_report.sums]), rtol=1e-12, atol=1e-12, equal_nan=True
            )


@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_elementwise_results_are_the_same_in_every_bit_in_any_precision(
    case: dict[str, Any], dtype: torch.dtype, size: int, block_size: Callable[[int], None]
) -> None:
    if case.get("scope") in ("model", "parameter"):
        case = {**case, "threshold": -1.0}  # open whatever the sums are, which may differ in their last bits
    whole, _ = trained(dtype, scale=1024.0, strength=0.05, **case)
    block_size(size)
    cut, _ = trained(dtype, scale=1024.0, strength=0.05, **case)
    for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_step_is_the_same_whether_it_is_reported_or_not(case: dict[str, Any], update: Any) -> None:
    nets = []
    for report in (True, False):
        net = five_layers(torch.float32)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        regularizer = CoherentRegularizer(net, strength=0.05, update=update, **case)
        for step in range(4):
            optimizer.zero_grad()
            net(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            assert (regularizer.before_step(optimizer, report=report) is None) is not report
            optimizer.step()
            regularizer.after_step(optimizer)
        nets.append(net)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_regularized_parameters_there_is_no_report_where_none_is_asked_for() -> None:
    net = five_layers(torch.float32)
    optimizer = torch.optim.SGD([net[0].bias], lr=0.1)
    assert CoherentRegularizer(net, strength=0.1).before_step(optimizer, report=False) is None
