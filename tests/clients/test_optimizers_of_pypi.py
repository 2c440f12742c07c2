"""Optimizers of other packages and the rarer ones of torch: the target is met, or they are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gcsr import CoherentRegularizer, Schedule

from .training import TARGET, Client, sparsity, train


def of(package: str, name: str, *arguments: Any, **options: Any) -> Any:
    """A function that makes an optimizer of a package that may be missing."""
    module = pytest.importorskip(package, reason=f"{package} is not installed")
    return lambda parameters: getattr(module, name)(parameters, *arguments, **options)


def wrapped(name: str) -> Any:
    """A function that makes a wrapper of pytorch-optimizer around AdamW."""
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    return lambda parameters: getattr(package, name)(torch.optim.AdamW(parameters, lr=5e-3))


TRAINING = {
    "Adafactor of torch": lambda: of("torch.optim", "Adafactor", lr=0.02),
    "Adafactor of pytorch-optimizer": lambda: of("pytorch_optimizer", "AdaFactor", lr=0.02, relative_step=False),
    "Adagrad": lambda: of("torch.optim", "Adagrad", lr=0.03),
    "RMSprop": lambda: of("torch.optim", "RMSprop", lr=2e-3),
    "Lion": lambda: of("pytorch_optimizer", "Lion", lr=5e-4),
    "LARS": lambda: of("pytorch_optimizer", "LARS", lr=1.0),
    "Prodigy": lambda: of("prodigyopt", "Prodigy", lr=1.0),
    "DAdaptAdam": lambda: of("dadaptation", "DAdaptAdam", lr=1.0),
    "Lookahead": lambda: wrapped("Lookahead"),
    "TRAC": lambda: wrapped("TRAC"),
    "OrthoGrad": lambda: wrapped("OrthoGrad"),
}


@pytest.mark.parametrize("optimizer", TRAINING)
def test_target_is_met_under_optimizers_of_other_packages(optimizer: str) -> None:
    callback = train(Client(TRAINING[optimizer]()))
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)


def test_target_is_met_under_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this version of torch has no Muon")
    callback = train(Client(of("torch.optim", "Muon", lr=5e-3)))
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)


@pytest.mark.filterwarnings("ignore")  # torchao's own, at its import
def test_target_is_met_under_eight_bit_adamw() -> None:
    make = of("torchao.optim", "AdamW8bit", lr=5e-3, block_size=64)
    net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 1))
    with torch.compiler.set_stance("force_eager"):  # compiling its step takes half a minute
        callback = train(model := Client(make, net), max_epochs=4)
    assert type(model.optimizers().state[net[0].weight]["exp_avg"]).__name__ == "OptimState8bit"
    assert sparsity(callback) == pytest.approx(TARGET, abs=0.01)


def test_sharpness_aware_steps_with_a_closure_make_zeros() -> None:
    """With the proximal update, for the default is refused; automatic optimization passes the closure."""
    make = of("pytorch_optimizer", "SAM", base_optimizer=torch.optim.SGD, lr=0.05, momentum=0.9)
    callback = train(Client(make), strength=0.05, update="proximal")
    assert 0.3 < sparsity(callback) < 1


class SharpnessAwareByHand(Client):
    """Calls the two halves of a step by hand, as the optimizer's own page shows it."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(self.loss(batch))
        optimizer.second_step(zero_grad=True)


def test_a_sharpness_aware_step_in_two_halves_says_that_nothing_is_regularized() -> None:
    make = of("pytorch_optimizer", "SAM", base_optimizer=torch.optim.SGD, lr=0.05)
    with pytest.warns(UserWarning, match=r"nothing was regularized.* Step SAM by `optimizer.step\(closure\)`"):
        callback = train(SharpnessAwareByHand(make), max_epochs=1, strength=0.05, update="proximal")
    assert sparsity(callback) == 0


REFUSED = {
    "AdamWScheduleFree": (lambda: of("schedulefree", "AdamWScheduleFree", lr=5e-3), "AdamWScheduleFree .*average of"),
    "ScheduleFreeAdamW": (lambda: of("pytorch_optimizer", "ScheduleFreeAdamW"), "ScheduleFreeAdamW .*average of"),
    "relative_step": (
        lambda: of("pytorch_optimizer", "AdaFactor", lr=1e-3, relative_step=True),
        "relative_step=True .* Use relative_step=False with a learning rate",
    ),
    "lr=None": (lambda: of("pytorch_optimizer", "AdaFactor", lr=None), "lr=None is not supported.*relative_step=False"),
    "SAM": (
        lambda: of("pytorch_optimizer", "SAM", base_optimizer=torch.optim.SGD, lr=0.05),
        "SAM with update='dual_averaging' is not supported: .* Use update='proximal'",
    ),
    "Rprop": (lambda: of("torch.optim", "Rprop"), "Rprop with update='dual_averaging' is not supported: its learning"),
    "LARS": (lambda: of("pytorch_optimizer", "LARS", lr=1.0), "LARS .* trust ratio .* Give target_sparsity in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_do_not_fit_are_refused_before_the_first_step(name: str) -> None:
    make, message = REFUSED[name]
    model = Client(make())
    before = [weight.detach().clone() for weight in model.parameters()]
    aim: dict[str, Any] = {"strength": 0.01} if name == "LARS" else {}
    with pytest.raises(MisconfigurationException, match=message):
        train(model, **aim)
    assert all(map(torch.equal, before, model.parameters()))
    # The loop without a Trainer refuses them by the same rule.
    regularizer = CoherentRegularizer(model, **(aim or {"target_sparsity": TARGET}))
    with pytest.raises(ValueError, match=message):
        regularizer.before_step(model.make_optimizer(model.parameters()))


# -- the step scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda: of("prodigyopt", "Prodigy", lr=1.0, d0=1e-4), 1e-4),
        (lambda: of("dadaptation", "DAdaptAdam", lr=1.0, d0=1e-4), 1e-4),
        (lambda: of("dadaptation", "DAdaptLion", lr=1.0, d0=1e-4), 1e-4),
        (lambda: of("torch.optim", "Adafactor", lr=0.01), 0.01 * 0.5),
        (lambda: of("pytorch_optimizer", "AdaFactor", lr=0.01, relative_step=False), 0.01 * 0.5),
        (lambda: of("pytorch_optimizer", "Lion", lr=0.01), 0.01),
    ],
    ids=["Prodigy", "DAdaptAdam", "DAdaptLion", "Adafactor of torch", "Adafactor of pytorch-optimizer", "Lion"],
)
def test_the_step_is_that_of_the_learning_rate_at_work(make: Any, rate: float) -> None:
    """Prodigy and its kin multiply ``lr`` by d, Adafactor by the root mean square of the weights, here 0.5."""
    weight = nn.Parameter(torch.full((4, 4), 0.5))
    optimizer = make()([weight])
    regularizer = CoherentRegularizer(
        nn.ParameterList([weight]), strength=0.1, schedule=Schedule(warmup=0), include=["."]
    )
    weight.grad = torch.full((4, 4), 2.0)
    regularizer.before_step(optimizer)
    assert regularizer.step_sizes(optimizer) == pytest.approx({"0": rate / 2.0})
    regularizer.after_step(optimizer, skipped=True)
