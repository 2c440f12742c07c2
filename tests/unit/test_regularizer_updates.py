"""How the penalty reaches the weights: proximal steps, and tensors that are not plain float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from reference import oracle
from reference.training import batches, loss_of, small_net
from torch import Tensor, nn

from lightning_gcsr import CoherentRegularizer

SPECS = {"l1": ("l1",), "l2": ("l2",), "elastic_net": ("elastic_net", 0.5), "group_lasso": ("group_lasso", 0)}
WEIGHTS = (0, 2, 4)


def proximal(net: nn.Module, penalty: str = "l1", strength: float = 0.1, **more: object) -> CoherentRegularizer:
    return CoherentRegularizer(net, penalty, strength=strength, coherence=None, update="proximal", **more)


def step_then_shrink(
    net: nn.Module, optimizer: torch.optim.Optimizer, regularizer: CoherentRegularizer
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after the optimizer's step and after the shrinkage."""
    optimizer.zero_grad()
    loss_of(net, batches(1)[0]).backward()
    regularizer.before_step(optimizer)
    optimizer.step()
    stepped = [net[i].weight.detach().clone() for i in WEIGHTS]
    regularizer.after_step(optimizer)
    return stepped, [net[i].weight.detach().clone() for i in WEIGHTS]


# --- proximal ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Callable, float]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.2), 0.2),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), 0.2),
    "dampening": (lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, dampening=0.5), 0.1),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True), 0.2),
    "dampening-without-momentum": (lambda p: torch.optim.SGD(p, lr=0.2, dampening=0.5), 0.2),
    "tensor-lr": (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.02, dtype=torch.float64), momentum=0.9), 0.2),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.05), 0.05),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1), 0.05),
    "adam-tensor-lr": (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05, dtype=torch.float64)), 0.05),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9), 0.05),
}


@pytest.mark.parametrize("penalty", list(SPECS))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_proximal_step_size_by_optimizer(optimizer: str, penalty: str) -> None:
    make, factor = OPTIMIZERS[optimizer]
    net = small_net()
    stepping = make(net.parameters())
    regularizer = proximal(net, penalty, strength=0.7)
    for _ in range(2):
        stepped, shrunk = step_then_shrink(net, stepping, regularizer)
        for before, after in zip(stepped, shrunk, strict=True):
            torch.testing.assert_close(after, oracle.prox(SPECS[penalty], before, factor * 0.7), rtol=1e-12, atol=1e-12)
            assert not torch.equal(before, after)


def test_proximal_step_follows_the_lr_of_each_group_and_its_schedule() -> None:
    net = small_net()
    groups = [{"params": net[0].parameters(), "lr": 0.5}, {"params": [*net[2].parameters(), *net[4].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    regularizer = proximal(net)
    for factor in (1.0, 0.5):
        stepped, shrunk = step_then_shrink(net, optimizer, regularizer)
        for before, after, lr in zip(stepped, shrunk, (0.5, 0.1, 0.1), strict=True):
            torch.testing.assert_close(after, oracle.prox(("l1",), before, factor * lr * 0.1), rtol=1e-12, atol=1e-12)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5


@pytest.mark.parametrize("penalty", ["l1", "elastic_net", "group_lasso"])
def test_proximal_gives_exact_zeros(penalty: str) -> None:
    net = small_net()
    _, shrunk = step_then_shrink(net, torch.optim.Adam(net.parameters(), lr=0.1), proximal(net, penalty, strength=5.0))
    zeros = [weight[weight == 0] for weight in shrunk]
    assert all(zero.numel() > 0 for zero in zeros)
    assert not any(zero.signbit().any() for zero in zeros)


def test_proximal_leaves_the_gradient_alone() -> None:
    net = small_net()
    loss_of(net, batches(1)[0]).backward()
    before = [parameter.grad.clone() for parameter in net.parameters()]
    proximal(net).before_step(torch.optim.SGD(net.parameters(), lr=0.1))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_gradient_update_leaves_the_weights_alone_after_the_step() -> None:
    net = small_net()
    regularizer = CoherentRegularizer(net, strength=0.1, coherence=None, update="gradient")
    stepped, after = step_then_shrink(net, torch.optim.SGD(net.parameters(), lr=0.1), regularizer)
    assert all(torch.equal(a, b) for a, b in zip(stepped, after, strict=True))


def test_after_step_shrinks_once() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = proximal(net)
    _, once = step_then_shrink(net, optimizer, regularizer)
    regularizer.after_step(optimizer)
    assert all(torch.equal(net[i].weight, weight) for i, weight in zip(WEIGHTS, once, strict=True))


def test_after_step_without_before_step_does_nothing() -> None:
    net = small_net()
    proximal(net).after_step(torch.optim.SGD(net.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), small_net().parameters(), strict=True))


def test_a_shrinkage_of_a_step_that_never_came_is_dropped() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = proximal(net, scope="model")
    loss_of(net, batches(1)[0]).backward()
    regularizer.before_step(optimizer)
    optimizer.zero_grad()
    for layer in (net[0],):
        layer.weight.grad = torch.zeros_like(layer.weight)
    regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    torch.testing.assert_close(net[0].weight.detach(), oracle.prox(("l1",), small_net()[0].weight.detach(), 0.01))
    assert torch.equal(net[2].weight, small_net()[2].weight)
    regularizer.before_step(optimizer)
    optimizer.zero_grad()
    regularizer.before_step(optimizer)
    before = net[0].weight.detach().clone()
    regularizer.after_step(optimizer)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
@pytest.mark.parametrize(("found_inf", "shrinks"), [(1.0, False), (0.0, True)])
def test_nothing_is_shrunk_where_a_fused_optimizer_skipped(found_inf: float, shrinks: bool, scope: str) -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, strength=0.1, coherence="agreement", scope=scope, update="proximal")
    for parameter in net.parameters():
        parameter.grad = parameter.detach().sign()
    assert float(regularizer.before_step(optimizer).injected) == 1
    optimizer.found_inf = torch.tensor(found_inf)
    regularizer.after_step(optimizer)
    unchanged = all(torch.equal(a, b) for a, b in zip(net.parameters(), small_net().parameters(), strict=True))
    assert unchanged is not shrinks


def test_loading_a_state_drops_the_pending_shrinkage() -> None:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = proximal(net)
    loss_of(net, batches(1)[0]).backward()
    regularizer.before_step(optimizer)
    regularizer.load_state_dict(regularizer.state_dict())
    regularizer.after_step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), small_net().parameters(), strict=True))


