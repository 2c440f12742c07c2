"""Every precision of the Trainer: decisions are made, sums are wide enough, and zeros are exact."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_gcsr import Gate, GradientCoherentRegularization

from .models import (
    THIS_STEP,
    MemoryLogger,
    Regression,
    fit,
    gate_of,
    loader,
    sgd,
    steps_of,
    weights_of,
)

PRECISIONS = ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"]
DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
TOLERANCES = {"32-true": 0.0, "64-true": 1e-5, "bf16-mixed": 0.05, "bf16-true": 0.05, "16-true": 0.01}
"""How far a coherence may be from that in single precision."""


def wide_adam(parameters):
    """Adam with an epsilon that is not zero in half precision."""
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-3)


def data(precision, count=32):
    return loader(count=count, dtype=DTYPES.get(precision, torch.float32))


def trained(tmp_path, precision, callback, make_optimizer=sgd, **kwargs):
    model, logger = Regression(make_optimizer=make_optimizer), MemoryLogger()
    trainer = fit(tmp_path, model, callback, data(precision), precision=precision, logger=logger, **kwargs)
    return model, logger, trainer


@pytest.mark.parametrize("make_optimizer", [sgd, wide_adam])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_proximal_gives_exact_zeros_and_finite_weights(tmp_path, precision, make_optimizer):
    strength = 0.3 if make_optimizer is sgd else 0.1
    callback = GradientCoherentRegularization(strength=strength, update="proximal", **THIS_STEP)
    model, logger, trainer = trained(tmp_path, precision, callback, make_optimizer, max_epochs=3)

    assert steps_of(callback) == trainer.global_step == 24
    assert all(weight.dtype == DTYPES.get(precision, torch.float32) for weight in model.parameters())
    assert all(weight.isfinite().all() for weight in model.parameters())
    zeros = [int((layer.weight == 0).sum()) for layer in (model.net[0], model.net[2])]
    assert 0 < sum(zeros) < 40
    # A weight whose gate is open and that is smaller than a step ends at zero: −0 would be a tiny weight's sign.
    assert not any(torch.signbit(weight[weight == 0]).any() for weight in weights_of(model).values())
    injected = logger.values("gcsr/injected")
    assert len(injected) == 24
    assert all(0 < share < 1 for share in injected)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_decisions_are_those_of_single_precision(tmp_path, precision, update):
    """A threshold between the coherences of the steps, so that the gate both opens and shuts."""

    def run(precision):
        callback = GradientCoherentRegularization(
            strength=0.3, gate=Gate("direction", scope="model", threshold=0.6), update=update, log_per_parameter=True
        )
        model, logger, _ = trained(tmp_path, precision, callback)
        return model, logger

    single_model, single = run("32-true")
    model, logger = run(precision)
    injected = logger.values("gcsr/injected")
    assert 0 < sum(injected) < len(injected) == 8
    assert injected == single.values("gcsr/injected")
    for key in ("gcsr/coherence", "gcsr/coherence/net.0.weight", "gcsr/coherence/net.2.weight"):
        assert logger.values(key) == pytest.approx(single.values(key), rel=0, abs=TOLERANCES[precision])
        assert all(-1.0 <= value <= 1.0 for value in logger.values(key))
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight.float(), weights_of(single_model)[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradient_update_shrinks_the_weights(tmp_path, precision):
    norms = []
    for strength in (0.0, 0.2):
        callback = GradientCoherentRegularization(strength=strength, update="gradient", **THIS_STEP)
        model, _, _ = trained(tmp_path, precision, callback, max_epochs=3)
        assert all(weight.isfinite().all() for weight in model.parameters())
        norms.append(float(model.net[0].weight.detach().double().abs().sum()))
    assert norms[1] < 0.9 * norms[0]


class Gradients(Regression):
    """Keeps the weights and the loss gradients of every step as they were before any callback saw them."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.kept = []

    def backward(self, loss):
        super().backward(loss)
        layers = [self.net[0].weight, self.net[2].weight]
        weights = torch.cat([layer.detach().double().flatten() for layer in layers])
        self.kept.append((weights, torch.cat([layer.grad.double().flatten() for layer in layers])))


def cosine(a, b):
    return math.fsum((a * b).tolist()) / math.sqrt(math.fsum((a * a).tolist()) * math.fsum((b * b).tolist()))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("coherence", ["direction", "agreement"])
