"""The group lasso over coupled groups: its three maps, its gate, and what a step makes of them."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from reference.coupled import SlowCoupledGroupLasso
from torch import Tensor, nn

from lightning_gcsr import (
    Clock,
    CoherentRegularizer,
    CoupledGroupLasso,
    Gate,
    GradientCoherentRegularization,
    GroupSlice,
    Schedule,
    coupled_groups,
    shrink_units,
)
from lightning_gcsr.core import coupled_selection
from lightning_gcsr.core.group_blocks import GroupBlocks
from lightning_gcsr.core.group_slices import CoupledGroup
from lightning_gcsr.structured.output_tree import tensors_in
from tests.unit.test_shrink import IMAGES, Residual, Transformer

TOKENS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
NETWORKS = [(Residual, IMAGES), (Transformer, TOKENS)]


def taken(net: nn.Module, groups: Any) -> dict[str, Tensor]:
    """The parameters that make groups, by name."""
    names = set().union(*(group.made_by for group in groups))
    return {name: parameter for name, parameter in net.named_parameters() if name in names}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def outputs(net: nn.Module, inputs: Tensor) -> Tensor:
    """The logits, whatever the container that they come in."""
    [logits] = tensors_in(net(inputs))
    return logits.flatten(1)


@pytest.mark.parametrize(("network", "inputs"), NETWORKS)
def test_value_gradient_and_proximal_map_are_those_of_the_slow_version(network: Any, inputs: Tensor) -> None:
    net = network()
    groups = coupled_groups(net, inputs)
    net.double()
    slow = SlowCoupledGroupLasso(groups)
    named = taken(net, groups)
    with torch.no_grad():  # one group is zero, whose gradient is 0 too
        for name, index in slow.entries(named, groups[1]):
            named[name][index] = 0.0
    penalty, weight = CoupledGroupLasso(groups).laid_out(named), flat(named)
    assert torch.isclose(penalty.value(weight), slow.value(named), rtol=1e-12)
    assert torch.allclose(penalty.gradient(weight), flat(slow.gradient(named)), rtol=1e-10)
    norms = [float(slow.members(named, group).detach().square().mean().sqrt()) for group in groups]
    step = sorted(norms)[len(norms) // 2]
    shrunk = penalty.prox(weight, step)
    assert torch.allclose(shrunk, flat(slow.prox(named, [step] * len(groups))), rtol=1e-10)
    zeros = penalty.units(shrunk == 0)
    assert 0 < int(zeros.sum()) < len(groups)
    assert torch.equal(penalty.whole_units(shrunk == 0), penalty.group_mean((shrunk == 0).double()) > 1 - 1e-9)


@pytest.mark.parametrize("update", ["gradient", "proximal", "dual_averaging"])
@pytest.mark.parametrize("measure", ["agreement", "direction", "temporal"])
def test_a_step_decides_for_each_group_and_treats_it_as_one(update: Any, measure: Any) -> None:
    """One step of SGD, in the slow version group by group."""
    torch.manual_seed(1)
    net = Residual()
    groups = coupled_groups(net, IMAGES)
    net.double()
    named, slow = taken(net, groups), SlowCoupledGroupLasso(groups)
    strength = 5.0 if measure == "direction" else 0.5
    gate = Gate(measure, averaging=0, **({"tolerance": 0.1} if measure == "agreement" else {}))
    regularizer = CoherentRegularizer(
        net, CoupledGroupLasso(groups), strength=strength, gate=gate, update=update, schedule=Schedule(warmup=0)
    )
    optimizer = torch.optim.SGD(list(net.parameters())[::-1], lr=0.1)
    assert list(regularizer.parameters) == list(named)
    for step in range(2):
        optimizer.zero_grad()
        net(IMAGES.double()).square().sum().backward()
        for parameter in net.parameters():
            parameter.grad.mul_(0.02).add_(0.3 * torch.randn_like(parameter))
        gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
        thresholds = regularizer.state_dict().get("thresholds", {})
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        pulls = slow.gradient(before)
        report = regularizer.before_step(optimizer)
        injected = {name: parameter.grad - gradients[name] for name, parameter in named.items()}
        optimizer.step()
        regularizer.after_step(optimizer)
        if step == 0:
            first = gradients
    if measure == "agreement":
        is_open = slow.open(gradients, before, easing=0.1 * strength)
    else:
        other = first if measure == "temporal" else {n: gradients[n] + strength * pulls[n] for n in gradients}
        is_open = [bool(slow.members(gradients, g).dot(slow.members(other, g)) >= 0) for g in groups]
    assert 0 < sum(is_open) < len(groups)
    weights = sum(len(slow.members(before, group)) for group, opens in zip(groups, is_open, strict=True) if opens)
    assert float(report.injected_weights.sum()) == weights
    if update == "gradient":
        for group, opens in zip(groups, is_open, strict=True):
            expected = strength * slow.members(pulls, group) if opens else torch.zeros((), dtype=torch.float64)
            assert torch.allclose(slow.members(injected, group), expected, atol=1e-12)
    elif update == "proximal":
        stepped = {name: before[name] - 0.1 * gradients[name] for name in before}
        expected = slow.prox(stepped, [0.1 * strength * opens for opens in is_open])
        assert all(torch.allclose(named[name], expected[name], atol=1e-12) for name in named)
    else:
        state = regularizer.state_dict()
        for group, opens in zip(groups, is_open, strict=True):
            grown = slow.members(state["thresholds"], group) - slow.members(thresholds, group)
            assert torch.allclose(grown, torch.full_like(grown, 0.1 * strength * opens))
        steps = [float(slow.members(state["thresholds"], group)[0]) for group in groups]
        expected = slow.prox(state["latent_weights"], steps)
        assert all(torch.allclose(named[name], expected[name], atol=1e-12) for name in named)


@pytest.mark.parametrize(("network", "inputs"), NETWORKS)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_target_in_groups_is_met_and_the_groups_are_removed(
    network: Any, inputs: Tensor, optimizer_class: Any
) -> None:
    torch.manual_seed(0)
    net = network()
    groups = coupled_groups(net, inputs)
    regularizer = CoherentRegularizer(net, CoupledGroupLasso(groups), target_sparsity=0.5)
    lr = 0.02 if optimizer_class is torch.optim.SGD else 0.003
    optimizer = optimizer_class(net.parameters(), lr=lr)
    labels = torch.randint(2, (len(inputs),))
    for step in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs(net, inputs), labels).backward()
        regularizer.before_step(optimizer, clock=Clock(step, step / 300), report=False)
        optimizer.step()
        regularizer.after_step(optimizer)
    assert regularizer.sparsity() == pytest.approx(0.5, abs=1 / len(groups))
    zeros = regularizer.zero_groups()
    assert all(bool((parameter[zeros[name]] == 0).all()) for name, parameter in regularizer.parameters.items())
    net.eval()
    smaller, report = shrink_units(net, inputs)
    assert len(coupled_groups(smaller, inputs)) <= 0.5 * len(groups) + 1
    assert report.flops.after < 0.8 * report.flops.before
    assert torch.allclose(outputs(smaller, inputs), outputs(net, inputs), atol=1e-5)


def perceptron(*widths: int) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def ways_to_form_blocks(units: int, size: int) -> list[list[tuple[int, ...]]]:
    """Every way to divide units, a multiple of the size, into blocks."""
    if not units:
        return [[]]

    def divided(left: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
        if not left:
            return [[]]
        blocks = [(left[0], *others) for others in itertools.combinations(left[1:], size - 1)]
        return [[b, *rest] for b in blocks for rest in divided(tuple(u for u in left if u not in b))]

    return divided(tuple(range(units)))


def test_blocks_are_those_of_the_smallest_penalty() -> None:
    """Value and proximal map against all ways to form blocks, where widths are multiples; the gradient by autograd."""
    torch.manual_seed(0)
    net = perceptron(3, 6, 4, 2)
    groups = coupled_groups(net, torch.randn(2, 3))
    net.double()
    named, slow = taken(net, groups), SlowCoupledGroupLasso(groups)
    penalty, weight = CoupledGroupLasso(groups, block_size=2).laid_out(named), flat(named)
    step = 0.3
    least_value = least_objective = 0.0
    for layer in (groups[:6], groups[6:]):
        norms = [float(slow.members(named, group).detach().norm()) for group in layer]
        factor = slow.factor(named, layer[0])
        values, objectives = [], []
        for blocks in ways_to_form_blocks(len(layer), 2):
            of_blocks = [math.hypot(*(norms[unit] for unit in block)) for block in blocks]
            values.append(sum(factor * 2**0.5 * norm for norm in of_blocks))
            threshold = step * factor * 2**0.5
            left = [max(0.0, norm - threshold) for norm in of_blocks]
            objectives.append(
                sum((norm - kept) ** 2 / 2 + threshold * kept for norm, kept in zip(of_blocks, left, strict=True))
            )
        least_value, least_objective = least_value + min(values), least_objective + min(objectives)
    assert float(penalty.value(weight)) == pytest.approx(least_value, rel=1e-12)
    shrunk = penalty.prox(weight, step)
    assert 0 < int(penalty.units(shrunk == 0).sum()) < len(groups)
    objective = (shrunk - weight).square().sum() / 2 + step * penalty.value(shrunk)
    assert float(objective) == pytest.approx(least_objective, rel=1e-12)
    leaf = weight.clone().requires_grad_()
    assert torch.allclose(penalty.gradient(weight), torch.autograd.grad(penalty.value(leaf), leaf)[0], rtol=1e-10)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_units_of_a_layer_become_zero_in_blocks_wherever_they_are(optimizer_class: Any) -> None:
    torch.manual_seed(0)
    net = perceptron(6, 20, 16, 3)
    inputs, labels = torch.randn(64, 6), torch.randint(3, (64,))
    penalty = CoupledGroupLasso(coupled_groups(net, inputs), block_size=8)
    regularizer = CoherentRegularizer(net, penalty, target_sparsity=0.4)
    assert str(penalty) == "CoupledGroupLasso(<36 groups>, block_size=8)"
    optimizer = optimizer_class(net.parameters(), lr=0.1 if optimizer_class is torch.optim.SGD else 0.01)
    widths = set()
    for step in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        regularizer.before_step(optimizer, clock=Clock(step, step / 300), report=False)
        optimizer.step()
        regularizer.after_step(optimizer)
        widths |= {tuple(int((layer.weight != 0).any(1).sum()) for layer in (net[0], net[2]))}
    assert {left for left, _ in widths} <= {20, 16, 8}  # the four weakest of 20 go first
    assert {right for _, right in widths} <= {16, 8}
    assert regularizer.sparsity() == pytest.approx(0.4, abs=8 / 36)
    zero = (net[2].weight == 0).all(1) if (net[2].weight == 0).all(1).any() else (net[0].weight == 0).all(1)
    assert len({int(unit) // 8 for unit in zero.nonzero()}) > 1  # which are no neighbours in the layer


def test_blocks_that_are_zero_stay_zero_once_the_target_is_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 10, generator=generator)
    labels = (inputs @ torch.randn(10, 4, generator=generator)).argmax(1)
    torch.manual_seed(1)
    net = perceptron(10, 24, 24, 4)
    penalty = CoupledGroupLasso(coupled_groups(net, inputs), block_size=8)
    regularizer = CoherentRegularizer(net, penalty, target_sparsity=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsities = []
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 250)
        batch = torch.randint(512, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
        regularizer.before_step(optimizer, clock=Clock(step, step / 250), report=False)
        optimizer.step()
        regularizer.after_step(optimizer)
        sparsities.append(regularizer.sparsity())
    assert set(sparsities[-50:]) == {0.5}


@pytest.mark.parametrize("everywhere", [True, False])
def test_blocks_of_replaced_weights_are_as_they_were_left(everywhere: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    torch.manual_seed(0)
    net = perceptron(6, 24, 16, 3)
    penalty = CoupledGroupLasso(coupled_groups(net, inputs), block_size=8)
    regularizer = CoherentRegularizer(net, penalty, strength=0.01, schedule=Schedule(warmup=0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step(number: int) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        regularizer.before_step(optimizer, clock=Clock(number), report=False)
        optimizer.step()
        regularizer.after_step(optimizer)

    for number in range(100):
        step(number)
    optimizer.param_groups[0]["lr"] = 0.0
    assert 0 < regularizer.sparsity() < 1
    with torch.no_grad():
        for weight in [net[0].weight, net[0].bias, net[2].weight] if everywhere else [net[0].weight[0, 0]]:
            weight.mul_(0.999)
    as_left = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    step(100)
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter, as_left[name], rtol=1e-5, atol=1e-7), name


def test_few_blocks_do_not_become_zero_all_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=generator)
    labels = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3))
    penalty = CoupledGroupLasso(coupled_groups(net, inputs), block_size=8)
    regularizer = CoherentRegularizer(net, penalty, target_sparsity=0.28, schedule=Schedule(delay=0.2, stop=0.8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    most = 0.0
    for step in range(400):
        batch = slice(step % 4 * 16, step % 4 * 16 + 16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
        regularizer.before_step(optimizer, clock=Clock(step, step / 400), report=False)
        optimizer.step()
        regularizer.after_step(optimizer)
        most = max(most, regularizer.sparsity())
    assert most <= 3 / 7  # two of seven blocks are wanted
    assert regularizer.sparsity() == pytest.approx(2 / 7, abs=1 / 7)


def test_blocks_count_what_is_removed() -> None:
    """Hidden units whose values and gates one layer computes count once; a head as wide as a block is one alone."""
    net, inputs = nn.Sequential(nn.Linear(6, 64), nn.GLU(), nn.Linear(32, 3)), torch.randn(4, 6)
    gated = GroupBlocks.of(coupled_groups(net, inputs), 8)
    assert gated.lengths.tolist() == [8, 8, 8, 8]
    groups = coupled_groups(Transformer(), TOKENS)
    blocks = GroupBlocks.of(groups, 2)
    heads = torch.tensor([group.width > 1 for group in groups])
    sizes = blocks.lengths[blocks.block_of_place]
    order = blocks.order(torch.arange(float(len(groups))))
    assert bool(heads.any())
    assert torch.equal(sizes == 1, heads[order])
    assert blocks.largest == CoupledGroupLasso(groups, block_size=2).at_once == 2


def test_patterns_choose_whole_groups() -> None:
    net = Residual()
    penalty = CoupledGroupLasso(coupled_groups(net, IMAGES))
    chosen = CoherentRegularizer(net, penalty, strength=1.0, include=[r"^side\.weight"])
    assert list(chosen.parameters) == ["side.weight", "side.bias"]
    assert len(chosen.penalty.groups) == 4
    left = CoherentRegularizer(net, penalty, strength=1.0, exclude=["norm.bias"])
    assert list(left.parameters) == ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", *chosen.parameters]

    class Firm(CoupledGroupLasso):
        """Keeps its class, whatever groups are chosen."""

    firm = CoherentRegularizer(net, Firm(penalty.groups), strength=1.0, exclude=["norm.bias"]).penalty
    assert isinstance(firm, Firm)
    assert len(firm.groups) < 18
    with pytest.raises(ValueError, match="each of the 18 coupled groups has a part that"):
        CoherentRegularizer(net, penalty, strength=1.0, exclude=["bias"])


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    net = Residual()
    penalty = CoupledGroupLasso(coupled_groups(net, IMAGES))
    with pytest.raises(ValueError, match=r"`groups` must not be empty, got groups=\[\]"):
        CoupledGroupLasso([])
    with pytest.raises(ValueError, match="`block_size` must be an integer of at least 1, got block_size=0"):
        CoupledGroupLasso(block_size=0)
    with pytest.raises(ValueError, match=r"`groups` must be given to CoupledGroupLasso\(\)"):
        CoherentRegularizer(net, CoupledGroupLasso(), strength=1.0)
    with pytest.raises(ValueError, match=r"must be those of the module, which has no parameter 'body.0.bias'"):
        CoherentRegularizer(nn.Sequential(nn.Linear(2, 2)), penalty, strength=1.0)
    with pytest.raises(ValueError, match=r"`strength` must be one number with CoupledGroupLasso\(<18 groups>\)"):
        CoherentRegularizer(net, penalty, strength={"stem": 1.0})
    with pytest.raises(ValueError, match=r"`strength_scale` must be 'uniform' with CoupledGroupLasso"):
        CoherentRegularizer(net, penalty, strength=1.0, strength_scale="fan_in")
    with pytest.raises(ValueError, match=r"`strength_scale` must be 'uniform' with CoupledGroupLasso"):
        GradientCoherentRegularization(CoupledGroupLasso(), strength=1.0, strength_scale="fan_in")  # before fit
    with pytest.raises(ValueError, match=r"lie in several tensors. Lay these out first"):
        penalty.value(net.stem.weight)
    smaller = copy.deepcopy(net)
    smaller.side.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"'side.weight' must have the shape .*, got \(2, 2\)"):
        CoherentRegularizer(smaller, penalty, strength=1.0)
    whole = CoupledGroup((GroupSlice("side.weight", 0, (0,), "makes"),))
    with pytest.raises(ValueError, match=r"'side.weight' makes units of coupled groups and is not among those"):
        CoupledGroupLasso([whole]).laid_out({"stem.weight": net.stem.weight})
    regularizer = CoherentRegularizer(net, penalty, strength=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(IMAGES).sum().backward()
    net.side.bias.grad = None
    with pytest.raises(ValueError, match=r"in each step of one optimizer, and 'side.bias' has none"):
        regularizer.before_step(optimizer)
    net.side.bias.grad = torch.ones(4)
    rest = [parameter for parameter in net.parameters() if parameter is not net.side.bias]
    slower = torch.optim.SGD([{"params": rest}, {"params": [net.side.bias], "lr": 0.01}], lr=0.1)
    with pytest.raises(ValueError, match=r"one learning rate .* lr=0.1 for 'stem.weight' and lr=0.01 for 'side.bias'"):
        regularizer.before_step(slower)
    net.side.bias.data = net.side.bias.data.double()
    net.side.bias.grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"one device and dense gradients, got torch.float32 on cpu"):
        regularizer.before_step(optimizer)
    with pytest.raises(ValueError, match=r"one device and dense gradients, got torch.float32 on cpu"):
        CoherentRegularizer(net, penalty, strength=1.0)


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Residual()
    groups = coupled_groups(net, IMAGES)
    monkeypatch.setattr(coupled_selection, "is_sharded", lambda parameter: parameter is net.norm.weight)
    with pytest.raises(ValueError, match=r"'norm.weight', which is sharded: .* Use DDP, which keeps weights whole"):
        CoherentRegularizer(net, CoupledGroupLasso(groups), strength=1.0)
