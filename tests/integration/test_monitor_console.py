"""What the monitor shows on the console: two numbers in the progress bar, and a table when `fit` has ended."""

import sys

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar, StochasticWeightAveraging, TQDMProgressBar
from torch import nn

from lightning_gcsr import CompressionMonitor

from .models import Regression, ValidatedRegression, fit, loader, make_trainer
from .test_monitor import DiesSlowly, ValidatedDiesSlowly, regression_with

IN_BAR = ("sparsity", "compression")

# -- the progress bar ----------------------------------------------------------------------------------------------


def recording(bar_class):
    """A progress bar that keeps, after each batch and validation, what it shows of the monitor's numbers."""

    class Recording(bar_class):
        seen: list

        def __init__(self):
            super().__init__()
            self.seen = []

        def get_metrics(self, trainer, pl_module):
            metrics = super().get_metrics(trainer, pl_module)
            self.seen.append((trainer.global_step, {key: metrics[key] for key in IN_BAR if key in metrics}))
            return metrics

    return Recording()


@pytest.mark.parametrize("bar_class", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("bar_first", [True, False])
def test_bar_shows_sparsity_and_compression_on_request(tmp_path, bar_class, bar_first, capsys):
    bar, monitor = recording(bar_class), CompressionMonitor(prog_bar=True, verbose=False)
    callbacks = [bar, monitor] if bar_first else [monitor, bar]
    trainer = make_trainer(tmp_path, callbacks, enable_progress_bar=True, max_epochs=2)
    trainer.fit(ValidatedDiesSlowly(), loader(), loader(count=4))
    step, shown = bar.seen[-1]
    assert step == 8
    assert shown == {"sparsity": pytest.approx(8 / 40), "compression": pytest.approx(40 / 32)}
    if not bar_first:  # of the step just made, not of the one before
        assert all(shown["sparsity"] == pytest.approx(step / 40) for step, shown in bar.seen if step)
    if bar_class is TQDMProgressBar:
        assert "sparsity=0.200, compression=1.250" in capsys.readouterr().out


@pytest.mark.parametrize("bar_class", [TQDMProgressBar, RichProgressBar])
def test_bar_shows_nothing_of_it_without_being_asked(tmp_path, bar_class):
    bar = recording(bar_class)
    fit(tmp_path, DiesSlowly(), [CompressionMonitor(), bar], enable_progress_bar=True)
    assert bar.seen
    assert not any(shown for _, shown in bar.seen)


@pytest.mark.parametrize("bar_class", [TQDMProgressBar, RichProgressBar])
def test_bar_shows_an_infinite_ratio(tmp_path, bar_class):
    bar = recording(bar_class)
    monitor = CompressionMonitor(prog_bar=True, include=[r"net\.0\.weight"])
    fit(tmp_path, regression_with(*[0.0] * 32), [monitor, bar], enable_progress_bar=True)
    assert bar.seen[-1][1] == {"sparsity": 1.0, "compression": float("inf")}


# -- the table at the end ------------------------------------------------------------------------------------------


@pytest.fixture(params=["rich", "plain"])
def console(request, monkeypatch):
    """With rich, and as if it were not installed."""
    if request.param == "plain":
        for name in ("rich", "rich.box", "rich.console", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)
    return request.param


def cells(output, first):
    """The words of the line that begins with these."""
    [line] = [line for line in output.splitlines() if line.strip().startswith(first)]
    return line.split()


def test_table_of_the_layers_is_printed_when_fit_has_ended(tmp_path, console, capsys):
    fit(tmp_path, regression_with(*[0.0] * 32), CompressionMonitor(), max_epochs=2)
    output = capsys.readouterr().out
    assert output.startswith(
        "80.00% of 40 weights are zero: compression ratio 5.0×."
        " Stored size of all parameters: 72 of 196 bytes, 36.7%.\n"
    )
    assert cells(output, "layer") == [
        "layer",
        "shape",
        "weights",
        "sparsity",
        "encoding",
        "stored",
        "size",
        "of",
        "dense",
    ]
    assert cells(output, "net.0") == ["net.0.weight", "8×4", "32", "100.00%", "bitmask", "4", "3.1%"]
    assert cells(output, "net.2") == ["net.2.weight", "1×8", "8", "0.00%", "dense", "32", "100.0%"]
    assert cells(output, "all") == ["all", "2", "layers", "40", "80.00%", "36", "22.5%"]
    assert ("─" in output) == (console == "rich")


def test_table_of_a_large_model_is_short_and_names_are_whole(tmp_path, console, capsys):
    class Named(nn.Sequential):
        """Layers with names longer than a line, which look like rich's markup."""

    names = [f"[bold]encoder_block_{i:03}" for i in range(50)]
    net = Named()
    for name in names:
        net.add_module(name, nn.Linear(4, 4))
    net.add_module("head", nn.Linear(4, 1))
    fit(tmp_path, Regression(net), CompressionMonitor())
    output = capsys.readouterr().out
    assert len(output.splitlines()) < 30
    assert cells(output, "and")[:4] == ["and", "31", "more", "484"]
    assert cells(output, "all")[:4] == ["all", "51", "layers", "804"]
    for name in names[:20]:
        assert f"{name}.weight" in output
    assert "head.weight" not in output  # the smallest


def test_threshold_is_named(tmp_path, capsys):
    fit(tmp_path, regression_with(0.0, 1e-4), CompressionMonitor(zero_threshold=1e-3))
    assert capsys.readouterr().out.startswith("5.00% of 40 weights are at most 0.001: compression ratio 1.1×.")


class Raises(Callback):
    """A training that ends before its time."""

    def __init__(self, exception):
        self.exception = exception

    def on_train_epoch_end(self, trainer, pl_module):
        raise self.exception


@pytest.mark.parametrize(
    "arguments", [{"fast_dev_run": 2}, {"max_steps": 0, "max_epochs": -1}, {"limit_train_batches": 0}], ids=str
)
@pytest.mark.filterwarnings("ignore:`Trainer\\(limit_train_batches=0\\)`")
def test_nothing_is_printed_where_nothing_was_trained(tmp_path, arguments, capsys):
    monitor = CompressionMonitor()
    trainer = make_trainer(tmp_path, [monitor], num_sanity_val_steps=1, **arguments)
    trainer.fit(ValidatedRegression(), loader(), loader())
    assert "weights" not in capsys.readouterr().out
    assert monitor.summary is None


@pytest.mark.parametrize("exception", [RuntimeError("an error"), KeyboardInterrupt()], ids=str)
def test_nothing_is_printed_after_an_exception(tmp_path, exception, capsys):
    with pytest.raises((RuntimeError, SystemExit)):
        fit(tmp_path, DiesSlowly(), [CompressionMonitor(), Raises(exception)])
    assert "weights" not in capsys.readouterr().out


def test_nothing_is_printed_under_barebones(capsys):
    class Silent(Regression):
        def log(self, *_, **__):
            """`Trainer(barebones=True)` warns of every use of it."""

    trainer = Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[CompressionMonitor()])
    trainer.fit(Silent(), loader())
    assert "weights" not in capsys.readouterr().out


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_silences_it_and_the_numbers_stay(tmp_path, verbose, capsys):
    monitor = CompressionMonitor(verbose=verbose)
    fit(tmp_path, DiesSlowly(), monitor)
    assert ("weights are zero" in capsys.readouterr().out) == verbose
    assert monitor.summary.sparsity == pytest.approx(4 / 40)
    assert monitor.summary.sparsity_by_parameter == {"net.0.weight": pytest.approx(4 / 32), "net.2.weight": 0.0}


@pytest.mark.parametrize("monitor_first", [True, False])
def test_table_is_of_the_weights_that_are_left_in_the_model(tmp_path, monitor_first):
    """Averaged weights come into the model in `on_train_end`."""
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2, device=None)
    monitor, model = CompressionMonitor(), DiesSlowly()
    fit(tmp_path, model, [monitor, averaging] if monitor_first else [averaging, monitor], max_epochs=4)
    zeros = sum(int(torch.count_nonzero(model.net[i].weight == 0)) for i in (0, 2))
    assert 0 < zeros < 16
    assert monitor.summary.sparsity == pytest.approx(zeros / 40)
