"""Mixed precision: the loss scale changes neither decisions nor weights, and skipped steps shrink nothing."""

from contextlib import nullcontext

import pytest
import torch

from lightning_gcsr import Gate, GradientCoherentRegularization

from .models import (
    Elementwise,
    ManualRegression,
    MemoryLogger,
    Regression,
    Snapshots,
    fit,
    gate_of,
    loader,
    momentum,
    same,
    scaled,
    steps_of,
    weights_of,
)

DECISIONS = [
    {"strength": 1.0, "gate": Gate("direction", scope="model", threshold=0.99)},
    {"gate": Gate("agreement", scope="element")},
    {"gate": Gate("temporal", scope="model", threshold=0.5)},
    {"gate": None},
]


def fused_adam(parameters):
    """Adam that divides by the loss scale itself, within its step."""
    return torch.optim.Adam(parameters, lr=0.05, fused=True)


def trained(tmp_path, make_optimizer, callback, model_class=Regression, **kwargs):
    """Weights and log of a model in which powers of two are exact."""
    logger = MemoryLogger()
    model = model_class(net=Elementwise(), make_optimizer=make_optimizer)
    fit(tmp_path, model, callback, loader(count=32), logger=logger, **kwargs)
    return weights_of(model), {key: logger.values(key) for key in logger.logged if key.startswith("gcsr/")}


def decision_name(decision):
    return str(decision["gate"] and decision["gate"].coherence)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("make_optimizer", [momentum, fused_adam])
@pytest.mark.parametrize("decision", DECISIONS, ids=decision_name)
@pytest.mark.parametrize("model_class", [Regression, ManualRegression])
def test_loss_scale_changes_nothing(tmp_path, decision, make_optimizer, update, model_class):
    results = []
    for precision in ({}, {"plugins": [scaled(1.0)]}, {"plugins": [scaled(1024.0)]}):
        arguments = {"strength": 0.05} | decision
        callback = GradientCoherentRegularization(**arguments, update=update, log_per_parameter=True)
        results.append(trained(tmp_path, make_optimizer, callback, model_class, **precision))
    (unscaled, unscaled_log), *others = results
    for weights, log in others:
        assert same(unscaled, weights)
        assert log == unscaled_log
    injected = unscaled_log["gcsr/injected"]
    assert len(injected) == 8
    assert 0 < sum(injected) < 8 or decision["gate"] is None  # the gate both opened and shut


@pytest.mark.parametrize("make_optimizer", [momentum, fused_adam])
def test_loss_scale_changes_nothing_under_accumulation(tmp_path, make_optimizer):
    results = []
    for scale in (1.0, 1024.0):
        decision = {"update": "gradient", "gate": Gate("direction", scope="model")}
        callback = GradientCoherentRegularization(strength=0.05, **decision)
        results.append(trained(tmp_path, make_optimizer, callback, plugins=[scaled(scale)], accumulate_grad_batches=2))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_half_precision_forward_makes_the_decisions_of_single_precision(tmp_path):
    """A real network, whose layers autocast runs in half precision; at that precision decisions and norms agree."""
    logs = []
    for precision in ({}, {"plugins": [scaled(1024.0)]}, {"precision": "bf16-mixed"}):
        logger = MemoryLogger()
        callback = GradientCoherentRegularization(strength=0.05, gate=Gate("direction", scope="model"))
        fit(tmp_path, Regression(), callback, logger=logger, **precision)
        logs.append(logger)
    single, half, brain = logs
    for key in ("coherence", "injected", "grad_norm", "penalty_grad_norm", "penalty"):
        assert half.values(f"gcsr/{key}") == pytest.approx(single.values(f"gcsr/{key}"), rel=1e-2)
        assert brain.values(f"gcsr/{key}") == pytest.approx(single.values(f"gcsr/{key}"), rel=5e-2)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("make_optimizer", [momentum, fused_adam])
