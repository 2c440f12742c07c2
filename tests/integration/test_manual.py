"""Manual optimization: one decision for each step that Lightning knows of, on that optimizer's parameters only."""

import warnings

import pytest
import torch

from lightning_gcsr import CoherentRegularizer, Gate, GradientCoherentRegularization, Schedule

from .models import (
    Adversaries,
    ManualRegression,
    MemoryLogger,
    RawRegression,
    Regression,
    fit,
    loader,
    momentum,
    same,
    scaled,
    sgd,
    steps_of,
    weights_of,
)

REPORTED = ("coherence", "injected", "strength", "grad_norm", "penalty_grad_norm")


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_stepping_every_batch_by_hand_equals_automatic_optimization(tmp_path, update):
    weights = []
    for model in (Regression(make_optimizer=momentum), ManualRegression(make_optimizer=momentum)):
        fit(tmp_path, model, GradientCoherentRegularization(strength=0.05, update=update), max_epochs=2)
        weights.append(weights_of(model))
    assert same(*weights)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_stepping_after_every_second_of_four_batches_makes_two_decisions(tmp_path, update):
    model = ManualRegression(every=2)
    callback = GradientCoherentRegularization(strength=0.05, update=update, schedule=Schedule(warmup=0))
    trainer = fit(tmp_path, model, callback)
    assert model.training_steps == 4
    assert steps_of(callback) == trainer.global_step == 2
    accumulated = Regression()
    fit(tmp_path, accumulated, callback.with_changes(), accumulate_grad_batches=2)
    assert same(weights_of(model), weights_of(accumulated))


class TwiceABatch(ManualRegression):
    """Steps twice in each batch."""

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class WithClosure(ManualRegression):
    """Does forward and backward within the step."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class RawBackward(ManualRegression):
    """A raw backward, which Lightning does not see, before a step that it does."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


@pytest.mark.parametrize(("model_class", "decisions"), [(TwiceABatch, 8), (WithClosure, 4), (RawBackward, 4)])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_every_step_that_lightning_knows_of_gets_one_decision(tmp_path, model_class, decisions, update):
    """With a vanishing gradient each decision moves a weight by lr·λ."""
    model = model_class()
    model.loss = lambda batch: 0.0 * model_class.loss(model, batch)
    start = weights_of(model)["net.0.weight"]
    callback = GradientCoherentRegularization(strength=0.01, gate=None, update=update)
    fit(tmp_path, model, callback)
    assert steps_of(callback) == decisions
    expected = decisions * 0.1 * 0.01 * start.sign()
    torch.testing.assert_close(start - weights_of(model)["net.0.weight"], expected, rtol=1e-4, atol=1e-7)


def test_raw_optimizer_with_raw_backward_is_warned_of(tmp_path):
    callback = GradientCoherentRegularization(strength=0.05, name="mine")
    raw, free = RawRegression(), RawRegression()
    with pytest.warns(UserWarning, match=r"mine: .*nothing was\s+regularized.*`self\.optimizers\(\)`") as caught:
        fit(tmp_path, raw, callback, max_epochs=2)
    assert len([warning for warning in caught if "nothing was" in str(warning.message)]) == 1
    assert steps_of(callback) == 0
    fit(tmp_path, free)
    fit(tmp_path, free)
    assert same(weights_of(raw), weights_of(free))


# -- two optimizers ------------------------------------------------------------------------------------------------


def expected_report(weight, gradient, strength):
    """Coherence and norms of one layer by hand."""
    penalized = gradient + strength * weight.sign()
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten().double(), penalized.flatten().double(), dim=0)
    return float(cosine), float(gradient.double().norm()), strength * weight.numel() ** 0.5


@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "both hold gradients"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_each_decision_sees_only_the_parameters_of_its_optimizer(tmp_path, toggle, update):
    logger = MemoryLogger()
    model = Adversaries(toggle)
    callback = GradientCoherentRegularization(
        strength=0.2, gate=Gate("direction", scope="model", threshold=0.9), update=update
    )
    fit(tmp_path, model, callback, logger=logger)

    assert callback.regularizer.state_dict()["steps"] == {"generator.weight": 4, "critic.weight": 4}
    for index in (0, 1):
        expected = [expected_report(weight, gradient, 0.2) for i, weight, gradient in model.gradients if i == index]
        actual = zip(
            logger.values(f"gcsr/optimizer_{index}/coherence"),
            logger.values(f"gcsr/optimizer_{index}/grad_norm"),
            logger.values(f"gcsr/optimizer_{index}/penalty_grad_norm"),
            strict=True,
        )
        assert list(actual) == [pytest.approx(report, rel=1e-6) for report in expected]
        opened = [float(coherence >= 0.9) for coherence, _, _ in expected]
        assert logger.values(f"gcsr/optimizer_{index}/injected") == opened


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_two_optimizers_give_the_weights_of_a_plain_loop(tmp_path, update):
    model, plain = Adversaries(toggle=False), Adversaries(toggle=False)
    arguments = {"strength": 0.05, "update": update, "gate": Gate("temporal", scope="parameter")}
    fit(tmp_path, model, GradientCoherentRegularization(**arguments), max_epochs=2)

    optimizers = plain.configure_optimizers()
    regularizer = CoherentRegularizer(plain, **arguments)
    for _ in range(2):
        for inputs, _targets in loader():
            for index, optimizer in enumerate(optimizers):
                score = plain.critic(plain.generator(inputs)).mean()
                loss = -score if index == 0 else score - plain.critic(inputs).square().mean()
                optimizer.zero_grad()
                loss.backward()
                regularizer.before_step(optimizer)
                optimizer.step()
                regularizer.after_step(optimizer)
    assert same(weights_of(model), weights_of(plain))


