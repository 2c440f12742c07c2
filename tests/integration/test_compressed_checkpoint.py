"""The compressed file beside the best checkpoint: the right weights, in the right place, at the right time."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcsr import CompressedCheckpoint, CoupledGroupLasso, load_compressed

from .models import Regression, ValidatedRegression, loader, make_trainer, same


def files(path: Path) -> set[str]:
    """All compressed files and what might be left of one."""
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.suffix in (".safetensors", ".tmp")}


def train(path: Path, *callbacks: Callback, module: LightningModule | None = None, **kwargs: Any) -> LightningModule:
    module = Regression() if module is None else module
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(path, callbacks, **{"max_epochs": 3, "enable_checkpointing": checkpoints} | kwargs)
    trainer.fit(module, loader(), *([loader()] if isinstance(module, ValidatedRegression) else []))
    return module


class Worse(ValidatedRegression):
    """Its best epoch is the second one, whatever it learns."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("score", abs(self.current_epoch - 1.0))


@pytest.mark.parametrize(
    "options",
    [{}, {"save_weights_only": True}, {"save_last": True}, {"save_top_k": -1}],
    ids=lambda o: "".join(o) or "plain",
)
def test_the_weights_are_those_of_the_best_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    best = ModelCheckpoint(tmp_path / "kept", monitor="score", **options)
    compressed = CompressedCheckpoint()
    module = train(tmp_path, compressed, best, module=Worse())
    assert compressed.path == best.best_model_path.replace(".ckpt", ".safetensors")
    assert files(tmp_path) == {"kept/epoch=1-step=8.safetensors"}
    loaded = load_compressed(compressed.path)
    assert same(loaded, torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert not same(loaded, module.state_dict())
    Worse().load_state_dict(loaded)


def test_of_several_it_is_the_first_as_for_lightning(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "first", monitor="score")
    second = ModelCheckpoint(tmp_path / "second", monitor="score", mode="max")
    train(tmp_path, first, second, CompressedCheckpoint(), module=Worse())
    assert files(tmp_path) == {"first/epoch=1-step=8.safetensors"}


def test_without_a_monitor_it_is_the_last_checkpoint(tmp_path: Path) -> None:
    compressed = CompressedCheckpoint()
    module = train(tmp_path, compressed, ModelCheckpoint(tmp_path))
    assert files(tmp_path) == {"epoch=2-step=12.safetensors"}
    assert same(load_compressed(compressed.path), module.state_dict())


def test_a_checkpoint_that_is_written_in_the_background_is_waited_for(tmp_path: Path) -> None:
    compressed = CompressedCheckpoint()
    module = train(tmp_path, compressed, ModelCheckpoint(tmp_path), plugins=[AsyncCheckpointIO()])
    assert same(load_compressed(compressed.path), module.state_dict())


@pytest.mark.parametrize(
    ("callbacks", "logger", "place"),
    [
        ([], False, "model.safetensors"),
        ([], True, "logs/version_0/model.safetensors"),
        ([ModelCheckpoint(save_top_k=0)], False, "checkpoints/model.safetensors"),
    ],
    ids=["root", "logger", "no best"],
)
def test_without_a_best_checkpoint_it_is_the_weights_at_the_end(
    tmp_path: Path, callbacks: list[Callback], logger: bool, place: str
) -> None:
    compressed = CompressedCheckpoint()
    loggers = CSVLogger(tmp_path, "logs") if logger else False
    module = train(tmp_path, compressed, *callbacks, logger=loggers)
    assert compressed.path == str(tmp_path / place)
    assert files(tmp_path) == {place}
    assert same(load_compressed(compressed.path), module.state_dict())


@pytest.mark.parametrize("filename", ["small", "small.safetensors"])
@pytest.mark.parametrize("best", [False, True])
def test_the_place_can_be_given(tmp_path: Path, filename: str, best: bool) -> None:
    callbacks = [ModelCheckpoint(tmp_path / "kept")] if best else []
    compressed = CompressedCheckpoint(tmp_path / "new" / "folder", filename)
    train(tmp_path, compressed, *callbacks)
    assert files(tmp_path) == {"new/folder/small.safetensors"}


def test_it_says_what_it_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compressed = CompressedCheckpoint()
    assert compressed.path is None
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        train(tmp_path, compressed)
    size = Path(compressed.path).stat().st_size
    [line] = [m for m in caplog.messages if m.startswith("CompressedCheckpoint")]
    assert line == (
        f"CompressedCheckpoint: {compressed.path}, {size:,} bytes, {size / 196:.1%} of the 196 bytes"
        " of the last weights."
    )


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # as it should
def test_after_a_resume_it_is_the_best_of_both_runs(tmp_path: Path) -> None:
    train(tmp_path, ModelCheckpoint(tmp_path, monitor="score", save_last=True), module=Worse())
    best, compressed = ModelCheckpoint(tmp_path, monitor="score"), CompressedCheckpoint()
    trainer = make_trainer(tmp_path, [best, compressed], max_epochs=5, enable_checkpointing=True)
    trainer.fit(Worse(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert compressed.path == str(tmp_path / "epoch=1-step=8.safetensors")


def test_a_second_fit_writes_again(tmp_path: Path) -> None:
    compressed, module = CompressedCheckpoint(), Regression()
    trainer = make_trainer(tmp_path, [compressed])
    trainer.fit(module, loader())
    before = load_compressed(compressed.path)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert not same(load_compressed(compressed.path), before)
    assert same(load_compressed(compressed.path), module.state_dict())


@pytest.mark.filterwarnings(r"ignore:You are trying to `self.log\(\)`:UserWarning")  # which barebones does not do
@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
def test_a_run_that_leaves_nothing_leaves_no_file(tmp_path: Path, mode: str) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[CompressedCheckpoint()],
        default_root_dir=tmp_path,
        **{mode: True},
    )
    trainer.fit(Regression(), loader())
    assert not files(tmp_path)


def test_a_run_that_fails_leaves_no_file(tmp_path: Path) -> None:
    class Fails(Regression):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(tmp_path, CompressedCheckpoint(), module=Fails())
    assert not files(tmp_path)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_only_fit_writes(tmp_path: Path, stage: str) -> None:
    class Tested(ValidatedRegression):
        def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    trainer = make_trainer(tmp_path, [CompressedCheckpoint()])
    getattr(trainer, stage)(Tested(), loader(), verbose=False)
    assert not files(tmp_path)


# --- refusals ------------------------------------------------------------------------------------------------------


class NoSteps(Regression):
    """Fails if it is trained."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        raise AssertionError


class ExtraState(NoSteps):
    """Has something in its state dict that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


def test_a_state_dict_of_more_than_tensors_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="must hold nothing but tensors, got '_extra_state'"):
        train(tmp_path, CompressedCheckpoint(), module=ExtraState())


def test_sharded_weights_are_refused_at_setup() -> None:
    # The strategy asks for a GPU if it is the Trainer that starts it.
    trainer = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy), precision="32-true")
    with pytest.raises(MisconfigurationException, match="does not support ModelParallelStrategy"):
        CompressedCheckpoint().setup(trainer, NoSteps(), "fit")


