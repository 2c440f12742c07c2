"""A run that is stopped and resumed makes the decisions of the run that was not."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcsr import CoupledGroupLasso, Gate, GradientCoherentRegularization, KeepZeros, Schedule

from .models import (
    THIS_STEP,
    MemoryLogger,
    Regression,
    ResumableLoader,
    ValidatedRegression,
    fit,
    loader,
    make_trainer,
    momentum,
    same,
    samples,
    sgd,
    steps_of,
    weights_of,
)

BATCHES = 4
EPOCHS = 3
STEPS = BATCHES * EPOCHS

CASES = {
    "default": {},
    "this step's gradient": {"update": "gradient", **THIS_STEP},
    "this step's gradient, proximal": {"update": "proximal", **THIS_STEP},
    "direction": {"gate": Gate("direction", scope="parameter", threshold=0.9)},
    "delay until after the resume": {"gate": None, "schedule": Schedule(delay=7)},
    "delay until the resume": {"gate": None, "schedule": Schedule(delay=6)},
    "warm-up across the resume": {"gate": None, "schedule": Schedule(delay=2, warmup=8)},
    "average and tolerance": {"update": "proximal", "gate": Gate(averaging=0.9, tolerance=0.5)},
    "average, model": {"gate": Gate("direction", averaging=0.9, scope="model", threshold=0.9)},
    "shares across the resume": {"gate": Gate(averaging=0.5), "schedule": Schedule(delay=0.1, warmup=0.7, stop=0.9)},
    "coupled groups": {"penalty": CoupledGroupLasso(example_input=torch.zeros(1, 4), block_size=2)},
    "stop after the resume": {"update": "proximal", "gate": None, "schedule": Schedule(stop=9)},
}


def resumable():
    return ResumableLoader(samples(4 * BATCHES), batch_size=4)


def regression(**kwargs):
    return Regression(make_optimizer=momentum, **kwargs)


def regularization(**kwargs):
    return GradientCoherentRegularization(**({"strength": 0.05} | kwargs))


class SaveAt(ModelCheckpoint):
    """Saves once, after a given number of optimizer steps."""

    def __init__(self, path, step) -> None:
        super().__init__(path, "checkpoint", every_n_train_steps=step, save_top_k=-1, enable_version_counter=False)
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            super().on_train_batch_end(trainer, *args)

    def state_dict(self):
        return {}  # Lightning warns where the callback of a saved state is missing on resume


@pytest.fixture
def saved(tmp_path):
    """Trains to the end, leaving a checkpoint of a step in the middle; returns its path, weights and log."""

    def train(callbacks, step, model=None, **kwargs):
        model = regression() if model is None else model
        logger = MemoryLogger()
        checkpoint = SaveAt(tmp_path / "saved", step)
        arguments = {"max_epochs": EPOCHS, "enable_checkpointing": True, "logger": logger}
        callbacks = [*callbacks, checkpoint]
        fit(tmp_path, model, callbacks, resumable(), **(arguments | kwargs))
        return tmp_path / "saved" / "checkpoint.ckpt", weights_of(model), logger

    return train


@pytest.mark.parametrize("step", [6, 8], ids=["within an epoch", "at the end of an epoch"])
@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(tmp_path, saved, case, step):
    whole = regularization(**CASES[case])
    path, expected, whole_log = saved([whole], step)

    logger, callback, model = MemoryLogger(), regularization(**CASES[case]), regression()
    trainer = make_trainer(tmp_path, [callback], max_epochs=EPOCHS, logger=logger)
    trainer.fit(model, resumable(), ckpt_path=path)

    assert same(weights_of(model), expected)
    assert trainer.global_step == steps_of(callback) == steps_of(whole) == STEPS
    for key in ("strength", "injected", "grad_norm", "nonfinite_steps"):
        assert logger.values(f"gcsr/{key}") == whole_log.values(f"gcsr/{key}")[step:]


def test_the_step_count_matters_to_the_resumed_run(tmp_path, saved):
    """The case above would notice if the count were lost: without it the delay starts anew and nothing is injected."""
    path, expected, _ = saved([regularization(gate=None, schedule=Schedule(delay=7))], 6)
    model = regression()
    trainer = make_trainer(tmp_path, [], max_epochs=EPOCHS)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer.fit(model, resumable(), ckpt_path=path)
    assert not same(weights_of(model), expected)


def test_resume_under_accumulation(tmp_path, saved):
    path, expected, _ = saved([regularization(gate=None, schedule=Schedule(delay=2))], 3, accumulate_grad_batches=2)
    model, callback = regression(), regularization(gate=None, schedule=Schedule(delay=2))
    trainer = make_trainer(tmp_path, [callback], max_epochs=EPOCHS, accumulate_grad_batches=2)
    trainer.fit(model, resumable(), ckpt_path=path)
    assert same(weights_of(model), expected)
    assert steps_of(callback) == STEPS // 2


@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
def test_at_strength_0_an_average_changes_nothing_even_across_a_resume(tmp_path, saved, scope):
    path, expected, _ = saved([regularization(strength=0, gate=Gate(averaging=0.9, scope=scope))], 6)
    model = regression()
    fit(tmp_path, model, None, resumable(), max_epochs=EPOCHS)
    assert same(weights_of(model), expected)
    resumed, callback = regression(), regularization(strength=0, gate=Gate(averaging=0.9, scope=scope))
    make_trainer(tmp_path, [callback], max_epochs=EPOCHS).fit(resumed, resumable(), ckpt_path=path)
    assert same(weights_of(resumed), expected)


def test_the_average_matters_to_the_resumed_run(tmp_path, saved):
    """The cases above would notice if the averages were lost."""
    arguments = {"update": "proximal", "gate": Gate(averaging=0.95, tolerance=0.5)}
    callback = regularization(**arguments)
    path, expected, _ = saved([callback], 6)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["callbacks"][callback.state_key]["averages"]) == {"net.0.weight", "net.2.weight"}
    del checkpoint["callbacks"][callback.state_key]["averages"]
    torch.save(checkpoint, path)
    model = regression()
    make_trainer(tmp_path, [regularization(**arguments)], max_epochs=EPOCHS).fit(model, resumable(), ckpt_path=path)
    assert not same(weights_of(model), expected)


def test_save_checkpoint_by_hand_resumes_too(tmp_path):
    path = tmp_path / "by_hand.ckpt"
    first = regularization(gate=None, schedule=Schedule(delay=6))
    fit(tmp_path, regression(), first, max_epochs=1).save_checkpoint(path)
    model, callback = regression(), regularization(gate=None, schedule=Schedule(delay=6))
    make_trainer(tmp_path, [callback], max_epochs=EPOCHS).fit(model, loader(), ckpt_path=path)

    whole = regression()
    fit(tmp_path, whole, regularization(gate=None, schedule=Schedule(delay=6)), max_epochs=EPOCHS)
    assert same(weights_of(model), weights_of(whole))
    assert steps_of(callback) == STEPS


def test_the_same_callback_object_resumes_in_another_trainer(tmp_path, saved):
    callback = regularization(gate=None, schedule=Schedule(delay=7))
    path, expected, _ = saved([callback], 6)
    model = regression()
    make_trainer(tmp_path, [callback], max_epochs=EPOCHS).fit(model, resumable(), ckpt_path=path)
    assert same(weights_of(model), expected)
    assert steps_of(callback) == STEPS


def test_checkpoint_loads_weights_only(saved):
    callback = regularization()
    path, _, _ = saved([callback], 6)
    state = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
    assert state["steps"] == {"net.0.weight": 6}
    assert state["nonfinite_steps"] == 0
    assert set(state["initial_norms"]) == {"net.0.weight", "net.2.weight"}


def test_nonfinite_count_and_initial_norms_are_restored(tmp_path, saved):
    with pytest.warns(UserWarning, match="not finite"):
        path, _, _ = saved(
            [regularization(update="proximal")], 6, regression(factors={2: float("nan")}), gradient_clip_val=None
        )
    # Repair the weights, which the optimizer itself spoilt: only the count is of interest.
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = regression().state_dict()
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])
    torch.save(checkpoint, path)

    logger, callback = MemoryLogger(), regularization(update="proximal")
    trainer = make_trainer(tmp_path, [callback], max_epochs=EPOCHS, logger=logger)
    before = checkpoint["callbacks"][callback.state_key]
    assert before["nonfinite_steps"] > 0
    with pytest.warns(UserWarning, match="not finite"):
        trainer.fit(regression(), resumable(), ckpt_path=path)
    assert logger.values("gcsr/nonfinite_steps") == [before["nonfinite_steps"]] * (STEPS - 6)
    assert callback.regularizer.state_dict()["initial_norms"] == before["initial_norms"]


def test_collapse_is_measured_from_the_first_start_and_not_from_the_resume(tmp_path):
    """The first run shrinks a layer to 1e-3, the second on to 1e-7 of the start, which is 1e-4 of the resume."""
    path = tmp_path / "small.ckpt"
    model = Regression()
    model.make_optimizer = lambda parameters: sgd(model.net[2:].parameters())
    trainer = fit(tmp_path, model, regularization())
    with torch.no_grad():
        model.net[0].weight *= 1e-3
    trainer.save_checkpoint(path)

    class ShrinksOnce(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if self.training_steps == 0:
                with torch.no_grad():
                    self.net[0].weight *= 1e-4

    resumed = ShrinksOnce()
    resumed.make_optimizer = lambda parameters: sgd(resumed.net[2:].parameters())
    trainer = make_trainer(tmp_path, [regularization()], max_epochs=2)
    with pytest.warns(UserWarning, match=r"'net\.0\.weight' have collapsed"):
        trainer.fit(resumed, loader(), ckpt_path=path)


def test_changed_strength_takes_effect_after_a_resume(tmp_path, saved):
    path, weights, _ = saved([regularization(gate=None)], 6)
    logger, model, callback = MemoryLogger(), regression(), regularization(strength=0.1, gate=None)
    make_trainer(tmp_path, [callback], max_epochs=EPOCHS, logger=logger).fit(model, resumable(), ckpt_path=path)
    assert logger.values("gcsr/strength") == pytest.approx([0.1] * (STEPS - 6))
    assert callback.regularizer.strength == 0.1
    assert not same(weights_of(model), weights)


def test_temporal_suppresses_once_after_a_resume(tmp_path, saved):
    arguments = {"gate": Gate("temporal", scope="model", threshold=-1.0)}
    path, _, whole = saved([regularization(**arguments)], 6)
    assert whole.values("gcsr/injected") == [0.0] + [1.0] * (STEPS - 1)
    logger, callback = MemoryLogger(), regularization(**arguments)
    trainer = make_trainer(tmp_path, [callback], max_epochs=EPOCHS, logger=logger)
    trainer.fit(regression(), resumable(), ckpt_path=path)
    assert logger.values("gcsr/injected") == [0.0] + [1.0] * (STEPS - 7)


# -- several callbacks ---------------------------------------------------------------------------------------------


def two(first="first", second="second"):
    return [
        regularization(name=first, include=[r"net\.0\.weight"], gate=None, schedule=Schedule(delay=7)),
        regularization(
            name=second, include=[r"net\.2\.weight"], gate=None, schedule=Schedule(warmup=10), update="proximal"
        ),
    ]


def test_two_callbacks_with_distinct_names_both_restore(tmp_path, saved):
    path, expected, _ = saved(two(), 6)
    model, callbacks = regression(), two()
    make_trainer(tmp_path, callbacks, max_epochs=EPOCHS).fit(model, resumable(), ckpt_path=path)
    assert same(weights_of(model), expected)
    assert [steps_of(callback) for callback in callbacks] == [STEPS, STEPS]
    assert callbacks[0].state_key != callbacks[1].state_key


def test_two_callbacks_of_one_name_are_refused_by_the_trainer(tmp_path):
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(tmp_path, two("same", "same"))


class BringsCallbacks(Regression):
    """Brings its callbacks along, which Lightning does not check."""

    def __init__(self, callbacks) -> None:
        super().__init__()
        self.callbacks = callbacks

    def configure_callbacks(self):
        return self.callbacks


def test_two_callbacks_of_one_name_are_refused_where_the_module_brings_them(tmp_path):
    model = BringsCallbacks(two("same", "same"))
    with pytest.raises(MisconfigurationException, match=r"name='same'.*another `name`"):
        fit(tmp_path, model)
    assert model.training_steps == 0


def test_two_callbacks_that_the_module_brings_work_side_by_side(tmp_path):
    callbacks = two()
    fit(tmp_path, BringsCallbacks(callbacks))
    assert [steps_of(callback) for callback in callbacks] == [BATCHES, BATCHES]


# -- going on in the same process ----------------------------------------------------------------------------------


def test_fit_goes_on_counting_with_a_larger_max_epochs(tmp_path):
    model, callback = regression(), regularization(gate=None, schedule=Schedule(delay=6))
    trainer = make_trainer(tmp_path, [callback], max_epochs=1)
    trainer.fit(model, loader())
    assert steps_of(callback) == BATCHES
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    assert steps_of(callback) == trainer.global_step == 2 * BATCHES


def test_fresh_trainer_with_the_same_callback_starts_from_zero(tmp_path):
    callback = regularization(gate=None, schedule=Schedule(delay=6))
    weights = []
    for _ in range(2):
        model = regression()
        fit(tmp_path, model, callback, max_epochs=2)
        assert steps_of(callback) == 2 * BATCHES
        weights.append(weights_of(model))
    assert same(*weights)


def test_validating_a_checkpoint_leaves_the_count_of_a_later_fit_alone(tmp_path, saved):
    """Lightning hands a checkpoint's callback states to callbacks when it validates or tests, too."""
    path, _, _ = saved([regularization()], 6)
    callback = regularization(gate=None, schedule=Schedule(delay=6))
    trainer = make_trainer(tmp_path, [callback])
    trainer.validate(ValidatedRegression(make_optimizer=momentum), loader(), ckpt_path=path, verbose=False)
    trainer.fit(regression(), loader())
    assert trainer.global_step == steps_of(callback) == BATCHES


