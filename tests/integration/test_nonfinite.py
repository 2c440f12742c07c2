"""A gradient that is not finite never reaches a weight through the package, and training goes on."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_gcsr import Gate, GradientCoherentRegularization, Schedule

from .models import THIS_STEP, MemoryLogger, Regression, Snapshots, fit, loader, same, weights_of

DECISIONS = [
    {"gate": Gate("direction", scope="model", threshold=-1.0)},
    {"gate": Gate("agreement", scope="parameter")},
    {**THIS_STEP, "gate": Gate("agreement", scope="element")},
    {"gate": Gate(averaging=0.9, tolerance=0.1), "schedule": Schedule(warmup=0)},
    {"gate": Gate("temporal", scope="model")},
    {"gate": Gate("temporal", scope="element")},
    {"gate": None},
]


class OneSpoiltBatch(Regression):
    """One batch whose gradient is spoilt in a single weight; as careful people do, it then takes no step of the loss.

    The callbacks come before the module here, so ours has met the spoilt gradient.
    """

    def __init__(self, spoilt_step: int | None = None, value: float = float("nan")) -> None:
        super().__init__()
        self.spoilt_step, self.value = spoilt_step, value

    def backward(self, loss):
        super().backward(loss)
        if self.training_steps - 1 == self.spoilt_step:
            self.net[2].weight.grad[0, 0] = self.value

    def on_before_optimizer_step(self, optimizer):
        if self.training_steps - 1 == self.spoilt_step:
            assert not self.net[2].weight.grad.isfinite().all()
            self.zero_grad(set_to_none=False)
            for parameter in self.parameters():
                parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("decision", DECISIONS, ids=lambda decision: "-".join(map(str, decision.values())))
def test_spoilt_batch_adds_nothing_is_counted_and_training_goes_on(tmp_path, decision, update, value):
    logger, snapshots = MemoryLogger(), Snapshots()
    model = OneSpoiltBatch(spoilt_step=2, value=value)
    callback = GradientCoherentRegularization(strength=0.05, update=update, name="mine", **decision)
    data = loader(count=20)
    with pytest.warns(UserWarning, match=r"mine: until step 2 .* not finite in 1 step.*mine/nonfinite_steps") as caught:
        fit(tmp_path, model, [callback, snapshots], data, logger=logger)
    assert len([warning for warning in caught if "not finite" in str(warning.message)]) == 1
    assert logger.values("mine/nonfinite_steps") == [0, 0, 1, 1, 1]
    assert logger.values("mine/injected")[2] == 0
    assert same(snapshots.weights[1], snapshots.weights[2])

    # From there on it is the run that never met the batch, so nothing of it stayed behind.
    spared = OneSpoiltBatch()
    callback = GradientCoherentRegularization(strength=0.05, update=update, **decision)
    good = Subset(data.dataset, [i for i in range(20) if not 8 <= i < 12])
    fit(tmp_path, spared, callback, DataLoader(good, batch_size=4))
    assert same(weights_of(spared), weights_of(model))
    assert not same(snapshots.weights[2], snapshots.weights[3])


def test_gradients_of_the_other_parameters_get_no_penalty_either(tmp_path):
    """A NaN in one tensor shuts the gate of all: the step belongs to nobody."""
    model = OneSpoiltBatch(spoilt_step=0)
    gradients = {}
    plain = Regression()
    fit(tmp_path, plain, max_steps=1, max_epochs=-1)
    model.on_before_optimizer_step = lambda optimizer: gradients.update(
        {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    )
    callback = GradientCoherentRegularization(strength=10.0, gate=None, update="gradient")
    with pytest.warns(UserWarning, match="not finite"):
        fit(tmp_path, model, callback, max_steps=1, max_epochs=-1)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert torch.equal(gradients["net.0.weight"], expected["net.0.weight"])
    assert torch.equal(gradients["net.2.weight"][0, 1:], expected["net.2.weight"][0, 1:])


def test_finite_run_counts_none_and_does_not_warn(tmp_path):
    logger = MemoryLogger()
    fit(tmp_path, Regression(), GradientCoherentRegularization(strength=0.05), logger=logger)
    assert logger.values("gcsr/nonfinite_steps") == [0, 0, 0, 0]