# --- sparse gradients ----------------------------------------------------------------------------------------------


def embedded(indices: list[int]) -> nn.Embedding:
    generator = torch.Generator().manual_seed(3)
    embedding = nn.Embedding(6, 3, sparse=True)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(6, 3, generator=generator))
    factors = torch.randn(len(indices), 3, generator=generator)
    (embedding(torch.tensor(indices)) * factors).sum().backward()
    return embedding


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
@pytest.mark.parametrize("measure", ["direction", "agreement", None])
@pytest.mark.parametrize("penalty", list(SPECS))
@pytest.mark.parametrize("indices", [[1, 4], [4, 1, 4, 4]], ids=["distinct", "repeated"])
def test_sparse_gradient_is_that_of_the_touched_rows(
    indices: list[int], penalty: str, measure: str | None, scope: str, update: str
) -> None:
    embedding = embedded(indices)
    before = embedding.weight.detach().clone()
    rows = sorted(set(indices))
    loss_gradient = embedding.weight.grad.to_dense()[rows]
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(embedding, penalty, strength=0.3, coherence=measure, scope=scope, update=update)
    report = regularizer.before_step(optimizer)
    threshold = 0.1 if measure == "direction" else 0.0
    step = oracle.regularized_step(
        SPECS[penalty], [before[rows]], [loss_gradient], None, [0.3], measure, scope, threshold
    )
    assert embedding.weight.grad.is_sparse
    assert float(report.injected) == pytest.approx(step.injected)
    if measure is not None:
        assert float(report.coherence) == pytest.approx(step.coherence, abs=1e-6)
    optimizer.step()
    stepped = embedding.weight.detach().clone()
    regularizer.after_step(optimizer)
    after = embedding.weight.detach()
    others = [row for row in range(6) if row not in rows]
    assert torch.equal(after[others], before[others])
    if update == "gradient":
        expected = before[rows].double() - 0.1 * step.gradients[0]
    else:
        expected = torch.where(step.gates[0], oracle.prox(SPECS[penalty], stepped[rows], 0.03), stepped[rows].double())
    torch.testing.assert_close(after[rows].double(), expected, rtol=1e-5, atol=1e-6)


def test_sparse_gradient_works_with_sparse_adam_and_loss_scale() -> None:
    gradients = []
    for scale in (1.0, 256.0):
        embedding = embedded([2, 2, 5])
        embedding.weight.grad *= scale
        optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
        CoherentRegularizer(embedding, strength=0.3, update="gradient").before_step(optimizer, scale)
        gradients.append(embedding.weight.grad.to_dense() / scale)
        optimizer.step()
    assert torch.equal(*gradients)


def test_a_non_finite_sparse_gradient_suppresses() -> None:
    embedding = embedded([1, 4])
    embedding.weight.grad = embedding.weight.grad.coalesce()
    embedding.weight.grad.values()[0, 0] = math.nan
    before = embedding.weight.grad.values().clone()
    regularizer = CoherentRegularizer(embedding, strength=0.3, coherence=None, update="gradient")
    report = regularizer.before_step(torch.optim.SGD(embedding.parameters(), lr=0.1))
    assert float(report.injected) == 0
    torch.testing.assert_close(embedding.weight.grad.values(), before, rtol=0, atol=0, equal_nan=True)


def test_temporal_with_a_sparse_gradient_is_an_error() -> None:
    embedding = embedded([1])
    regularizer = CoherentRegularizer(embedding, strength=0.1, coherence="temporal")
    with pytest.raises(ValueError, match=r"coherence='temporal' does not go with the sparse gradient of 'weight'.*Use"):
        regularizer.before_step(torch.optim.SGD(embedding.parameters(), lr=0.1))