def test_testing_a_checkpoint_in_between_does_not_rewind_the_count(tmp_path, saved):
    path, _, _ = saved([regularization()], 6)

    class Tested(ValidatedRegression):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

    model, callback = Tested(make_optimizer=momentum), regularization()
    trainer = make_trainer(tmp_path, [callback], max_epochs=2)
    trainer.fit(model, loader(), loader())
    trainer.test(model, loader(), ckpt_path=path, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader(), loader())
    assert trainer.global_step == steps_of(callback) == STEPS


# -- the whole recipe: average, tolerance, warm-up, stop, and zeros that are kept ----------------------------------

BEGIN = STEPS // 2


SCHEDULES = {
    "steps": {"schedule": Schedule(warmup=3, stop=BEGIN)},
    "shares": {"schedule": Schedule(warmup=0.25, stop=0.5)},
}


def recipe(schedule="steps", **kwargs):
    kwargs = (
        {"strength": 0.1, "update": "proximal", "gate": Gate(averaging=0.9, tolerance=0.5)}
        | SCHEDULES[schedule]
        | kwargs
    )
    return [regularization(**kwargs), KeepZeros()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step", [3, BEGIN - 1, BEGIN, BEGIN + 1, 10])
def test_the_recipe_resumed_ends_with_the_weights_of_the_uninterrupted_one(tmp_path, saved, step, schedule):
    """Before the zeros are kept, right where they begin to be, and after."""
    whole = recipe(schedule)
    path, expected, whole_log = saved(whole, step)
    logger, callbacks, model = MemoryLogger(), recipe(schedule), regression()
    make_trainer(tmp_path, callbacks, max_epochs=EPOCHS, logger=logger).fit(model, resumable(), ckpt_path=path)
    assert same(weights_of(model), expected)
    for key in ("strength", "coherence", "injected", "grad_norm", "penalty"):
        assert logger.values(f"gcsr/{key}") == whole_log.values(f"gcsr/{key}")[step:]
    states = [keep_zeros.state_dict() for _, keep_zeros in (whole, callbacks)]
    assert same(states[0]["zeros"], states[1]["zeros"])
    # Something is kept: the zeros of the end are those of the middle, and are not all.
    assert same(states[0]["zeros"], {name: expected[name] == 0 for name in states[0]["zeros"]})
    assert 0 < sum(int(zeros.sum()) for zeros in states[0]["zeros"].values()) < 40


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_weight_that_is_zero_at_the_moment_of_the_resume_is_not_kept(tmp_path, saved, forgotten):
    """Which zeros are kept is known from the checkpoint. Were it forgotten, they would be found in the weights anew."""
    path, _, _ = saved(recipe(), 10)
    checkpoint = torch.load(path, weights_only=True)
    weight = checkpoint["state_dict"]["net.0.weight"]
    index = tuple(weight.nonzero()[0].tolist())
    weight[index] = 0.0
    if forgotten:
        checkpoint["callbacks"][KeepZeros().state_key]["zeros"] = {}
    torch.save(checkpoint, path)
    model = regression()
    make_trainer(tmp_path, recipe(), max_epochs=EPOCHS).fit(model, resumable(), ckpt_path=path)
    assert (model.net[0].weight[index] == 0) == forgotten


class Crash(Callback):
    """Fails once, after a given number of optimizer steps and before a checkpoint is written of the last of them."""

    def __init__(self, step) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step", [5, BEGIN + 1, 10])
def test_the_recipe_crashed_and_resumed_ends_with_the_weights_of_the_uninterrupted_one(tmp_path, step, schedule):
    whole = regression()
    fit(tmp_path, whole, recipe(schedule), resumable(), max_epochs=EPOCHS)

    class Checkpoint(ModelCheckpoint):
        def state_dict(self):
            return {}  # Lightning warns where the callback of a saved state is missing on resume

    checkpoint = Checkpoint(tmp_path / "crash", every_n_train_steps=3, save_top_k=-1, enable_version_counter=False)
    callbacks = [*recipe(schedule), Crash(step), checkpoint]
    trainer = make_trainer(tmp_path, callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    crashed = regression()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(crashed, resumable())
    assert not crashed.optimizers(use_pl_optimizer=False)._optimizer_step_post_hooks

    model = regression()
    resumed = make_trainer(tmp_path, recipe(schedule), max_epochs=EPOCHS)
    resumed.fit(model, resumable(), ckpt_path=checkpoint.best_model_path)
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == (step - 1) // 3 * 3
    assert same(weights_of(model), weights_of(whole))


def test_a_parameter_may_be_left_out_of_the_penalty_at_a_resume(tmp_path, saved):
    """As a changed strength takes effect, so does a changed selection: the averages of others are dropped."""
    path, _, _ = saved(recipe(), 3)
    callbacks = recipe(include=[r"net\.0\.weight"])
    make_trainer(tmp_path, callbacks, max_epochs=EPOCHS).fit(regression(), resumable(), ckpt_path=path)
    assert set(callbacks[0].state_dict()["averages"]) == {"net.0.weight"}


def test_a_parameter_may_be_left_out_of_the_kept_zeros_at_a_resume(tmp_path, saved):
    path, _, _ = saved(recipe(), 8)
    callbacks = [recipe()[0], KeepZeros(include=[r"net\.0\.weight"])]
    make_trainer(tmp_path, callbacks, max_epochs=EPOCHS).fit(regression(), resumable(), ckpt_path=path)
    assert set(callbacks[1].state_dict()["zeros"]) == {"net.0.weight"}
