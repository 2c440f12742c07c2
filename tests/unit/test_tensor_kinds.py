"""Tensors that are not plain float32: sparse gradients, complex numbers, 16 bits, memory layouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import oracle
from reference.pairwise import pairwise_cases
from reference.training import WEIGHTS, small_net
from torch import Tensor, nn

from lightning_gcsr import CoherentRegularizer, Gate, Schedule
from lightning_gcsr.core import chunk_layout

NOW = Schedule(warmup=0)
UPDATES = ["gradient", "proximal", "dual_averaging"]
SPECS = {"l1": ("l1",), "l2": ("l2",), "elastic_net": ("elastic_net", 0.5), "group_lasso": ("group_lasso", 0)}
GATES: dict[str, Gate | None] = {
    "none": None,
    "direction_model": Gate("direction", "model"),
    "agreement_parameter": Gate("agreement", "parameter"),
    "eased_averaged": Gate(averaging=0.9, tolerance=0.5),
    "temporal_element": Gate("temporal"),
}


# --- sparse gradients ----------------------------------------------------------------------------------------------


def embedded(indices: list[int]) -> nn.Embedding:
    generator = torch.Generator().manual_seed(3)
    embedding = nn.Embedding(6, 3, sparse=True)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(6, 3, generator=generator))
    touch(embedding, indices, generator)
    return embedding


def touch(embedding: nn.Embedding, indices: list[int], generator: torch.Generator) -> None:
    embedding.weight.grad = None
    factors = torch.randn(len(indices), 3, generator=generator)
    (embedding(torch.tensor(indices)) * factors).sum().backward()


@pytest.mark.parametrize(
    "case",
    pairwise_cases(
        {
            "gate": ["none", "direction_model", "agreement_parameter", "eased_averaged"],
            "penalty": list(SPECS),
            "update": UPDATES,
            "indices": [[1, 4], [4, 1, 4, 4]],
            "scale": [1.0, 64.0],
        }
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_a_sparse_gradient_is_that_of_the_touched_rows(case: dict[str, Any]) -> None:
    """Also where the gate averages, which does not fit rows that change from step to step."""
    embedding, rows = embedded(case["indices"]), sorted(set(case["indices"]))
    embedding.weight.grad *= case["scale"]
    before = embedding.weight.detach().clone()
    loss_gradient = embedding.weight.grad.to_dense()[rows] / case["scale"]
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    gate = GATES[case["gate"]]
    regularizer = CoherentRegularizer(
        embedding, case["penalty"], strength=0.3, gate=gate, schedule=NOW, update=case["update"]
    )
    report = regularizer.before_step(optimizer, case["scale"])
    step = oracle.regularized_step(
        SPECS[case["penalty"]],
        [before[rows]],
        [loss_gradient],
        [None],
        [0.3],
        None if gate is None else str(gate.coherence),
        "model" if gate is None else gate.scope,
        (gate.threshold or 0.0) if gate else 0.0,
        (gate.tolerance or 0.0) if gate else 0.0,
    )
    assert embedding.weight.grad.is_sparse
    assert regularizer.unaveraged == ({"weight"} if case["gate"] == "eased_averaged" else set())
    assert float(report.injected) == pytest.approx(step.injected)
    if gate is not None:
        assert float(report.coherence) == pytest.approx(step.coherence, abs=1e-6)
    embedding.weight.grad /= case["scale"]
    optimizer.step()
    stepped = embedding.weight.detach().clone()
    regularizer.after_step(optimizer)
    after = embedding.weight.detach()
    others = [row for row in range(6) if row not in rows]
    assert torch.equal(after[others], before[others])
    if case["update"] == "gradient":
        expected = before[rows].double() - 0.1 * step.gradients[0]
    else:
        spec, steps = SPECS[case["penalty"]], step.gates[0].double() * 0.03
        gates = step.gates[0]
        if case["update"] == "dual_averaging":  # a group shrinks as a whole
            steps = oracle.group_mean(spec, steps)
            gates = steps > 0
        expected = torch.where(gates, oracle.prox(spec, stepped[rows], steps), stepped[rows].double())
    torch.testing.assert_close(after[rows].double(), expected, rtol=1e-5, atol=1e-6)


def test_latent_weights_of_an_embedding_follow_its_rows() -> None:
    """Rows that are touched in some steps only have the thresholds of these steps."""
    generator = torch.Generator().manual_seed(7)
    embedding = embedded([0])
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(embedding, strength=0.3, gate=None, update="dual_averaging")
    latent = embedding.weight.detach().double()
    counts = torch.zeros(6, 1, dtype=torch.float64)
    for rows in ([1, 4], [4], [2, 4]):
        touch(embedding, rows, generator)
        gradient = embedding.weight.grad.to_dense().double()
        regularizer.before_step(optimizer)
        optimizer.step()
        regularizer.after_step(optimizer)
        latent -= 0.1 * gradient
        counts[rows] += 1
        expected = oracle.prox(("l1",), latent, (0.03 * counts).expand(6, 3))
        torch.testing.assert_close(embedding.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_sparse_gradient_works_with_sparse_adam_and_stays_clean_of_nan() -> None:
    embedding = embedded([2, 2, 5])
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(embedding, strength=0.3, gate=None, update="proximal")
    regularizer.before_step(optimizer)
    optimizer.step()
    stepped = embedding.weight.detach().clone()
    regularizer.after_step(optimizer)
    assert not torch.equal(embedding.weight[[2, 5]], stepped[[2, 5]])
    embedding.weight.grad.values()[0, 0] = math.nan
    before = embedding.weight.detach().clone()
    assert float(regularizer.before_step(optimizer).injected) == 0
    regularizer.after_step(optimizer)
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": Gate("temporal")}, r"coherence='temporal' does not go with the sparse gradient of 'weight'.*Use"),
        ({}, r"The gradient of 'weight' is sparse in 2 dimensions; only sparse rows are supported.*`exclude`"),
    ],
)
def test_sparse_gradients_that_cannot_be_regularized_are_refused(arguments: dict[str, Any], message: str) -> None:
    embedding = embedded([1])
    if not arguments:
        weight = embedding.weight
        weight.grad = None
        torch.gather(weight, 1, torch.tensor([[0]] * 6), sparse_grad=True).sum().backward()
    regularizer = CoherentRegularizer(embedding, strength=0.1, schedule=NOW, **arguments)
    with pytest.raises(ValueError, match=message):
        regularizer.before_step(torch.optim.SGD(embedding.parameters(), lr=0.1))


# --- complex numbers -----------------------------------------------------------------------------------------------


class Phase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128, generator=generator))
        self.gradients = [torch.randn(3, 4, dtype=torch.complex128, generator=generator) for _ in range(2)]
        self.weight.grad = self.gradients[0].clone()


@pytest.mark.parametrize(
    "gate",
    [None, Gate("direction", "model"), Gate("agreement", "model"), Gate("direction"), Gate(averaging=0, tolerance=0)],
    ids=repr,
)
def test_complex_coherence_is_the_real_part_of_the_product(gate: Gate | None) -> None:
    net = Phase()
    gradient, unit = net.weight.grad.clone(), net.weight.detach() / net.weight.detach().abs()
    companion = gradient + 0.25 * unit if gate is not None and gate.coherence == "direction" else unit
    products = (gradient.conj() * companion).real
    regularizer = CoherentRegularizer(net, strength=0.25, gate=gate, schedule=NOW, update="gradient")
    report = regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1))
    cosine = oracle.coherence(oracle.flatten([gradient]), oracle.flatten([companion]))
    if gate is None:
        opened = torch.ones(3, 4, dtype=torch.bool)
    else:
        assert float(report.coherence) == pytest.approx(cosine, abs=1e-12)
        opened = products >= 0 if gate.by_element else torch.full((3, 4), cosine >= (gate.threshold or 0))
    expected = torch.where(opened, gradient + 0.25 * unit, gradient)
    torch.testing.assert_close(net.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_complex_gradients_are_averaged_as_numbers() -> None:
    net = Phase()
    gate = Gate(averaging=0.5, tolerance=0.5)
    regularizer = CoherentRegularizer(net, strength=0.5, gate=gate, schedule=NOW, update="gradient")
    for gradient in net.gradients:
        net.weight.grad = gradient.clone()
        regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1))
    average, unit = net.gradients[0] / 3 + net.gradients[1] * 2 / 3, net.weight.detach().sgn()
    opened = ((average + 0.5 * 0.5 * unit).conj() * unit).real >= 0
    assert 0 < opened.double().mean() < 1
    expected = torch.where(opened, net.gradients[1] + 0.5 * unit, net.gradients[1])
    torch.testing.assert_close(net.weight.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update", ["proximal", "dual_averaging"])
def test_complex_weights_are_shortened(update: Any) -> None:
    net = Phase()
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    regularizer = CoherentRegularizer(net, strength=1.0, gate=None, update=update)
    regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    shortened = before / before.abs() * (before.abs() - 0.5).clamp_min(0)
    torch.testing.assert_close(net.weight.detach(), shortened, rtol=1e-12, atol=1e-12)
    assert (shortened == 0).any()


# --- 16 bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    pairwise_cases(
        {
            "gate": list(GATES),
            "penalty": list(SPECS),
            "update": UPDATES,
            "dtype": [torch.float16, torch.bfloat16],
            "chunk_size": [8, 1 << 18],
        }
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_sixteen_bit_weights_train(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss pulls where the penalty pulls, so that weights end smaller than by the loss alone."""
    monkeypatch.setattr(chunk_layout, "CPU_SIZE", case["chunk_size"])
    net = small_net().to(case["dtype"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(
        net, case["penalty"], strength=0.3, gate=GATES[case["gate"]], schedule=NOW, update=case["update"]
    )
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = parameter.detach() / 4
        report = regularizer.before_step(optimizer)
        optimizer.step()
        regularizer.after_step(optimizer)
    assert float(report.injected) > 0
    assert report.coherence.dtype == torch.float64
    assert all(parameter.dtype == case["dtype"] and parameter.isfinite().all() for parameter in net.parameters())
    alone = small_net().to(case["dtype"])[0].weight * 0.975 * 0.975
    assert net[0].weight.norm() < alone.norm()
    assert {average.dtype for average in regularizer.state_dict().get("averages", {}).values()} <= {torch.float32}


@pytest.mark.parametrize("scale", [65536.0, torch.tensor(65536.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("scope", ["model", "element"])
def test_a_half_precision_gradient_bears_the_usual_loss_scale(scope: Any, scale: float | Tensor) -> None:
    """65536, where ``GradScaler`` starts, is more than float16 holds; λ times it is not."""
    net = small_net().half()
    with torch.no_grad():
        net[0].weight[0, 0] = 0.0
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gate = Gate("agreement", scope, averaging=0)
    regularizer = CoherentRegularizer(net, strength=1e-3, gate=gate, schedule=NOW, update="gradient")
    regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1), scale)
    for name in WEIGHTS:
        parameter = net.get_parameter(name)
        expected = parameter.detach().sign().double() * 65.536
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-3, atol=0)


def test_a_small_strength_reaches_a_scaled_half_precision_gradient() -> None:
    """1e-8 is nothing in float16; with the loss scale on it, it is something."""
    net = small_net().half()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularizer = CoherentRegularizer(net, strength=1e-8, gate=None, update="gradient")
    regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1), 1024.0)
    assert (net[0].weight.grad != 0).all()


