"""A penalty that is never imposed leaves no trace, and the Trainer trains as a plain loop does."""

import pytest
import torch
from torch import nn

from lightning_gcsr import CoherentRegularizer, Gate, GradientCoherentRegularization, Schedule

from .models import THIS_STEP, Regression, adam, fit, loader, mlp, momentum, same, sgd, steps_of, weights_of

NEVER_INJECTED = {
    "zero strength, by element": {"strength": 0.0},
    "zero strength, by model": {"strength": 0.0, "gate": Gate("direction", scope="model")},
    "zero strength, without a gate": {"strength": 0.0, "gate": None},
    "zero strength, temporal": {"strength": 0.0, "gate": Gate("temporal")},
    "zero strength, group lasso": {"strength": 0.0, "penalty": "group_lasso", "gate": None},
    "zero strength by name": {"strength": {"net": 0.0}},
    # A cosine of exactly 1 between gradient and penalty gradient does not occur here.
    "shut, by model": {"strength": 10.0, "gate": Gate(scope="model", threshold=1.0)},
    "shut, by parameter": {"strength": 10.0, "gate": Gate("temporal", scope="parameter", threshold=1.0)},
    "delayed beyond the end": {"strength": 10.0, "gate": None, "schedule": Schedule(delay=1000)},
}


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("make_optimizer", [momentum, adam])
@pytest.mark.parametrize("case", NEVER_INJECTED)
def test_penalty_that_is_never_imposed_leaves_weights_and_optimizer_bit_identical(
    tmp_path, case, make_optimizer, update
):
    without = Regression(make_optimizer=make_optimizer)
    bare = fit(tmp_path, without, max_epochs=2)

    with_callback = Regression(make_optimizer=make_optimizer)
    callback = GradientCoherentRegularization(**NEVER_INJECTED[case], update=update)
    trainer = fit(tmp_path, with_callback, callback, max_epochs=2)

    assert steps_of(callback) == 8
    assert same(weights_of(without), weights_of(with_callback))
    expected, actual = bare.optimizers[0].state_dict()["state"], trainer.optimizers[0].state_dict()["state"]
    assert expected.keys() == actual.keys()
    assert len(expected) == 4
    for index, state in expected.items():
        assert state.keys() == actual[index].keys()
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(actual[index][key])) for key in state)


def test_the_shut_gate_would_have_changed_the_weights_if_open(tmp_path):
    without, plain = Regression(), Regression()
    fit(tmp_path, without)
    fit(tmp_path, plain, GradientCoherentRegularization(strength=0.1, gate=Gate(scope="model", threshold=-1.0)))
    assert not same(weights_of(without), weights_of(plain))


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"penalty": "l1"},
        {"penalty": "l2", "gate": Gate("direction", scope="parameter")},
        {"penalty": "elastic_net", "gate": Gate("temporal", scope="model")},
        {"penalty": "group_lasso", "gate": None, "schedule": Schedule(delay=2, warmup=3, stop=7)},
        {"penalty": "l1", "strength_scale": "fan_in", "gate": Gate("temporal")},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_plain_torch_loop_gives_the_weights_of_the_trainer(tmp_path, arguments, update, make_optimizer):
    arguments = {"strength": 0.02, "update": update} | THIS_STEP | arguments
    model = Regression(make_optimizer=make_optimizer)
    start = weights_of(model.net)
    fit(tmp_path, model, GradientCoherentRegularization(**arguments), max_epochs=2)

    net = mlp()
    optimizer = make_optimizer(net.parameters())
    regularizer = CoherentRegularizer(net, **arguments)
    for _ in range(2):
        for inputs, targets in loader():
            optimizer.zero_grad()
            nn.functional.mse_loss(net(inputs), targets).backward()
            regularizer.before_step(optimizer)
            optimizer.step()
            regularizer.after_step(optimizer)

    assert same(weights_of(model.net), weights_of(net))
    assert not same(start, weights_of(net))
