"""The regularizer in a loop of Lightning Fabric."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn

from lightning_gcsr import Clock, CoherentRegularizer, Gate, GradientCoherentRegularization, Schedule, Sparsity

from .models import (
    THIS_STEP,
    Elementwise,
    Regression,
    adam,
    fit,
    largest_difference,
    loader,
    mlp,
    momentum,
    same,
    sgd,
    weights_of,
)

UPDATES = pytest.mark.parametrize("update", ["gradient", "proximal"])
SETTINGS = [
    {},
    {"gate": Gate("direction", scope="model", threshold=0.9)},
    {"penalty": "group_lasso", "gate": Gate("temporal", scope="parameter")},
    {"gate": None, "schedule": Schedule(delay=2, warmup=3)},
]


def by_setting(setting):
    return str(setting.get("coherence", "default"))


def fabric_with(precision="32-true", **kwargs):
    return Fabric(accelerator="cpu", devices=1, precision=precision, **kwargs)


def train(fabric, net, make_optimizer, regularized="module", optimized="wrapped", epochs=2, data=None, **arguments):
    """Train with Fabric; the regularizer gets the ``module`` or what ``wrapped`` it, likewise the optimizer."""
    model, optimizer = fabric.setup(net, make_optimizer(net.parameters()))
    batches = fabric.setup_dataloaders(loader() if data is None else data)
    regularizer = CoherentRegularizer(model if regularized == "wrapped" else net, **({"strength": 0.05} | arguments))
    stepped = optimizer if optimized == "wrapped" else optimizer.optimizer
    for epoch in range(epochs):
        for index, (inputs, targets) in enumerate(batches):
            optimizer.zero_grad()
            fabric.backward(nn.functional.mse_loss(model(inputs), targets))
            step = epoch * len(batches) + index
            regularizer.before_step(stepped, clock=Clock(step, step / (epochs * len(batches))))
            optimizer.step()
            regularizer.after_step(stepped)
    return regularizer


def trained(tmp_path, make_optimizer, precision="32-true", data=None, **arguments):
    model = Regression(make_optimizer=make_optimizer)
    callback = GradientCoherentRegularization(**({"strength": 0.05} | arguments))
    fit(tmp_path, model, callback, data, max_epochs=2, precision=precision)
    return weights_of(model.net)


@UPDATES
@pytest.mark.parametrize("setting", SETTINGS, ids=by_setting)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make_optimizer", [momentum, adam])
def test_fabric_gives_the_weights_of_the_trainer(tmp_path, make_optimizer, precision, setting, update):
    expected = trained(tmp_path, make_optimizer, precision, update=update, **setting)
    net = mlp()
    regularizer = train(fabric_with(precision), net, make_optimizer, update=update, **setting)
    assert regularizer.state_dict()["steps"] == {"0.weight": 8}
    assert same(weights_of(net), expected)
    assert not same(weights_of(net), weights_of(mlp()))


@UPDATES
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions_of_fabric(tmp_path, precision, update):
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    expected = trained(tmp_path, momentum, precision, loader(dtype=dtype), update=update)
    net = mlp()
    train(fabric_with(precision), net, momentum, data=loader(dtype=dtype), update=update)
    assert net[0].weight.dtype == dtype
    # Fabric hands the outputs over in single precision.
    assert largest_difference(weights_of(net), expected) < (1e-5 if precision == "64-true" else 1e-12)


@UPDATES
@pytest.mark.parametrize("regularized", ["module", "wrapped"])
@pytest.mark.parametrize("optimized", ["wrapped", "inner"])
def test_wrapped_and_inner_objects_give_the_same_weights(tmp_path, regularized, optimized, update):
    net = mlp()
    train(fabric_with(), net, momentum, regularized, optimized, update=update)
    assert same(weights_of(net), trained(tmp_path, momentum, update=update))


@pytest.mark.parametrize(("before", "after"), [("wrapped", "inner"), ("inner", "wrapped")])
def test_wrapper_and_what_it_wraps_are_one_optimizer(before, after):
    """Measured before the step with one, shrunk after it with the other."""
    fabric, net = fabric_with(), mlp()
    model, optimizer = fabric.setup(net, sgd(net.parameters()))
    regularizer = CoherentRegularizer(net, strength=0.5, gate=None, update="proximal")
    objects = {"wrapped": optimizer, "inner": optimizer.optimizer}
    fabric.backward(model(torch.ones(2, 4)).sum() * 0)
    start = weights_of(net)["0.weight"]
    regularizer.before_step(objects[before])
    optimizer.step()
    regularizer.after_step(objects[after])
    expected = start.sign() * (start.abs() - 0.05).clamp_min(0)
    torch.testing.assert_close(net[0].weight.detach(), expected)


def test_names_are_those_that_the_user_gave():
    """Fabric's wrapper adds ``_forward_module.``, which no pattern of a user expects."""
    fabric, net = fabric_with(), mlp()
    model = fabric.setup(net)
    assert list(CoherentRegularizer(model, strength=0.1).parameters) == ["0.weight", "2.weight"]
    anchored = CoherentRegularizer(model, strength={r"^0\.": 0.1}, include=[r"^0\.weight$"])
    assert list(anchored.parameters) == ["0.weight"]


