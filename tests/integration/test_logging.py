"""What reaches the loggers: the documented keys, at the steps at which Lightning logs, with the values of that step."""

import csv
import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gcsr import CoherentRegularizer, Gate, GradientCoherentRegularization, Schedule

from .models import (
    THIS_STEP,
    ManualRegression,
    MemoryLogger,
    Regression,
    ValidatedRegression,
    fit,
    loader,
    make_trainer,
    mlp,
    scaled,
    sgd,
    steps_of,
)

KEYS = {"coherence", "injected", "strength", "grad_norm", "penalty_grad_norm", "penalty", "nonfinite_steps"}
PARAMETERS = ("net.0.weight", "net.2.weight")


def regularization(**kwargs):
    return GradientCoherentRegularization(**({"strength": 0.05} | kwargs))


def read_csv(logger):
    """For each key the steps and values in the file that the logger wrote."""
    found = {}
    with open(f"{logger.log_dir}/metrics.csv") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key != "step":
                    found.setdefault(key, []).append((int(row["step"]), float(value)))
    return found


def read_tensorboard(logger):
    """For each scalar the steps and values in the event file that the logger wrote."""
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def steps(pairs):
    return [step for step, _ in pairs]


@pytest.mark.parametrize("log_every_n_steps", [1, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_documented_keys_reach_both_loggers_at_the_steps_of_the_module_s_own_log(
    tmp_path, log_every_n_steps, accumulate
):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    callback = regularization()
    fit(
        tmp_path,
        Regression(),
        callback,
        loader(count=28),
        logger=loggers,
        max_epochs=4,
        log_every_n_steps=log_every_n_steps,
        accumulate_grad_batches=accumulate,
    )
    total = steps_of(callback)
    assert total == 4 * math.ceil(7 / accumulate)
    expected = list(range(log_every_n_steps - 1, total, log_every_n_steps))
    for found in (read_csv(loggers[0]), read_tensorboard(loggers[1])):
        assert steps(found["loss"]) == expected
        assert {key for key in found if key.startswith("gcsr/")} == {f"gcsr/{key}" for key in KEYS}
        for key in KEYS:
            assert steps(found[f"gcsr/{key}"]) == expected
            assert all(math.isfinite(value) for _, value in found[f"gcsr/{key}"])


def test_values_are_those_of_the_step_just_made(tmp_path):
    """Against a plain loop that reads its own gradients, and evaluates the penalty after the step."""
    logger = MemoryLogger()
    callback = regularization(
        gate=Gate("direction", scope="model", threshold=0.95), schedule=Schedule(warmup=3), update="gradient"
    )
    fit(tmp_path, Regression(), callback, logger=logger)

    net = mlp()
    weights = [net[0].weight, net[2].weight]
    optimizer = sgd(net.parameters())
    for step, (inputs, targets) in enumerate(loader()):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(inputs), targets).backward()
        strength = 0.05 * min(1.0, (step + 1) / 3)
        gradient = torch.cat([weight.grad.flatten() for weight in weights]).double()
        penalty = torch.cat([weight.detach().sign().flatten() for weight in weights]).double()
        coherence = torch.nn.functional.cosine_similarity(gradient, gradient + strength * penalty, dim=0)
        if coherence >= 0.95:
            for weight in weights:
                weight.grad += strength * weight.detach().sign()
        optimizer.step()
        logged = {key: logger.values(f"gcsr/{key}")[step] for key in KEYS}
        assert logged == pytest.approx(
            {
                "injected": float(coherence >= 0.95),
                "strength": strength,
                "grad_norm": float(gradient.norm()),
                "penalty_grad_norm": strength * 40**0.5,
                "penalty": float(sum(weight.detach().abs().sum() for weight in weights)),
                "nonfinite_steps": 0.0,
                "coherence": float(coherence),
            },
            rel=1e-5,
        )
    assert len(logger.steps("gcsr/coherence")) == 4


def test_grad_norm_is_that_of_the_loss_without_the_penalty(tmp_path):
    logger = MemoryLogger()
    model = Regression(factors=dict.fromkeys(range(4), 0.0))
    fit(tmp_path, model, regularization(gate=None), logger=logger)
    assert logger.values("gcsr/grad_norm") == [0.0] * 4
    assert logger.values("gcsr/penalty_grad_norm") == pytest.approx([0.05 * 40**0.5] * 4)


def test_no_coherence_is_logged_without_a_measure(tmp_path):
    logger = MemoryLogger()
    fit(tmp_path, Regression(), regularization(gate=None, log_per_parameter=True), logger=logger)
    keys = {key for key in logger.logged if key.startswith("gcsr/")}
    assert keys == {f"gcsr/{key}" for key in KEYS - {"coherence"}} | {f"gcsr/injected/{name}" for name in PARAMETERS}


def test_name_is_the_prefix(tmp_path):
    logger = MemoryLogger()
    arguments = {"update": "proximal", "schedule": Schedule(warmup=0)}
    callbacks = [regularization(name="a", **arguments), regularization(name="b", strength=0.01, **arguments)]
    fit(tmp_path, Regression(), callbacks, logger=logger)
    assert logger.values("a/strength") == pytest.approx([0.05] * 4)
    assert logger.values("b/strength") == pytest.approx([0.01] * 4)
    assert not any(key.startswith("gcsr") for key in logger.logged)


@pytest.mark.parametrize("log_per_parameter", [True, False])
def test_per_parameter_values_on_request(tmp_path, log_per_parameter):
    logger = MemoryLogger()
    callback = regularization(log_per_parameter=log_per_parameter, gate=Gate(scope="parameter"))
    fit(tmp_path, Regression(), callback, logger=logger)
    for name in PARAMETERS:
        expected = 4 if log_per_parameter else 0
        assert len(logger.values(f"gcsr/coherence/{name}")) == expected
        assert len(logger.values(f"gcsr/injected/{name}")) == expected
    if not log_per_parameter:
        return
    # At parameter scope with threshold 0 the sign of a tensor's coherence is its decision, and sizes weigh the total.
    shares = zip(*(logger.values(f"gcsr/injected/{name}") for name in PARAMETERS), strict=True)
    assert logger.values("gcsr/injected") == pytest.approx([(32 * a + 8 * b) / 40 for a, b in shares])
    for name in PARAMETERS:
        pairs = zip(logger.values(f"gcsr/coherence/{name}"), logger.values(f"gcsr/injected/{name}"), strict=True)
        assert all(injected == float(coherence >= 0) for coherence, injected in pairs)


def test_logged_report_is_the_regularizer_s(tmp_path):
    logger = MemoryLogger()
    callback = regularization(**THIS_STEP)
    fit(tmp_path, Regression(), callback, logger=logger, max_steps=1, max_epochs=-1)
    net = mlp()
    optimizer = sgd(net.parameters())
    inputs, targets = next(iter(loader()))
    torch.nn.functional.mse_loss(net(inputs), targets).backward()
    report = CoherentRegularizer(net, strength=0.05, **THIS_STEP).before_step(optimizer)
    for key in ("coherence", "injected", "strength", "grad_norm", "penalty_grad_norm"):
        assert logger.values(f"gcsr/{key}") == [float(getattr(report, key))]


def test_values_are_there_for_callbacks_that_monitor(tmp_path):
    stopping = EarlyStopping("gcsr/penalty", mode="min", patience=1, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, "best", monitor="gcsr/penalty", mode="min")
    callback = regularization(gate=None, strength=1.0, update="proximal")
    with pytest.warns(UserWarning, match="have collapsed"):
        trainer = fit(tmp_path, Regression(), [callback, stopping, best], max_epochs=30, enable_checkpointing=True)
    assert {f"gcsr/{key}" for key in KEYS - {"coherence"}} <= set(trainer.callback_metrics)
    assert float(trainer.callback_metrics["gcsr/penalty"]) == 0.0
    assert float(best.best_model_score) == 0.0
    assert trainer.current_epoch < 10  # a penalty of 0 gets no smaller


def test_callback_metrics_hold_the_last_values(tmp_path):
    logger = MemoryLogger()
    trainer = fit(tmp_path, Regression(), regularization(), logger=logger)
    for key in KEYS:
        assert float(trainer.callback_metrics[f"gcsr/{key}"]) == pytest.approx(logger.values(f"gcsr/{key}")[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"logger": False},
        {"logger": False, "log_every_n_steps": 0},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"max_steps": 3, "max_epochs": -1},
        {"overfit_batches": 2},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"gradient_clip_val": 1.0},
        {"detect_anomaly": True},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.filterwarnings("ignore:You have turned on `Trainer\\(detect_anomaly=True\\)`")
