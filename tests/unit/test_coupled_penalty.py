"""The group lasso over coupled groups: its three maps, its gate, and what a step makes of them."""

from __future__ import annotations

import copy
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
    GroupSlice,
    Schedule,
    coupled_groups,
    shrink_units,
)
from lightning_gcsr.core import coupled_selection
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


def test_units_of_a_layer_become_zero_in_blocks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3))
    inputs, labels = torch.randn(64, 6), torch.randint(3, (64,))
    groups = coupled_groups(net, inputs)
    penalty = CoupledGroupLasso(groups, block_size=8)
    regularizer = CoherentRegularizer(net, penalty, target_sparsity=0.4)
    assert regularizer.penalty.groups == penalty.groups == CoupledGroupLasso(block_size=8).over(groups).groups
    assert str(penalty) == "CoupledGroupLasso(<5 groups>, block_size=8)"  # 8 + 8 + 4 units, and 8 + 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        regularizer.before_step(optimizer, clock=Clock(step, step / 200), report=False)
        optimizer.step()
        regularizer.after_step(optimizer)
    zero = [(layer.weight == 0).all(1).int() for layer in (net[0], net[2])]
    blocks = [block for units in zero for block in units.split(8)]
    assert all(int(block.sum()) in (0, len(block)) for block in blocks)
    assert sum(int(block.all()) for block in blocks) == 2


def test_few_blocks_do_not_become_zero_all_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=generator)
    labels = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 17), nn.ReLU(), nn.Linear(17, 3))
    penalty = CoupledGroupLasso(coupled_groups(net, inputs), block_size=8)
    regularizer = CoherentRegularizer(net, penalty, target_sparsity=0.2, schedule=Schedule(delay=0.2, stop=0.8))
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
    assert most <= 3 / 8  # two of eight are wanted
    assert regularizer.sparsity() == pytest.approx(0.2, abs=1 / 8)


def test_hidden_units_whose_values_and_gates_one_layer_computes_are_counted_once() -> None:
    net, inputs = nn.Sequential(nn.Linear(6, 64), nn.GLU(), nn.Linear(32, 3)), torch.randn(4, 6)
    blocks = CoupledGroupLasso(coupled_groups(net, inputs), block_size=8).groups
    assert len(blocks) == 4
    with torch.no_grad():
        for part in blocks[0].slices:
            net.get_parameter(part.name).index_fill_(part.dim, torch.tensor(part.indices), 0.0)
    assert shrink_units(net, inputs)[0][2].in_features == 24


def test_a_head_as_wide_as_a_block_stays_a_group_of_its_own() -> None:
    groups = coupled_groups(Transformer(), TOKENS)
    blocks = CoupledGroupLasso(groups, block_size=2).groups
    heads = {str(group) for group in groups if group.width > 1}
    assert heads
    assert heads < set(map(str, blocks))
    assert len(blocks) - len(heads) == (len(groups) - len(heads)) / 2


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