def test_remote_checkpoints_need_a_folder_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"the checkpoints go to memory://kept\. Give it a `dirpath`"):
        train(tmp_path, CompressedCheckpoint(), ModelCheckpoint("memory://kept"), module=NoSteps())


# --- checkpoints that are not there, or not readable as they are ---------------------------------------------------


class Custom:
    """Not something that torch loads with weights_only=True."""


def test_objects_among_the_hyperparameters_do_not_matter(tmp_path: Path) -> None:
    module, best, compressed = Worse(), ModelCheckpoint(tmp_path, monitor="score"), CompressedCheckpoint()
    module.save_hyperparameters({"custom": Custom(), "path": tmp_path})
    train(tmp_path, compressed, best, module=module)
    assert compressed.path == best.best_model_path.replace(".ckpt", ".safetensors")
    expected = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert same(load_compressed(compressed.path), expected)


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_without_the_best_checkpoint_it_is_the_last_weights_and_a_warning(tmp_path: Path, damage: str) -> None:
    class Damages(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            path = Path(best.best_model_path)
            path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:1000])

    best, compressed = ModelCheckpoint(tmp_path, monitor="score"), CompressedCheckpoint()
    module = Worse()
    with pytest.warns(UserWarning, match=r"cannot read the best checkpoint, .*epoch=1.*, and writes the last weights"):
        train(tmp_path, Damages(), compressed, best, module=module)
    assert compressed.path == str(tmp_path / "model.safetensors")
    assert same(load_compressed(compressed.path), module.state_dict())


