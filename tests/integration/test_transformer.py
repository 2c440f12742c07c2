"""A model on which it matters: a transformer with tied weights under AdamW, warm-up, clipping and accumulation."""

import math

import pytest
import torch

from lightning_gcsr import CompressionMonitor, CompressionRatio, GradientCoherentRegularization, Schedule, Sparsity

from .language_model import (
    ACCUMULATE,
    LR,
    TRAINER,
    VOCABULARY,
    WARMUP,
    WIDTH,
    LanguageModel,
    excerpts,
    unigram_entropy,
)
from .models import MemoryLogger, fit, gate_of, largest_difference, same, steps_of, weights_of

STEPS = 150
MODERATE = 2e-3
"""At which the gated model is about as good as the free one, with half of its weights zero."""
DEADLY = 2e-2
"""At which the ungated penalty kills all tensors but one. It does from 6e-3 on; with the gate most of them live."""


def train(path, callbacks=None, steps=STEPS, loss_term=None, **kwargs):
    """The model after so many optimizer steps."""
    model = LanguageModel(loss_term)
    fit(path, model, callbacks, excerpts(steps), **(TRAINER | kwargs))
    return model


def proximal(**kwargs):
    return GradientCoherentRegularization(update="proximal", **({"strength": MODERATE} | kwargs))


def matrices(model):
    """The weights that are regularized by default, by their own definition; the tied one once."""
    return {name: weight for name, weight in weights_of(model).items() if weight.dim() > 1}