def test_every_mode_of_the_trainer_trains_with_the_callback(tmp_path, arguments, update):
    model, callback = ValidatedRegression(), regularization(update=update, log_per_parameter=True)
    trainer = make_trainer(tmp_path, [callback], **({"max_epochs": 2} | arguments))
    trainer.fit(model, loader(), loader(count=8))
    assert steps_of(callback) == trainer.global_step > 0


@pytest.mark.parametrize("model_class", [Regression, ManualRegression])
def test_barebones_trains_with_the_callback(tmp_path, model_class):
    class Silent(model_class):
        def log(self, *_, **__):
            """`Trainer(barebones=True)` warns of every use of it."""

    callback = regularization()
    trainer = Trainer(barebones=True, max_epochs=2, accelerator="cpu", callbacks=[callback])
    trainer.fit(Silent(), loader())
    assert steps_of(callback) == trainer.global_step == 8


def test_log_every_n_steps_beyond_the_fit_logs_nothing(tmp_path):
    logger = MemoryLogger()
    fit(tmp_path, Regression(), regularization(), logger=logger, log_every_n_steps=50)
    assert not any(key.startswith("gcsr/") for key in logger.logged)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_window_without_a_step_does_not_log_the_step_before_it(tmp_path):
    """Under a loss scaler Lightning makes no step where the closing micro-batch returned None."""
    logger = MemoryLogger()
    fit(
        tmp_path,
        Regression(none_at=[3]),
        regularization(),
        logger=logger,
        plugins=[scaled()],
        accumulate_grad_batches=2,
        log_every_n_steps=2,
    )
    assert logger.values("gcsr/injected") == []