def test_keys_of_two_optimizers_are_split(tmp_path):
    logger = MemoryLogger()
    callback = GradientCoherentRegularization(strength=0.05, name="mine")
    fit(tmp_path, Adversaries(toggle=True), callback, logger=logger)
    split = {f"mine/optimizer_{index}/{key}" for index in (0, 1) for key in REPORTED}
    assert logger.logged == split | {"mine/penalty", "mine/nonfinite_steps"}


def test_keys_stay_split_where_two_optimizers_take_turns(tmp_path):
    logger = MemoryLogger()
    model = Adversaries(toggle=True, every=(2, 2), offsets=(0, 1))
    fit(tmp_path, model, GradientCoherentRegularization(strength=0.05), logger=logger)
    assert [index for index, _, _ in model.gradients] == [0, 1, 0, 1]
    assert len(logger.values("gcsr/optimizer_0/grad_norm")) == 2
    assert len(logger.values("gcsr/optimizer_1/grad_norm")) == 2
    assert "gcsr/grad_norm" not in logger.logged


def test_keys_are_not_split_where_the_second_optimizer_steps_nothing_regularized(tmp_path):
    logger = MemoryLogger()
    callback = GradientCoherentRegularization(strength=0.05, include=["critic.weight"])
    fit(tmp_path, Adversaries(toggle=True), callback, logger=logger)
    assert logger.steps("gcsr/coherence") == [0, 1, 2, 3]


def test_a_skipped_step_injects_nothing_whatever_another_optimizer_does_after_it(tmp_path):
    logger, model = MemoryLogger(), Adversaries(toggle=True)
    model.generator.bias.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    callback = GradientCoherentRegularization(
        strength=0.05, include=["generator.weight"], gate=None, update="proximal", schedule=Schedule(warmup=0)
    )
    before = model.generator.weight.clone()
    fit(tmp_path, model, callback, logger=logger, plugins=[scaled()])
    assert torch.equal(model.generator.weight, before)
    assert logger.values("gcsr/injected") == [0.0] * 4


def test_delay_counts_the_steps_of_all_optimizers(tmp_path):
    """As ``trainer.global_step`` does. The generator steps in every batch, the critic in every second."""
    model = Adversaries(toggle=True, every=(1, 2))
    callback = GradientCoherentRegularization(strength=0.05, gate=None, schedule=Schedule(delay=2))
    fit(tmp_path, model, callback, loader(count=16))
    free = Adversaries(toggle=True, every=(1, 2))
    fit(tmp_path, free, data=loader(count=16))
    assert callback.regularizer.state_dict()["steps"] == {"generator.weight": 4, "critic.weight": 2}
    # The first step of each was within the delay; the generator's second step, the third of all, was penalized.
    pairs = list(zip(model.gradients, free.gradients, strict=True))
    assert [torch.equal(a[1], b[1]) for a, b in pairs if a[0] == 0] == [True, True, False, False]


def test_log_has_values_where_manual_steps_fall_between_the_logged_batches(tmp_path):
    """Steps after the batches 0, 2, 4, 6 while Lightning logs after 1, 3, 5, 7: the last step is there to report."""
    logger = MemoryLogger()
    model = ManualRegression(every=2, offset=1)
    callback = GradientCoherentRegularization(strength=0.05)
    fit(tmp_path, model, callback, loader(count=32), logger=logger, log_every_n_steps=2)
    assert steps_of(callback) == 4
    assert logger.steps("loss") == [1, 3, 5, 7]
    assert logger.values("gcsr/injected")


def test_manual_accumulation_does_not_repeat_stale_values(tmp_path):
    """TRAPS: under manual accumulation `self.log` repeats values; each step is reported once."""
    logger = MemoryLogger()
    callback = GradientCoherentRegularization(strength=0.05)
    fit(tmp_path, ManualRegression(every=2), callback, logger=logger)
    assert len(logger.steps("gcsr/injected")) == steps_of(callback) == 2


def test_automatic_optimization_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(workers|LeafSpec)")
        fit(tmp_path, Regression(make_optimizer=sgd), GradientCoherentRegularization(strength=0.01))