def test_wrapped_module_is_selected_as_the_module_is():
    fabric, net = fabric_with(), nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    inside, outside = CoherentRegularizer(net, strength=0.1), CoherentRegularizer(fabric.setup(net), strength=0.1)
    assert [id(p) for p in outside.parameters.values()] == [id(p) for p in inside.parameters.values()]
    sparsity = Sparsity()
    with torch.no_grad():
        net[0].weight.zero_()
    sparsity.update(fabric.setup(nn.Sequential(*net)))
    assert float(sparsity.compute()) == pytest.approx(12 / 15)


def test_state_moves_between_a_wrapped_and_a_plain_module():
    """A run with Fabric is resumed without it: the steps were counted under the same name."""
    fabric, net = fabric_with(), mlp()
    arguments = {"gate": None, "schedule": Schedule(delay=8)}
    state = train(fabric, net, sgd, regularized="wrapped", **arguments).state_dict()
    plain = CoherentRegularizer(net, strength=0.05, **arguments)
    plain.load_state_dict(state)
    optimizer = sgd(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    report = plain.before_step(optimizer)
    assert float(report.strength) == pytest.approx(0.05)
    assert plain.collapsed() == {}


@pytest.mark.parametrize("optimized", ["wrapped", "inner"])
def test_optimizers_that_are_refused_are_refused_in_fabric(optimized):
    net = mlp()
    _, optimizer = fabric_with().setup(net, torch.optim.LBFGS(net.parameters()))
    regularizer = CoherentRegularizer(net, strength=0.1)
    with pytest.raises(ValueError, match="LBFGS is not supported"):
        regularizer.before_step(optimizer if optimized == "wrapped" else optimizer.optimizer)
    other = mlp()
    _, optimizer = fabric_with().setup(other, torch.optim.SGD(other.parameters(), lr=0.1, maximize=True))
    with pytest.raises(ValueError, match="maximize=True"):
        CoherentRegularizer(other, strength=0.1).before_step(optimizer)


def test_fabric_loads_a_state_with_its_checkpoint(tmp_path):
    """``fabric.save`` takes the regularizer's state along."""
    fabric, net = fabric_with(), mlp()
    regularizer = train(fabric, net, sgd, gate=None, schedule=Schedule(delay=3))
    fabric.save(tmp_path / "saved.ckpt", {"model": net, "regularizer": regularizer.state_dict()})
    state = fabric.load(tmp_path / "saved.ckpt")
    resumed = CoherentRegularizer(mlp(seed=1), strength=0.05, gate=None, schedule=Schedule(delay=3))
    resumed.load_state_dict(state["regularizer"])
    torch.testing.assert_close(resumed.state_dict(), regularizer.state_dict(), rtol=0, atol=0)
    assert resumed.state_dict()["latent_weights"].keys() == {"0.weight", "2.weight"}


@UPDATES
@pytest.mark.parametrize("overflow_at", [None, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_scale_of_fabric(tmp_path, overflow_at, fused, update):
    """The scaler of Fabric's precision tells the scale; a step that it skips leaves the weights as they are."""

    def run(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        net = Elementwise()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05, fused=fused)
        model, optimizer = fabric.setup(net, optimizer)
        regularizer = CoherentRegularizer(net, strength=0.05, update=update, **THIS_STEP)
        weights = []
        for index, (inputs, targets) in enumerate(loader(count=32)):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            fabric.backward(loss * (float("inf") if index == overflow_at else 1.0))
            report = regularizer.before_step(optimizer, loss_scale=scaler.get_scale())
            optimizer.step()
            if bool(report.finite):
                regularizer.after_step(optimizer)
            weights.append(weights_of(net))
        return weights

    scaled = run(1024.0)
    if overflow_at is None:
        assert same(scaled[-1], run(1.0)[-1])
    else:
        assert same(scaled[0], scaled[1])
    assert not same(scaled[1], scaled[2])