def test_a_file_that_cannot_be_written_is_a_warning_and_no_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    compressed = CompressedCheckpoint(tmp_path / "file")
    with pytest.warns(UserWarning, match=r"`CompressedCheckpoint` cannot write .*model\.safetensors\. The reason: "):
        train(tmp_path, compressed)
    assert compressed.path is None


class ShuffledIO(TorchCheckpointIO):
    """A format of one's own: nobody else can read it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        Path(path).write_bytes(Path(path).read_bytes()[::-1])

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return torch.load(io.BytesIO(Path(path).read_bytes()[::-1]), weights_only=True)


@pytest.mark.parametrize("wrap", [lambda plugin: plugin, AsyncCheckpointIO], ids=["plugin", "wrapped"])
def test_checkpoints_are_read_by_the_plugin_that_wrote_them(tmp_path: Path, wrap: Any) -> None:
    best, compressed = ModelCheckpoint(tmp_path, monitor="score"), CompressedCheckpoint()
    module = train(tmp_path, compressed, best, module=Worse(), plugins=[wrap(ShuffledIO())])
    assert compressed.path == str(tmp_path / "epoch=1-step=8.safetensors")
    assert not same(load_compressed(compressed.path), module.state_dict())


# --- the sparsity that is asked for --------------------------------------------------------------------------------


class Sparsifies(Callback):
    """Sets all weights of the first layer to zero from the third epoch on: 80 % of the weights."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch >= 2:
            pl_module.net[0].weight.data.zero_()


class BestFirst(Regression):
    """The score, logged at the end of an epoch, is best in the first one, and then in the fourth."""

    def on_train_epoch_end(self) -> None:
        self.log("score", [0.0, 4.0, 3.0, 1.0, 2.0][self.current_epoch])


class ValidatedBestFirst(ValidatedRegression):
    """The same as a metric of the validation."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("score", [0.0, 4.0, 3.0, 1.0, 2.0][self.current_epoch])

    def on_validation_start(self) -> None:
        if self.current_epoch >= 2 and not self.trainer.sanity_checking:
            self.net[0].weight.data.zero_()


class KeepsStates(Callback):
    """The weights after each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})


@pytest.mark.parametrize("module_class", [BestFirst, ValidatedBestFirst])
def test_min_sparsity_keeps_the_best_of_those_that_are_sparse_enough(tmp_path: Path, module_class: Any) -> None:
    best, compressed = ModelCheckpoint(tmp_path, monitor="score"), CompressedCheckpoint(min_sparsity=0.8)
    states = KeepsStates()
    train(tmp_path, Sparsifies(), states, compressed, best, module=module_class(), max_epochs=5)
    assert best.best_model_path.endswith("epoch=0-step=4.ckpt")
    assert compressed.path == str(tmp_path / "model.safetensors")
    assert same(load_compressed(compressed.path), states.states[3])


class UnfreezesLate(Regression):
    """Its last layer is trained from the fourth epoch on. The score is best in the third, and then in the fifth."""

    def on_train_epoch_start(self) -> None:
        self.net[-1].requires_grad_(self.current_epoch >= 3)

    def on_train_epoch_end(self) -> None:
        self.log("score", [9.0, 9.0, 0.0, 2.0, 1.0][self.current_epoch])


def test_weights_that_were_sparse_in_the_trained_part_alone_do_not_stay(tmp_path: Path) -> None:
    states, compressed = KeepsStates(), CompressedCheckpoint(min_sparsity=0.8)
    best = ModelCheckpoint(tmp_path, monitor="score")
    train(tmp_path, Sparsifies(), states, compressed, best, module=UnfreezesLate(), max_epochs=5)
    assert best.best_model_path.endswith("epoch=2-step=12.ckpt")
    assert same(load_compressed(compressed.path), states.states[4])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_min_sparsity_goes_on_after_a_resume(tmp_path: Path) -> None:
    states = KeepsStates()
    checkpoints = {"monitor": "score", "save_last": True, "save_top_k": -1}
    train(
        tmp_path,
        Sparsifies(),
        states,
        CompressedCheckpoint(min_sparsity=0.8),
        ModelCheckpoint(tmp_path, **checkpoints),
        module=BestFirst(),
        max_epochs=4,
    )
    compressed = CompressedCheckpoint(min_sparsity=0.8)
    trainer = make_trainer(
        tmp_path,
        [Sparsifies(), compressed, ModelCheckpoint(tmp_path, **checkpoints)],
        max_epochs=5,
        enable_checkpointing=True,
    )
    trainer.fit(
        BestFirst(), loader(), ckpt_path=tmp_path / "epoch=3-step=16.ckpt"
    )  # whose fifth epoch is worse than the fourth
    assert same(load_compressed(compressed.path), states.states[3])


