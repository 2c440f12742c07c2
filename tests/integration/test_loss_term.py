"""Without a measure, the gradient update is the penalty as a term of the loss."""

import pytest
import torch
from torch import Tensor

from lightning_gcsr import L1, L2, ElasticNet, GradientCoherentRegularization, GroupLasso

from .models import (
    Regression,
    adam,
    fit,
    largest_difference,
    loader,
    momentum,
    same,
    scaled,
    sgd,
    weights_of,
)

STRENGTH = 0.05
PENALTIES = [L1(), L2(), ElasticNet(0.3), GroupLasso(), GroupLasso(dim=1)]


class PenalizedRegression(Regression):
    """The penalty as everybody writes it: a term of the loss. It counts once a step, since Lightning averages."""

    def __init__(self, penalty, **kwargs) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty

    def loss(self, batch: list[Tensor]) -> Tensor:
        weights = [parameter for parameter in self.net.parameters() if parameter.dim() > 1]
        return super().loss(batch) + STRENGTH * sum(self.penalty.value(weight) for weight in weights)


def both(tmp_path, penalty, make_optimizer=sgd, data=None, **kwargs):
    """The weights from the loss term and from the callback, and those without a penalty."""
    data = loader(count=32) if data is None else data
    penalized = PenalizedRegression(penalty, make_optimizer=make_optimizer)
    fit(tmp_path, penalized, data=data, **kwargs)
    model = Regression(make_optimizer=make_optimizer)
    callback = GradientCoherentRegularization(penalty, strength=STRENGTH, gate=None, update="gradient")
    fit(tmp_path, model, callback, data=data, **kwargs)
    free = Regression(make_optimizer=make_optimizer)
    fit(tmp_path, free, data=data, **kwargs)
    assert largest_difference(weights_of(free), weights_of(model)) > 1e-3
    return weights_of(penalized), weights_of(model)


@pytest.mark.parametrize("make_optimizer", [sgd, momentum])
def test_l1_without_a_gate_is_the_loss_term_exactly(tmp_path, make_optimizer):
    expected, actual = both(tmp_path, L1(), make_optimizer)
    assert same(expected, actual)


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_every_penalty_without_a_gate_is_the_loss_term(tmp_path, penalty, make_optimizer):
    expected, actual = both(tmp_path, penalty, make_optimizer)
    # Adam divides by the root of a second moment, which for a small gradient is as small as its rounding.
    assert largest_difference(expected, actual) < (1e-6 if make_optimizer is sgd else 1e-4)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_loss_term_counts_once_a_step_under_accumulation(tmp_path, penalty):
    expected, actual = both(tmp_path, penalty, accumulate_grad_batches=4, max_epochs=3)
    assert largest_difference(expected, actual) < 1e-6


@pytest.mark.parametrize("penalty", [L1(), L2(), GroupLasso()], ids=repr)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_penalty_is_clipped_with_the_gradient(tmp_path, penalty, algorithm, accumulate):
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    expected, actual = both(tmp_path, penalty, accumulate_grad_batches=accumulate, max_epochs=2, **clip)
    assert largest_difference(expected, actual) < 1e-6
    unclipped = Regression()
    callback = GradientCoherentRegularization(penalty, strength=STRENGTH, gate=None, update="gradient")
    fit(tmp_path, unclipped, callback, data=loader(count=32), accumulate_grad_batches=accumulate, max_epochs=2)
    assert largest_difference(weights_of(unclipped), actual) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_term_under_a_loss_scale(tmp_path, accumulate):
    results = []
    regularization = GradientCoherentRegularization(strength=STRENGTH, gate=None, update="gradient")
    for model, callback in ((PenalizedRegression(L1()), None), (Regression(), regularization)):
        fit(tmp_path, model, callback, plugins=[scaled(256.0)], accumulate_grad_batches=accumulate)
        results.append(weights_of(model))
    # The forward pass is in half precision, and both do the same one: only the rounding of the sums differs.
    assert largest_difference(*results) < 1e-4


def test_norm_clipping_sees_the_penalty(tmp_path):
    """With a vanishing loss gradient the step's length is the clip value: the penalty was in the norm."""
    model = Regression(factors=dict.fromkeys(range(8), 0.0))
    start = weights_of(model)
    callback = GradientCoherentRegularization("l1", strength=100.0, gate=None, update="gradient")
    fit(tmp_path, model, callback, gradient_clip_val=0.5, max_steps=1, max_epochs=-1)
    moved = torch.cat([(start[name] - weight).flatten() for name, weight in weights_of(model).items()])
    assert float(moved.norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)