# --- memory layouts ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}


@pytest.mark.parametrize(
    "case",
    pairwise_cases(
        {
            "weight_layout": list(LAYOUTS),
            "gradient_layout": ["contiguous", "as the weight"],
            "gate": ["none", "agreement_parameter", "eased_averaged", "temporal_element"],
            "penalty": ["l1", "group_lasso"],
            "update": UPDATES,
            "chunk_size": [7, 40, 1 << 18],
            "joined": [False, True],
        }
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_memory_layout_does_not_matter(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    layout = LAYOUTS[case["weight_layout"]]
    for changed in (False, True):
        monkeypatch.setattr(chunk_layout, "CPU_SIZE", case["chunk_size"] if changed else 1 << 18)
        generator = torch.Generator().manual_seed(5)
        shapes = [(6, 4, 3, 3), (2, 3, 1, 2)] if case["joined"] else [(6, 4, 3, 3)]
        first = [torch.randn(shape, generator=generator) for shape in shapes]
        net = nn.ParameterList([nn.Parameter(layout(tensor) if changed else tensor) for tensor in first])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        regularizer = CoherentRegularizer(
            net,
            case["penalty"],
            strength=0.1,
            gate=GATES[case["gate"]],
            schedule=NOW,
            update=case["update"],
            include=["."],
        )
        for _ in range(3):
            for parameter in net:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = layout(gradient) if changed and case["gradient_layout"] != "contiguous" else gradient
            regularizer.before_step(optimizer)
            optimizer.step()
            regularizer.after_step(optimizer)
        results.append([parameter.detach() for parameter in net])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_stride=False)
