"""After `find_strength`, however it ends, everything is as before, field by field."""

import logging
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import RandomSampler

from lightning_gcsr import CompressionMonitor, GradientCoherentRegularization, KeepZeros

from .models import MemoryLogger, ResumableLoader, loader, same, samples, weights_of
from .searching import DroppingLearner, Failing, RaisesAt, differences, fields, learning_sgd, search, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")

TESTS = Path(__file__).parents[1]


class CountingLogger(MemoryLogger):
    """Counts whatever it is called for, also by its copies."""

    calls: list[str]

    def __init__(self):
        super().__init__()
        self.calls = []

    def __getattribute__(self, name):
        if name in ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint", "log_graph"):
            super().__getattribute__("calls").append(name)
        return super().__getattribute__(name)


def everything(path):
    """A Trainer with all kinds of callbacks and loggers."""
    callbacks = [
        GradientCoherentRegularization(strength=0.01),
        KeepZeros(start=0.5),
        CompressionMonitor(),
        EarlyStopping("val_loss"),
        ModelCheckpoint(path / "checkpoints", monitor="val_loss", every_n_train_steps=1),
        LearningRateMonitor(),
    ]
    loggers = [CountingLogger(), CSVLogger(path, "csv"), TensorBoardLogger(path, "tensorboard")]
    return trainer_for(path, callbacks, logger=loggers, enable_checkpointing=True)


def random_numbers():
    """What each generator would draw next, without drawing it."""
    return (torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate())


class Memorizing(RandomSampler):
    """A sampler with a generator and a count."""

    def __init__(self, data):
        super().__init__(data, generator=torch.Generator().manual_seed(5))
        self.epochs = 0

    def __iter__(self):
        self.epochs += 1
        return super().__iter__()


class Positioned(ResumableLoader):
    """Its position is in the midst of an epoch."""

    position = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.position = 2


def training_data():
    """A loader with a sampler, and generators of its own, and a position."""
    data = samples()
    data.noise = np.random.default_rng(3)
    return Positioned(data, batch_size=4, sampler=Memorizing(data), generator=torch.Generator().manual_seed(7))


class Data(LightningDataModule):
    """Holds its loaders and takes down what it is asked."""

    def __init__(self):
        super().__init__()
        self.train, self.validation = training_data(), None
        self.stage = "none"

    def setup(self, stage):
        self.stage, self.validation = stage, loader()

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.validation


ENDS = {
    "returns": (None, None),
    "raises in the first step": (1, RuntimeError),
    "raises with one": (30, RuntimeError),
    "is interrupted": (30, KeyboardInterrupt),
}


def run(end, trainer, *data, **kwargs):
    """Search until that end; return the model, and the fields of all before and after it."""
    at, error = ENDS[end]
    model = Failing(None if at is None else RaisesAt(at, lambda: error("on purpose")))
    things = {"trainer": trainer, "model": model, "data": data, "more": kwargs}
    before = fields(things)
    if error is None:
        search(trainer, model, *data, **kwargs)
    else:
        with pytest.raises(error):
            search(trainer, model, *data, **kwargs)
    after = fields(things)
    # The count of steps until it raises is the one thing that shall change.
    return model, [path for path in differences(before, after) if path != "['model'].raises.left"]


