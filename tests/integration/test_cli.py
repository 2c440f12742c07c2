"""Every argument of the callbacks from YAML and from the command line."""

import inspect
import json
import sys
from functools import partial

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_gcsr import (
    CompressionMonitor,
    ElasticNet,
    Gate,
    GradientCoherentRegularization,
    GroupLasso,
    KeepZeros,
    Schedule,
)
from lightning_gcsr.core.penalties import resolve_penalty

from .models import FEATURES, Regression, loader, steps_of

# Lightning 2.6 calls `add_instantiator` of jsonargparse, which newer versions of that deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "max_epochs": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
REGULARIZATION = "lightning_gcsr.GradientCoherentRegularization"
MONITOR = "lightning_gcsr.CompressionMonitor"
KEEP_ZEROS = "lightning_gcsr.KeepZeros"


class CommandLineModel(Regression):
    """A model without arguments."""

    def __init__(self) -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def empty_command_line(monkeypatch):
    """Lightning warns where the process has a command line of its own beside `args`, as pytest's has."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


def parse(args):
    """The callbacks that the command line makes, ours only."""
    cli = LightningCLI(
        CommandLineModel,
        args=args,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults=QUIET,
    )
    ours = (GradientCoherentRegularization, CompressionMonitor, KeepZeros)
    return cli, [callback for callback in cli.trainer.callbacks if isinstance(callback, ours)]


def plain(init_args, separator=None):
    """Gates and schedules as a user writes them: the fields that are not the defaults, nested or joined by a dot."""
    written = {}
    for name, value in init_args.items():
        if not isinstance(value, (Gate, Schedule)):
            written[name] = value
            continue
        fields = {key: given for key, given in vars(value).items() if given != vars(type(value)())[key]}
        written |= {f"{name}{separator}{key}": given for key, given in fields.items()} if separator else {name: fields}
    return written


def from_yaml(tmp_path, class_path, init_args):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": class_path, "init_args": plain(init_args)}]}})
    )
    _, [callback] = parse(["--config", str(path)])
    return callback


def from_command_line(class_path, init_args):
    args = [f"--trainer.callbacks={class_path}"]
    for name, value in plain(init_args, separator=".").items():
        args.append(f"--trainer.callbacks.{name}={value if isinstance(value, str) else json.dumps(value)}")
    _, [callback] = parse(args)
    return callback


ARGUMENTS = {
    "plain": {"strength": 0.05},
    "integer strength": {"strength": 0},
    "strength in scientific notation": {"strength": 1e-05},
    "strength by name": {"strength": {r"net\.0": 0.01, "weight$": 0.1}},
    "elastic net": {"strength": 0.05, "penalty": "elastic_net"},
    "group lasso": {"strength": 0.05, "penalty": "group_lasso", "gate": Gate("temporal", scope="element")},
    "direction": {"strength": 0.05, "penalty": "l2", "gate": Gate("direction", scope="model", threshold=0.3)},
    "no measure": {"strength": 0.05, "gate": None},
    "selection": {"strength": 0.05, "include": ["weight", r"bias\b"], "exclude": [r"net\.2\..*"]},
    "no selection": {"strength": 0.05, "include": None, "exclude": None},
    "the rest": {
        "strength": 0.05,
        "strength_scale": "fan_in",
        "update": "proximal",
        "name": "my-name_2.0",
        "log_per_parameter": True,
        "gate": Gate(scope="parameter", threshold=-0.5),
        "schedule": Schedule(delay=3, warmup=4, stop=9),
    },
    "no stop": {"strength": 0.05, "schedule": Schedule(stop=None)},
    "shares": {"strength": 0.05, "schedule": Schedule(delay=0.1, warmup=0.3, stop=0.75)},
    "the whole as a share": {"strength": 0.05, "schedule": Schedule(delay=0.0, warmup=1.0, stop=1.0)},
    "steps": {"strength": 0.05, "schedule": Schedule(warmup=100, stop=1)},
    "shares and steps": {"strength": 0.05, "schedule": Schedule(delay=1, warmup=0.5, stop=1000)},
    "average and tolerance": {"strength": 0.05, "gate": Gate(averaging=0.98, tolerance=0.5)},
    "integers for numbers": {"strength": 0.05, "gate": Gate(averaging=0, tolerance=1)},
    "target": {"target_sparsity": 0.9},
    "target and no strength": {"target_sparsity": 0.5, "strength": None, "schedule": Schedule(warmup=0)},
    "target and more": {
        "target_sparsity": 0.995,
        "penalty": "group_lasso",
        "strength_scale": "fan_in",
        "gate": None,
        "schedule": Schedule(delay=0.1, stop=0.75),
    },
    "strength and no target": {"strength": 0.05, "target_sparsity": None},
}


def assert_arrived(callback, arguments):
    expected = GradientCoherentRegularization(**arguments)
    assert type(callback) is GradientCoherentRegularization
    for name in ("gate", "schedule", *arguments):
        assert repr(getattr(callback, name)) == repr(getattr(expected, name)) or name == "strength"
    assert callback.strength == expected.strength


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_arrive_from_yaml(tmp_path, case):
    assert_arrived(from_yaml(tmp_path, REGULARIZATION, ARGUMENTS[case]), ARGUMENTS[case])


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_arrive_from_the_command_line(case):
    assert_arrived(from_command_line(REGULARIZATION, ARGUMENTS[case]), ARGUMENTS[case])


def test_every_argument_is_among_the_cases():
    named = {name for arguments in ARGUMENTS.values() for name in arguments}
    assert named == set(inspect.signature(GradientCoherentRegularization).parameters)


PENALTIES = [
    ({"class_path": "lightning_gcsr.GroupLasso", "init_args": {"dim": 1}}, GroupLasso(dim=1)),
    ({"class_path": "lightning_gcsr.GroupLasso"}, GroupLasso()),
    ({"class_path": "lightning_gcsr.ElasticNet", "init_args": {"l1_ratio": 0.25}}, ElasticNet(0.25)),
    ("l2", resolve_penalty("l2")),
]


@pytest.mark.parametrize(("penalty", "expected"), PENALTIES, ids=lambda value: repr(value) if value else None)
def test_penalty_arrives_from_yaml(tmp_path, penalty, expected):
    callback = from_yaml(tmp_path, REGULARIZATION, {"strength": 0.1, "penalty": penalty})
    assert repr(resolve_penalty(callback.penalty)) == repr(expected)


@pytest.mark.parametrize(("penalty", "expected"), PENALTIES, ids=lambda value: repr(value) if value else None)
def test_penalty_arrives_from_the_command_line(penalty, expected):
    callback = from_command_line(REGULARIZATION, {"strength": 0.1, "penalty": penalty})
    assert repr(resolve_penalty(callback.penalty)) == repr(expected)


def test_penalty_class_and_its_arguments_arrive_one_by_one():
    _, [callback] = parse(
        [
            f"--trainer.callbacks={REGULARIZATION}",
            "--trainer.callbacks.strength=0.1",
            "--trainer.callbacks.penalty=lightning_gcsr.GroupLasso",
            "--trainer.callbacks.penalty.dim=1",
        ]
    )
    assert repr(callback.penalty) == "GroupLasso(dim=1)"


MONITORS = [
    {},
    {"zero_threshold": 1e-3, "per_parameter": False, "histograms": True},
    {"include": ["weight", "bias"], "exclude": [r"net\.2"]},
    {"include": None, "exclude": None},
    {"prog_bar": True, "verbose": False},
]


@pytest.mark.parametrize("arguments", MONITORS, ids=str)
@pytest.mark.parametrize("source", ["yaml", "command line"])
def test_arguments_of_the_monitor_arrive(tmp_path, source, arguments):
    make = partial(from_yaml, tmp_path) if source == "yaml" else from_command_line
    callback = make(MONITOR, arguments)
    expected = CompressionMonitor(**arguments)
    for name in inspect.signature(CompressionMonitor).parameters:
        assert getattr(callback, name) == getattr(expected, name)


ZEROS = [
    {},
    {"start": 100},
    {"start": 1},
    {"start": 0.5},
    {"start": 1.0},
    {"start": None, "include": ["weight", "bias"], "exclude": [r"net\.2"]},
]


@pytest.mark.parametrize("arguments", ZEROS, ids=str)
@pytest.mark.parametrize("source", ["yaml", "command line"])
def test_arguments_of_keep_zeros_arrive(tmp_path, source, arguments):
    make = partial(from_yaml, tmp_path) if source == "yaml" else from_command_line
    callback = make(KEEP_ZEROS, arguments)
    assert type(callback) is KeepZeros
    for name in ("start", "include", "exclude"):
        value = arguments.get(name)
        assert getattr(callback, name) == value
        assert type(getattr(callback, name)) is type(value)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("gate.coherence", "directoin", "direction"),
        ("gate.scope", "elements", "element"),
        ("update", "prox", "proximal"),
        ("strength_scale", "fanin", "fan_in"),
        ("penalty", "l3", "group_lasso"),
        ("strength", "-1", "`strength` must be a finite number of at least 0"),
        ("schedule.delay", "1.5", "`delay` must be a number in [0, 1], got delay=1.5"),
        ("schedule.warmup", "half", "int"),
        ("gate.averaging", "1.0", "`averaging` must be less than 1"),
        ("gate.tolerance", "2", "`tolerance` must be a number in [0, 1]"),
        ("schedule.stop", "0", "`stop` must be greater than delay=0"),
        ("include", "[]", "`include` must have at least one regular expression"),
        ("stregth", "0.1", "stregth"),
        ("coherence", "direction", "coherence"),
        ("target_sparsity", "1.5", "`target_sparsity` must be a number in [0, 1], got target_sparsity=1.5"),
        ("target_sparsity", "0", "`target_sparsity` must lie between 0 and 1"),
        ("target_sparsity", "0.9", "`strength` must be None where target_sparsity is given, got strength=0.1"),
        ("target_sparsity", "most", "float"),
    ],
)
def test_wrong_argument_exits_with_a_message_that_names_it(capsys, argument, value, message):
    args = [f"--trainer.callbacks={REGULARIZATION}"]
    if argument != "strength":
        args.append("--trainer.callbacks.strength=0.1")
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse([*args, f"--trainer.callbacks.{argument}={value}"])
    output = capsys.readouterr().err + str(caught.value)
    assert argument.rpartition(".")[2] in output
    assert message in output


def test_neither_strength_nor_target_is_told_with_both_ways_out(capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse([f"--trainer.callbacks={REGULARIZATION}"])
    output = capsys.readouterr().err + str(caught.value)
    assert "`strength` must be given, got strength=None" in output
    assert "`find_strength` finds one; or give `target_sparsity`" in output


def test_a_target_of_the_command_line_trains(tmp_path):
    cli, [callback] = parse(
        [
            f"--trainer.callbacks={REGULARIZATION}",
            "--trainer.callbacks.target_sparsity=0.5",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.fast_dev_run=2",
        ]
    )
    cli.trainer.fit(cli.model, loader())
    assert steps_of(callback) == 2
    assert callback.controller.target == 0.5
    assert callback.controller.growth > 0


def test_parsed_callbacks_train(tmp_path):
    cli, [callback, monitor, keep_zeros] = parse(
        [
            f"--trainer.callbacks+={REGULARIZATION}",
            "--trainer.callbacks.strength={weight: 0.1}",
            "--trainer.callbacks.update=proximal",
            "--trainer.callbacks.gate.averaging=0.9",
            "--trainer.callbacks.schedule.warmup=0.25",
            "--trainer.callbacks.schedule.stop=0.5",
            f"--trainer.callbacks+={MONITOR}",
            "--trainer.callbacks.per_parameter=false",
            f"--trainer.callbacks+={KEEP_ZEROS}",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.log_every_n_steps=1",
        ]
    )
    cli.trainer.fit(cli.model, loader())
    assert steps_of(callback) == 4
    assert callback.regularizer.schedule.stop == 0.5
    assert keep_zeros.state_dict()["zeros"]
    assert not monitor.per_parameter
    assert cli.model.net[0].in_features == FEATURES
    assert "sparsity/model" in cli.trainer.callback_metrics