def test_coherence_is_that_of_a_float64_reference(tmp_path, precision, coherence):
    """Of the very gradients and weights that are there, whatever their precision."""
    logger, model = MemoryLogger(), Gradients()
    callback = GradientCoherentRegularization(
        "l2", strength=0.3, gate=gate_of(coherence=coherence, scope="model", threshold=0.0)
    )
    fit(tmp_path, model, callback, data(precision), precision=precision, logger=logger)

    expected = []
    for weight, gradient in model.kept:
        companion = gradient + 0.3 * weight if coherence == "direction" else weight
        expected.append(cosine(gradient, companion))
    assert logger.values("gcsr/coherence") == pytest.approx(expected, rel=0, abs=1e-12 if "64" in precision else 1e-6)
    norms = [float(gradient.norm()) for _, gradient in model.kept]
    assert logger.values("gcsr/grad_norm") == pytest.approx(norms, rel=1e-12 if "64" in precision else 1e-6)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true"])
@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic_net", "group_lasso"])
def test_sums_of_squares_beyond_half_precision_are_measured(tmp_path, precision, penalty):
    """Gradients and weights of about 100: each square fits into half precision, their sum does not."""
    dtype = DTYPES.get(precision, torch.float32)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Flatten())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        net[0].weight.copy_(100 + 10 * torch.rand(8, 4, generator=generator))

    class Sum(Regression):
        def loss(self, batch):
            return self.net(torch.full((1, 4), 10.0, dtype=dtype)).sum() * 8

    model, logger = Sum(net, make_optimizer=lambda weights: torch.optim.SGD(weights, lr=1e-3)), MemoryLogger()
    weight = net[0].weight.detach().to(dtype).double()
    assert float((weight.to(torch.float16) ** 2).sum()) == float("inf")
    callback = GradientCoherentRegularization(
        penalty, strength=0.5, gate=Gate("agreement", scope="model"), update="gradient"
    )
    fit(tmp_path, model, callback, data(precision, count=4), precision=precision, logger=logger)

    ones = torch.ones(8, 4, dtype=torch.float64)
    groups = math.sqrt(4) * weight / weight.norm(dim=1, keepdim=True)
    r = {"l1": ones, "l2": weight, "elastic_net": 0.5 * ones + 0.5 * weight, "group_lasso": groups}[penalty]
    assert logger.values("gcsr/coherence") == pytest.approx([cosine(ones.flatten(), r.flatten())], rel=1e-5)
    assert logger.values("gcsr/grad_norm") == pytest.approx([80 * math.sqrt(32)], rel=1e-6)
    assert logger.values("gcsr/penalty_grad_norm") == pytest.approx([0.5 * float(r.norm())], rel=1e-5)
    assert logger.values("gcsr/nonfinite_steps") == [0]
    assert logger.values("gcsr/injected") == [1.0]
    assert math.isfinite(logger.values("gcsr/penalty")[0])
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(
        net[0].weight.detach().double(), weight - 1e-3 * (80 * ones + 0.5 * r), rtol=2 * epsilon, atol=0
    )


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_temporal_coherence_in_sixteen_bits(tmp_path, precision):
    """The remembered gradient is as wide as the sums."""
    logger, model = MemoryLogger(), Gradients()
    callback = GradientCoherentRegularization(strength=0.01, gate=Gate("temporal", scope="model", threshold=-1.0))
    fit(tmp_path, model, callback, data(precision), precision=precision, logger=logger)
    gradients = [gradient for _, gradient in model.kept]
    expected = [cosine(now, last) for last, now in pairwise(gradients)]
    assert logger.values("gcsr/coherence")[0] == 0.0
    assert logger.values("gcsr/coherence")[1:] == pytest.approx(expected, rel=0, abs=1e-6)
    assert logger.values("gcsr/injected") == [0.0] + [1.0] * 7


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "bf16-mixed", "64-true"])
def test_accumulation_counts_the_penalty_once_in_every_precision(tmp_path, precision, update):
    """The loss gradient vanishes, so that each weight moves by lr·λ a step."""
    model = Regression(factors=dict.fromkeys(range(8), 0.0))
    start = model.net[0].weight.detach().clone().to(DTYPES.get(precision, torch.float32)).double()
    callback = GradientCoherentRegularization(strength=0.5, gate=None, update=update)
    fit(tmp_path, model, callback, data(precision), precision=precision, accumulate_grad_batches=4)
    assert steps_of(callback) == 2
    if update == "proximal":
        expected = start.sign() * (start.abs() - 2 * 0.1 * 0.5).clamp_min(0)
        assert (expected == 0).any()
    else:  # a weight that goes past zero comes back
        once = start - 0.05 * start.sign()
        expected = once - 0.05 * once.sign()
    moved = model.net[0].weight.detach()
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=2 * torch.finfo(moved.dtype).eps)