# --- complex, 16 bits, layouts -------------------------------------------------------------------------------------


class Phase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128, generator=generator))
        self.weight.grad = torch.randn(3, 4, dtype=torch.complex128, generator=generator)


def test_complex_parameter_gets_the_unit_number() -> None:
    net = Phase()
    before, weight = net.weight.grad.clone(), net.weight.detach().clone()
    regularizer = CoherentRegularizer(net, strength=0.25, coherence=None, update="gradient")
    regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1))
    torch.testing.assert_close(net.weight.grad - before, 0.25 * weight / weight.abs(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["model", "element"])
@pytest.mark.parametrize("measure", ["direction", "agreement"])
def test_complex_coherence_is_the_real_part_of_the_product(measure: str, scope: str) -> None:
    net = Phase()
    gradient, sign = net.weight.grad.clone(), net.weight.detach().sgn()
    companion = gradient + 0.25 * sign if measure == "direction" else sign
    products = (gradient.conj() * companion).real
    regularizer = CoherentRegularizer(net, strength=0.25, coherence=measure, scope=scope, update="gradient")
    report = regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1))
    expected = oracle.coherence(oracle.flatten([gradient]), oracle.flatten([companion]))
    assert float(report.coherence) == pytest.approx(expected, abs=1e-12)
    if scope == "element":
        assert float(report.injected) == pytest.approx(float((products >= 0).double().mean()))
        injected = torch.where(products >= 0, gradient + 0.25 * sign, gradient)
        torch.testing.assert_close(net.weight.grad, injected, rtol=1e-12, atol=1e-12)


def test_complex_proximal_shortens_the_magnitude() -> None:
    net = Phase()
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    regularizer = proximal(net, strength=1.0)
    regularizer.before_step(optimizer)
    regularizer.after_step(optimizer)
    shortened = before / before.abs() * (before.abs() - 0.5).clamp_min(0)
    torch.testing.assert_close(net.weight.detach(), shortened, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
@pytest.mark.parametrize("measure", ["direction", "agreement", "temporal", None])
@pytest.mark.parametrize("penalty", list(SPECS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_parameters_train(
    dtype: torch.dtype, penalty: str, measure: str | None, scope: str, update: str
) -> None:
    net = small_net().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = CoherentRegularizer(net, penalty, strength=0.3, coherence=measure, scope=scope, update=update)
    opened = 0.0
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = parameter.detach() / 4
        report = regularizer.before_step(optimizer)
        optimizer.step()
        regularizer.after_step(optimizer)
        opened += float(report.injected)
    assert opened > 0
    assert report.coherence.dtype == torch.float64
    for parameter in net.parameters():
        assert parameter.dtype == dtype
        assert parameter.isfinite().all()
    plain = small_net().to(dtype)[0].weight * 0.975 * 0.975
    assert net[0].weight.norm() < plain.norm()


@pytest.mark.parametrize("scale", [65536.0, torch.tensor(65536.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("scope", ["model", "element"])
def test_a_half_precision_gradient_bears_the_usual_loss_scale(scope: str, scale: float | Tensor) -> None:
    """65536, where ``GradScaler`` starts, is more than float16 holds; λ times it is not."""
    net = small_net().half()
    with torch.no_grad():
        net[0].weight[0, 0] = 0.0
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularizer = CoherentRegularizer(net, strength=1e-3, coherence="agreement", scope=scope, update="gradient")
    regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1), scale)
    for i in WEIGHTS:
        expected = net[i].weight.detach().sign().double() * 65.536
        torch.testing.assert_close(net[i].weight.grad.double(), expected, rtol=1e-3, atol=0)


def test_a_small_strength_reaches_a_scaled_half_precision_gradient() -> None:
    """1e-8 is nothing in float16; with the loss scale on it, it is something."""
    net = small_net().half()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularizer = CoherentRegularizer(net, strength=1e-8, coherence=None, update="gradient")
    regularizer.before_step(torch.optim.SGD(net.parameters(), lr=0.1), 1024.0)
    assert (net[0].weight.grad != 0).all()


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("measure", ["direction", "agreement", "temporal", None])
def test_memory_layout_does_not_matter(measure: str | None, update: str) -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(5)
        net = nn.Conv2d(4, 6, 3)
        net.weight.data.copy_(torch.randn(net.weight.shape, generator=generator))
        net = net.to(memory_format=memory_format)
        optimizer = torch.optim.SGD([net.weight], lr=0.1)
        regularizer = CoherentRegularizer(net, "group_lasso", strength=0.1, coherence=measure, update=update)
        for _ in range(3):
            net.weight.grad = torch.randn(net.weight.shape, generator=generator).to(memory_format=memory_format)
            regularizer.before_step(optimizer)
            optimizer.step()
            regularizer.after_step(optimizer)
        results.append(net.weight.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