@pytest.mark.parametrize("end", ENDS)
def test_every_field_is_as_before(tmp_path, end):
    trainer = everything(tmp_path)
    weights = weights_of(Failing())
    states = repr([callback.state_dict() for callback in trainer.callbacks])
    model, changed = run(end, trainer, training_data(), loader())
    assert changed == []
    assert same(weights, weights_of(model))
    assert model.seen == []
    assert model._trainer is None
    assert [module.training for module in model.net] == [True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert repr([callback.state_dict() for callback in trainer.callbacks]) == states
    assert trainer.callback_metrics == trainer.logged_metrics == trainer.progress_bar_metrics == {}
    assert trainer.optimizers == trainer.lr_scheduler_configs == []
    assert (trainer.max_epochs, trainer.max_steps, trainer.global_step, trainer.current_epoch) == (5, -1, 0, 0)
    assert not trainer.should_stop


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_logged_or_written(tmp_path, end):
    trainer = everything(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.ckpt").write_text("mine")
    run(end, trainer, loader(), loader())
    assert trainer.loggers[0].calls == []
    assert trainer.loggers[0].rows == []
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [
        Path("checkpoints/mine.ckpt")
    ]


@pytest.mark.parametrize("end", ENDS)
def test_data_are_as_before(tmp_path, end):
    data = Data()
    _, changed = run(end, trainer_for(tmp_path), datamodule=data)
    assert changed == []
    assert (data.stage, data.validation, data.trainer) == ("none", None, None)
    assert data.train.position == 2
    assert data.train.sampler.epochs == 0


def test_loaders_in_a_combined_loader_are_as_before(tmp_path):
    train = CombinedLoader([training_data(), loader()], "max_size_cycle")

    class Pairs(DroppingLearner):
        def loss(self, batch):
            return super().loss(batch[0] if isinstance(batch[0], list) else batch)

    before = fields(train)
    search(trainer_for(tmp_path), Pairs(make_optimizer=learning_sgd), train, loader())
    assert differences(before, fields(train)) == []


@pytest.mark.parametrize("end", ENDS)
def test_random_state_signal_handlers_and_log_level_are_as_before(tmp_path, end):
    def mine(number, frame):
        raise AssertionError("no signal was sent")

    log = logging.getLogger("lightning.pytorch")
    level, interrupt = log.level, signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGTERM, mine)
    log.setLevel(logging.DEBUG)
    numbers = random_numbers()
    try:
        run(end, trainer_for(tmp_path), loader(), loader())
        assert random_numbers() == numbers
        assert log.level == logging.DEBUG
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        log.setLevel(level)
        signal.signal(signal.SIGTERM, before)


def test_error_of_the_model_arrives_as_it_is(tmp_path):
    model = Failing(RaisesAt(30, lambda: ZeroDivisionError("mine")))
    with pytest.raises(ZeroDivisionError, match="mine"):
        search(trainer_for(tmp_path), model, loader(), loader())


def test_interrupt_in_a_validation_leaves_all_as_before(tmp_path):
    class Interrupted(Failing):
        def validation_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    model, before = Interrupted(), random_numbers()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            search(trainer_for(tmp_path), model, loader(), loader())
        assert random_numbers() == before
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("end", ENDS)
def test_training_after_it_is_the_training_without_it(tmp_path, end):
    """In every bit, with shuffled data, dropout and a penalty."""

    def train(searched):
        torch.manual_seed(2)
        np.random.seed(2)
        callbacks = [GradientCoherentRegularization(strength=0.01)]
        trainer, data, logger = trainer_for(tmp_path, callbacks), training_data(), MemoryLogger()
        trainer.loggers = [logger]
        model = Failing()
        if searched:
            at, error = ENDS[end]
            model.raises = RaisesAt(10**9 if at is None else at, lambda: error())
            try:
                search(trainer, model, data, loader())
            except BaseException as raised:
                if error is None or not isinstance(raised, error):
                    raise
            model.raises = None
        trainer.fit(model, data, loader())
        return model, logger.rows

    (model, rows), (searched_model, searched_rows) = train(False), train(True)
    assert same(weights_of(model), weights_of(searched_model))
    assert searched_model.seen == model.seen
    assert searched_rows == rows


def test_model_that_was_trained_before_stays_as_it_is(tmp_path):
    """It knows its Trainer, which was of another training."""
    model, earlier = Failing(), trainer_for(tmp_path, max_epochs=1)
    earlier.fit(model, loader(), loader())
    things = [model, earlier]
    before = fields(things)
    search(trainer_for(tmp_path, max_epochs=15), model, loader(), loader())
    assert differences(before, fields(things)) == []
    assert model.trainer is earlier


def test_model_that_the_trainer_has_validated_stays_as_it_is(tmp_path):
    model, trainer = Failing(), trainer_for(tmp_path)
    trainer.validate(model, loader(), verbose=False)
    things = [model, trainer]
    before = fields(things)
    search(trainer, model, loader(), loader())
    assert differences(before, fields(things)) == []


def test_ctrl_c_leaves_a_process_that_goes_on(tmp_path):
    """A real signal, in the midst of a trial; the next one raises again, and what follows trains."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys, warnings
            from pathlib import Path

            sys.path.insert(0, sys.argv[1])
            signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
            warnings.filterwarnings("ignore")
            import torch
            from integration.models import loader, same, weights_of
            from integration.searching import Failing, RaisesAt, search, trainer_for

            class Pressed(RaisesAt):
                def __call__(self):
                    self.left -= 1
                    if self.left == 0:
                        os.kill(os.getpid(), signal.SIGINT)

            torch.manual_seed(0)
            model = Failing(Pressed(30, None))
            trainer = trainer_for(Path(sys.argv[2]))
            before, state = weights_of(model), torch.get_rng_state()
            for attempt in range(2):
                model.raises.left = 30
                try:
                    search(trainer, model, loader(), loader(), progress=True)
                except KeyboardInterrupt:
                    print("interrupted", attempt)
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
                assert same(before, weights_of(model)) and torch.equal(state, torch.get_rng_state())
            trainer.fit(model, loader(), loader())
            print("trained", trainer.global_step)
            """
        )
    )
    command = [sys.executable, str(script), str(TESTS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("interrupted", "trained"))]
    assert lines == ["interrupted 0", "interrupted 1", "trained 20"]