def test_validating_a_checkpoint_leaves_the_best_score_alone(tmp_path: Path) -> None:
    compressed = CompressedCheckpoint(min_sparsity=0.0)
    saving, module = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=-1), ValidatedBestFirst()
    trainer = make_trainer(tmp_path, [compressed, saving], max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    assert compressed.state_dict()["score"] == 4.0
    trainer.validate(module, loader(), ckpt_path=tmp_path / "epoch=0-step=4.ckpt", verbose=False, weights_only=True)
    assert compressed.state_dict()["score"] == 4.0


class LooksAfterTheEpoch(ValidatedRegression):
    """The score is known at the end of an epoch only; the weights are sparse from the second validation on."""

    def on_validation_start(self) -> None:
        if self.current_epoch >= 1 and not self.trainer.sanity_checking:
            self.net[0].weight.data.zero_()

    def on_train_epoch_end(self) -> None:
        self.log("score", [0.0, 4.0, 1.0, 2.0, 3.0][self.current_epoch])


def test_a_metric_of_the_last_epoch_does_not_go_with_the_weights_of_this_one(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="score", save_on_train_epoch_end=True)
    states, compressed = KeepsStates(), CompressedCheckpoint(min_sparsity=0.8)
    train(tmp_path, states, compressed, best, module=LooksAfterTheEpoch(), max_epochs=5)
    assert same(load_compressed(compressed.path), states.states[2])


def test_weights_that_are_never_sparse_enough_are_the_last_ones_and_a_warning(tmp_path: Path) -> None:
    compressed = CompressedCheckpoint(min_sparsity=0.9)
    with pytest.warns(UserWarning, match=r"No weights .* reached min_sparsity=0\.9.* with a sparsity of 80\.0%"):
        module = train(tmp_path, Sparsifies(), compressed, ModelCheckpoint(tmp_path, monitor="loss"))
    assert same(load_compressed(compressed.path), module.state_dict())


class Target(Callback):
    """What it looks for in a callback that has a target."""

    target_sparsity = 0.8


def test_a_best_checkpoint_from_before_the_target_is_said(tmp_path: Path) -> None:
    compressed, best = CompressedCheckpoint(), ModelCheckpoint(tmp_path, monitor="score")
    with pytest.warns(UserWarning, match=r"sparsity of 0\.0%, and target_sparsity=0\.8 asks .*\(min_sparsity=0\.79\)"):
        train(tmp_path, Target(), Sparsifies(), compressed, best, module=BestFirst(), max_epochs=5)
    assert compressed.path == best.best_model_path.replace(".ckpt", ".safetensors")
    last = ModelCheckpoint(tmp_path / "last")  # which has reached it: no warning
    train(tmp_path, Target(), Sparsifies(), CompressedCheckpoint(), last, module=BestFirst(), max_epochs=5)


class GroupTarget(Target):
    """A target that counts groups."""

    penalty = CoupledGroupLasso()


def test_a_target_of_coupled_groups_is_not_compared_with_a_share_of_weights(tmp_path: Path) -> None:
    train(tmp_path, GroupTarget(), CompressedCheckpoint(), ModelCheckpoint(tmp_path))  # and no warning


@pytest.mark.parametrize(
    ("min_sparsity", "message"),
    [
        (None, r"target_sparsity=0\.8 asks for more: it has the weights that EMAWeightAveraging averaged\."),
        (0.5, r"min_sparsity writes the weights of the training, and EMAWeightAveraging validates averaged ones"),
    ],
)
def test_averaged_weights_are_named_as_the_reason(tmp_path: Path, min_sparsity: float | None, message: str) -> None:
    compressed, best = CompressedCheckpoint(min_sparsity=min_sparsity), ModelCheckpoint(tmp_path, monitor="score")
    callbacks = [Target(), EMAWeightAveraging(decay=0.9), compressed, best]
    with pytest.warns(UserWarning, match=message):
        train(tmp_path, *callbacks, module=ValidatedBestFirst(), max_epochs=5)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_bad_min_sparsity_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"`min_sparsity` must be a number in \[0, 1\], got min_sparsity="):
        CompressedCheckpoint(min_sparsity=value)