def share_of_zeros(weights):
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """The model without a callback, by the number of steps."""
    models = {}

    def get(steps=STEPS):
        if steps not in models:
            models[steps] = train(tmp_path_factory.mktemp("free"), steps=steps)
        return models[steps]

    return get


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A model under a moderate proximal L1 behind the gate of each step, with its callback and all that was logged."""
    logger, callback = MemoryLogger(), proximal()
    model = train(tmp_path_factory.mktemp("sparse"), [callback, CompressionMonitor()], logger=logger)
    return model, callback, logger


# -- what the penalty does to the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_zero_strength_leaves_the_training_alone(tmp_path, free, update):
    callback = GradientCoherentRegularization(strength=0.0, update=update)
    regularized = train(tmp_path, callback, steps=20)
    assert steps_of(callback) == 20
    assert free(20).losses == regularized.losses
    assert same(weights_of(free(20)), weights_of(regularized))
    # Not for lack of training.
    assert regularized.final_loss() < regularized.losses[0] - 0.7
    tiny = GradientCoherentRegularization(strength=1e-4, update=update)
    assert not same(weights_of(free(20)), weights_of(train(tmp_path, tiny, steps=20)))


def test_model_learns_and_becomes_sparse(free, sparse):
    model, callback, logger = sparse
    assert model.losses[0] == free().losses[0] > math.log(VOCABULARY)
    # Better than from the frequencies of the characters, by what only their order can tell.
    assert model.final_loss() < unigram_entropy() - 0.4
    assert abs(model.final_loss() - free().final_loss()) < 0.25

    sparsity, injected = logger.values("sparsity/model"), logger.values("gcsr/injected")
    assert steps_of(callback) == len(sparsity) == STEPS
    assert sparsity[0] < 0.02
    assert sparsity[STEPS // 3] < sparsity[2 * STEPS // 3] < sparsity[-1]
    assert sparsity[-1] > 0.4
    assert share_of_zeros(matrices(free()).values()) == 0
    assert injected[0] == 0  # where the warm-up begins
    assert 0.05 < min(injected[1:]) < max(injected) < 1


def test_strength_at_which_the_ungated_penalty_kills_the_model(tmp_path):
    callback = proximal(strength=DEADLY, gate=None, schedule=Schedule(warmup=0.3))  # as with the gate
    with pytest.warns(UserWarning, match="have collapsed"):
        dead = train(tmp_path, callback)
    assert len(callback.regularizer.collapsed()) >= len(matrices(dead)) - 1
    assert dead.final_loss() > unigram_entropy()  # worse than a guess from the frequencies of the characters


@pytest.mark.filterwarnings("ignore:.*have collapsed:UserWarning")  # the model can do without some of its tensors
def test_model_lives_at_that_strength_behind_the_gate(tmp_path):
    callback = proximal(strength=DEADLY)
    alive = train(tmp_path, callback)
    assert "net.embedding.weight" not in callback.regularizer.collapsed()
    assert len(callback.regularizer.collapsed()) <= len(matrices(alive)) / 2
    assert 0.8 < share_of_zeros(matrices(alive).values()) < 0.99
    assert alive.final_loss() < unigram_entropy() - 0.15


def test_norms_and_biases_get_no_zeros(sparse):
    model, _, _ = sparse
    vectors = {name: weight for name, weight in weights_of(model).items() if weight.dim() == 1}
    assert len(vectors) == 16
    assert all(weight.all() for weight in vectors.values())
    assert all((weight == 0).any() for weight in matrices(model).values())


# -- tied weights --------------------------------------------------------------------------------------------------


def test_tied_weight_is_counted_once(sparse):
    model, callback, logger = sparse
    assert model.net.head.weight is model.net.embedding.weight
    weights = matrices(model)
    assert set(callback.regularizer.parameters) == set(weights)
    assert "net.embedding.weight" in weights
    assert "net.head.weight" not in weights

    logged = {key.removeprefix("sparsity/parameter/") for key in logger.logged if key.startswith("sparsity/")}
    assert logged == {"sparsity/model", *weights}
    share = share_of_zeros(weights.values())
    twice = share_of_zeros([*weights.values(), weights["net.embedding.weight"]])
    assert abs(share - twice) > 1e-3  # so that it would be noticed
    assert logger.values("sparsity/model")[-1] == pytest.approx(share, abs=1e-9)
    assert logger.values("compression/ratio")[-1] == pytest.approx(1 / (1 - share))
    assert float(Sparsity()(model)) == pytest.approx(share)
    assert float(CompressionRatio()(model)) == pytest.approx(1 / (1 - share))
    assert logger.values("gcsr/penalty")[-1] == pytest.approx(sum(float(w.abs().sum()) for w in weights.values()))


def test_tied_weight_is_shrunk_once(tmp_path, free):
    """The first step of the regularized run is that of the free one, and then one soft threshold by lr·λ·κ.

    κ is one over the root mean square of the gradient, which for the tied weight is that of both of its uses.
    """
    shrunk = weights_of(train(tmp_path, proximal(gate=None), steps=1))
    start = LanguageModel()
    (sum(start.training_step(batch, 0) for batch in excerpts(1)) / ACCUMULATE).backward()
    thresholds = {
        name: LR / WARMUP * MODERATE / float(weight.grad.square().mean().sqrt())
        for name, weight in start.named_parameters()
    }
    for name, weight in weights_of(free(1)).items():
        expected = weight.sign() * (weight.abs() - thresholds[name]).relu() if weight.dim() > 1 else weight
        torch.testing.assert_close(shrunk[name], expected, rtol=0, atol=1e-7)
    moved = (shrunk["net.embedding.weight"] - weights_of(free(1))["net.embedding.weight"]).abs()
    assert float(moved.max()) == pytest.approx(thresholds["net.embedding.weight"], rel=1e-2)
    assert moved.shape == (VOCABULARY, WIDTH)


# -- the loss term, and the other measures -------------------------------------------------------------------------


def test_ungated_gradient_update_is_the_loss_term_through_clipping_and_accumulation(tmp_path, free):
    strength, steps = 1e-3, 10

    def loss_term(net):
        return strength * sum(weight.abs().sum() for weight in net.parameters() if weight.dim() > 1)

    def regularization(strength):
        return GradientCoherentRegularization(strength=strength, gate=None, update="gradient")

    expected = weights_of(train(tmp_path, steps=steps, loss_term=loss_term))
    actual = weights_of(train(tmp_path, regularization(strength), steps=steps))
    assert largest_difference(expected, actual) < 1e-5
    others = {
        "free": free(steps),
        "counted twice": train(tmp_path, regularization(2 * strength), steps=steps),
        "not clipped": train(tmp_path, regularization(strength), steps=steps, gradient_clip_val=None),
        "not accumulated": train(tmp_path, regularization(strength), steps=steps, accumulate_grad_batches=1),
    }
    for name, other in others.items():
        assert largest_difference(weights_of(other), actual) > 1e-3, name


@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
@pytest.mark.parametrize("coherence", ["temporal", "direction"])
def test_the_other_measures_train_it_too(tmp_path, free, coherence, scope, update):
    steps, logger = 20, MemoryLogger()
    callback = GradientCoherentRegularization(
        strength=5e-3, gate=gate_of(coherence=coherence, scope=scope), update=update
    )
    model = train(tmp_path, callback, steps, logger=logger)

    assert steps_of(callback) == steps
    assert all(-1 <= value <= 1 for value in logger.values("gcsr/coherence"))
    assert len(set(logger.values("gcsr/coherence"))) == steps
    assert max(logger.values("gcsr/injected")) > 0.3
    assert (logger.values("gcsr/injected")[0] == 0) == (coherence == "temporal")  # which has no predecessor there
    assert logger.values("gcsr/nonfinite_steps")[-1] == 0
    assert model.final_loss() < model.losses[0] - 0.7
    assert not same(weights_of(model), weights_of(free(steps)))