@pytest.mark.parametrize("coherence", [None, "temporal"])
def test_overflow_in_every_step_leaves_the_weights_as_they_are(tmp_path, make_optimizer, update, coherence):
    model = Regression(make_optimizer=make_optimizer, factors=dict.fromkeys(range(4), float("inf")))
    start = weights_of(model)
    callback = GradientCoherentRegularization(
        strength=0.5, gate=gate_of(coherence=coherence, scope="model"), update=update
    )
    trainer = fit(tmp_path, model, callback, plugins=[scaled(1024.0)])  # and no warning: overflows are routine here
    assert same(start, weights_of(model))
    assert trainer.scaler.get_scale() == 1024.0 / 2**4
    assert int(callback.regularizer.nonfinite_steps) == steps_of(callback) == 4


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("make_optimizer", [momentum, fused_adam])
def test_after_an_overflow_the_run_goes_on_as_if_it_had_not_been(tmp_path, make_optimizer, update):
    """The step at which the gradient overflows is skipped: no shrink, scale halved, and nothing left for later."""
    snapshots, logger = Snapshots(), MemoryLogger()
    overflowing = Regression(net=Elementwise(), make_optimizer=make_optimizer, factors={1: float("inf")})
    callback = GradientCoherentRegularization(strength=0.05, update=update)
    data = loader(count=12)
    trainer = fit(tmp_path, overflowing, [callback, snapshots], data, plugins=[scaled()], logger=logger)
    assert same(snapshots.weights[0], snapshots.weights[1])
    assert not same(snapshots.weights[1], snapshots.weights[2])
    assert trainer.scaler.get_scale() == 512.0
    assert logger.values("gcsr/nonfinite_steps") == [0, 1, 1]
    assert logger.values("gcsr/injected")[1] == 0

    spared = Regression(net=Elementwise(), make_optimizer=make_optimizer)
    callback = GradientCoherentRegularization(strength=0.05, update=update)
    batches = torch.utils.data.Subset(data.dataset, [0, 1, 2, 3, 8, 9, 10, 11])
    fit(tmp_path, spared, callback, torch.utils.data.DataLoader(batches, batch_size=4), plugins=[scaled()])
    assert same(weights_of(spared), weights_of(overflowing))


class BiasOverflows(Regression):
    """The gradient of a bias, which is not regularized, overflows in the second step; those of the weights do not."""

    def backward(self, loss):
        super().backward(loss)
        if self.training_steps == 2:
            self.net[0].bias.grad[0] = float("inf")


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("make_optimizer", [momentum, fused_adam])
def test_overflow_outside_the_regularized_weights_skips_the_shrinking_too(tmp_path, make_optimizer, update):
    """Then the gate is open, and only the scaler knows that the step is skipped: nothing was shrunk, says the log."""
    snapshots, logger = Snapshots(), MemoryLogger()
    callback = GradientCoherentRegularization(strength=0.05, gate=None, update=update)
    model = BiasOverflows(make_optimizer=make_optimizer)
    trainer = fit(tmp_path, model, [callback, snapshots], loader(count=12), plugins=[scaled()], logger=logger)
    assert logger.values("gcsr/injected") == [1.0, 0.0 if update == "proximal" else 1.0, 1.0]
    assert trainer.scaler.get_scale() == 512.0
    assert same(snapshots.weights[0], snapshots.weights[1])
    assert not same(snapshots.weights[1], snapshots.weights[2])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_true_precisions_keep_tiny_strengths_and_finite_sums(tmp_path, precision, update):
    logger = MemoryLogger()
    callback = GradientCoherentRegularization(strength=1e-8, gate=None, update=update)
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    lost_in_rounding = update == "proximal" and precision != "64-true"
    with (
        pytest.warns(UserWarning, match="since step 0 the proximal map has moved no weight")
        if lost_in_rounding
        else nullcontext()
    ):
        fit(tmp_path, Regression(), callback, loader(dtype=dtype), precision=precision, logger=logger)
    assert logger.values("gcsr/strength") == pytest.approx([1e-8] * 4)
    # 40 weights, each with a penalty gradient of 1e-8.
    assert logger.values("gcsr/penalty_grad_norm") == pytest.approx([40**0.5 * 1e-8] * 4)
