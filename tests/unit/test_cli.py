"""The command ``lightning-gcsr``: its output for each kind of file, and its errors for every bad one."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_gcsr import __version__, count_tensors, load_compressed, save_compressed
from lightning_gcsr.cli import console, report
from lightning_gcsr.cli import main as cli
from lightning_gcsr.sparsity.state_dict_diff import differences
from lightning_gcsr.storage.inert_unpickler import Inert, load_inert
from lightning_gcsr.storage.weights_reader import read_weights
from tests.unit.test_compressed_file_hostile import identical, mutated

KINDS = ["checkpoint", "state_dict", "legacy", "safetensors", "compressed"]
MUTATIONS = 250  # of each kind


def weights() -> dict[str, Tensor]:
    """Every encoding, tensors of no entry and of one, and a name that no keyboard has."""
    generator = torch.Generator().manual_seed(0)
    few = torch.zeros(10, 40)
    few[2, 3], few[2, 30], few[7, 0] = 1.0, 2e-4, 3.0
    half = torch.randn(9, 8, generator=generator).masked_fill(torch.rand(9, 8, generator=generator) < 0.5, 0.0)
    return {
        "层.weight [red]": few,
        "half": half,
        "bias": torch.randn(10, generator=generator),
        "filters": torch.rand(4, 3, 2, 2, generator=generator) * torch.tensor([0.0, 1, 1, 0]).view(4, 1, 1, 1),
        "none": torch.empty(0, 3),
        "steps": torch.tensor(7),
    }


def write(path: Path, kind: str, tensors: dict[str, Tensor]) -> Path:
    """The tensors in a file of this kind."""
    if kind == "checkpoint":
        optimizer = {"state": {0: {"momentum_buffer": torch.randn(10, 40)}}}
        content = {"epoch": 3, "state_dict": tensors, "optimizer_states": [optimizer], "hyper_parameters": {"lr": 0.1}}
        torch.save(content, path)
    elif kind == "safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    elif kind == "compressed":
        save_compressed(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind != "legacy")
    return path


class Outcome(NamedTuple):
    code: object
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls the command in this process; whatever it raises but SystemExit fails the test."""
    monkeypatch.setattr(cli, "parser", functools.cache(cli.parser))

    def call(*arguments: object) -> Outcome:
        code: object
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        return Outcome(code, *capsys.readouterr())

    return call


def refused(outcome: Outcome, message: str) -> bool:
    """Whether it ended with this message, in one line, and said nothing else."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("lightning-gcsr: error: ")
    assert outcome.err.count("\n") == 1
    return re.search(message, outcome.err) is not None


# --- report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_json_agrees_with_count_tensors(tmp_path: Path, command: Command, kind: str, threshold: float) -> None:
    path = write(tmp_path / "model", kind, weights())
    outcome = command("report", path, "--json", "--threshold", threshold)
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert report["kind"] == {"legacy": "state_dict"}.get(kind, kind)
    assert report["file"] == str(path)
    assert report["threshold"] == threshold
    counts = {count.name: count for count in count_tensors(weights(), threshold)}
    assert {row["name"] for row in report["tensors"]} == set(counts)
    for row in report["tensors"]:
        count, tensor = counts[row["name"]], weights()[row["name"]]
        assert row["shape"] == list(count.shape)
        assert f"torch.{row['dtype']}" == str(tensor.dtype)
        assert (row["weights"], row["zeros"], row["near_zeros"]) == (count.entries, count.zeros, count.near_zeros)
        assert row["sparsity"] == count.near_zeros / max(1, count.entries)
        assert (row["dense_bytes"], row["stored_bytes"]) == (count.bytes.dense, count.bytes.best)
        assert (row["encoding"], row["tied_to"]) == (count.bytes.best_encoding, None)
    total = report["totals"]
    assert total["tensors"] == len(counts)
    for key in ("weights", "zeros", "near_zeros", "dense_bytes", "stored_bytes"):
        assert total[key] == sum(row[key] for row in report["tensors"])
    assert total["sparsity"] == total["near_zeros"] / total["weights"]
    assert total["compression_ratio"] == total["weights"] / (total["weights"] - total["near_zeros"])
    assert total["file_bytes"] == path.stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_csv_holds_what_json_holds(tmp_path: Path, command: Command, kind: str) -> None:
    path = write(tmp_path / "model", kind, weights() | {'a "name",\nof two lines': torch.ones(1)})
    lines = list(csv.DictReader(io.StringIO(command("report", path, "--csv").out)))
    rows = json.loads(command("report", path, "--json").out)["tensors"]
    assert list(lines[0]) == list(rows[0])
    for line, row in zip(lines, rows, strict=True):
        row["shape"] = "x".join(map(str, row["shape"]))
        assert line == {key: "" if value is None else str(value) for key, value in row.items()}


def test_empty_rows_and_columns_are_those_of_the_matrix(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path / "model", "state_dict", weights())
    rows = {row["name"]: row for row in json.loads(command("report", path, "--json").out)["tensors"]}
    empty = {name: (row["empty_rows"], row["empty_columns"]) for name, row in rows.items()}
    assert empty["层.weight [red]"] == (8, 37)
    assert empty["filters"] == (2, 0)  # of 4 filters, and of the 12 weights that each has
    assert empty["bias"] == empty["steps"] == (None, None)
    assert empty["none"] == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_names_every_tensor_in_full(tmp_path: Path, command: Command, kind: str) -> None:
    name = "a.very" + ".long" * 20 + ".name"
    path = write(tmp_path / "model", kind, weights() | {name: torch.zeros(2, 3)})
    outcome = command("report", path)
    assert (outcome.code, outcome.err) == (0, "")
    for shown in (*weights(), name, "10x40", "scalar", "float32", "empty columns"):
        assert shown in outcome.out
    assert "near zeros" not in outcome.out
    assert re.search(rf"^file size +{path.stat().st_size:,} bytes$", outcome.out, re.MULTILINE)
    assert re.search(r"^near zeros +\d+ up to 0\.001$", command("report", path, "--threshold", 1e-3).out, re.MULTILINE)


@pytest.mark.parametrize(
    ("sorting", "order"),
    [
        ("name", ["alpha", "beta", "gamma", "zeta"]),
        ("weights", ["beta", "zeta", "alpha", "gamma"]),
        ("zeros", ["beta", "alpha", "gamma", "zeta"]),
        ("sparsity", ["gamma", "beta", "alpha", "zeta"]),
        ("dense", ["zeta", "beta", "alpha", "gamma"]),
        ("stored", ["zeta", "beta", "alpha", "gamma"]),
        (None, ["zeta", "beta", "alpha", "gamma"]),
    ],
)
def test_rows_are_sorted_and_equals_stay_in_their_order(
    tmp_path: Path, command: Command, sorting: str | None, order: list[str]
) -> None:
    tensors = {
        "zeta": torch.ones(9, 10, dtype=torch.float64),
        "beta": torch.eye(10),
        "alpha": torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1, 1]),
        "gamma": torch.zeros(6),
    }
    path = write(tmp_path / "model", "state_dict", tensors)
    outcome = command("report", path, "--csv", *(["--sort", sorting] if sorting else []))
    assert [line["name"] for line in csv.DictReader(io.StringIO(outcome.out))] == order


def test_tied_tensors_count_once(tmp_path: Path, command: Command) -> None:
    weight = torch.eye(10)
    tied = {"encoder": weight, "decoder": weight.t(), "other": weight.clone()}
    for kind in ("checkpoint", "state_dict", "legacy", "compressed"):
        path = write(tmp_path / kind, kind, tied)
        report = json.loads(command("report", path, "--json").out)
        assert [row["tied_to"] for row in report["tensors"]] == [None, "encoder", None]
        assert [row["encoding"] for row in report["tensors"]] == ["bitmask", "tied", "bitmask"]
        assert [row["weights"] for row in report["tensors"]] == [100, 100, 100]
        assert [row["dense_bytes"] for row in report["tensors"]] == [400, 0, 400]
        assert (report["totals"]["tensors"], report["totals"]["weights"]) == (2, 200)
        assert "decoder is tied to encoder, and counted once" in command("report", path).out


def test_negative_zeros_are_zeros(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path / "model", "state_dict", {"w": -torch.eye(8)})  # −0.0 except on the diagonal
    [row] = json.loads(command("report", path, "--json").out)["tensors"]
    assert (row["zeros"], row["stored_bytes"], row["encoding"]) == (56, 40, "bitmask")


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensors_are_nothing_to_report(tmp_path: Path, command: Command, kind: str) -> None:
    path = write(tmp_path / "model", kind, {})
    assert "no weights" in command("report", path).out
    assert command("report", path, "--csv").out.count("\n") == 1
    totals = json.loads(command("report", path, "--json").out)["totals"]
    assert (totals["weights"], totals["sparsity"], totals["compression_ratio"]) == (0, 0.0, None)


def test_a_name_is_no_command_to_the_terminal(tmp_path: Path, command: Command) -> None:
    tensors = {"\x1b[2Jcleared": torch.zeros(2), "two\nlines": torch.zeros(2), "x" * 100_000: torch.zeros(2)}
    path = write(tmp_path / "model", "state_dict", tensors)
    outcome = command("report", path)
    assert "\x1b" not in outcome.out
    assert "\\x1b[2Jcleared" in outcome.out
    assert "two\\nlines" in outcome.out
    assert max(map(len, outcome.out.splitlines())) < 300  # of a huge name, all is there, in many lines
    assert outcome.out.count("x") >= 100_000
    assert [row["name"] for row in json.loads(command("report", path, "--json").out)["tensors"]] == list(tensors)


def test_values_that_are_no_tensors_are_named(tmp_path: Path, command: Command) -> None:
    torch.save({"w": torch.ones(2), "net._extra_state": {"scale": 2.0}}, tmp_path / "model")
    outcome = command("report", tmp_path / "model", "--csv")
    assert outcome.code == 0
    assert (
        outcome.err == f"lightning-gcsr: {tmp_path / 'model'}: left out, since they are not tensors: net._extra_state\n"
    )
    message = "its state dict holds net._extra_state, which is not a tensor. Leave it out."
    assert refused(command("compress", tmp_path / "model", tmp_path / "small"), message)
    assert refused(command("diff", tmp_path / "model", tmp_path / "model"), message)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("threshold", ["-1", "nan", "inf", "abc"])
def test_a_bad_threshold_is_an_error(tmp_path: Path, command: Command, threshold: str) -> None:
    outcome = command("report", write(tmp_path / "model", "state_dict", {}), f"--threshold={threshold}")
    assert (outcome.code, outcome.out) == (2, "")
    assert "threshold" in outcome.err


class Terminal(io.StringIO):
    """Pretends to be one."""

    def isatty(self) -> bool:
        return True

    def reconfigure(self, **settings: str) -> None:
        pass


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_a_narrow_terminal_gets_lines_in_place_of_the_table(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    path = write(tmp_path / "model", "state_dict", weights())
    zeros = write(tmp_path / "zeros", "state_dict", {k: v * 0 for k, v in weights().items()})
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert cli.main(["report", str(path)]) == 0
        assert cli.main(["diff", str(path), str(zeros)]) == 1
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert all(name in text for name in weights())
    assert ("empty columns  dense size" in text) is (columns == 200)
    assert ("  8 empty rows, 37 empty columns\n" in text) is (columns < 200)
    assert ("  3 of 400 differ, by 3 at most\n" in text) is (columns < 90)


# --- compress and expand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pt", ".PTH", ".bin", ".ckpt", ".safetensors"])
def test_what_is_compressed_and_expanded_is_the_same(tmp_path: Path, command: Command, kind: str, suffix: str) -> None:
    path, small, large = write(tmp_path / "in", kind, weights()), tmp_path / "small", tmp_path / f"large{suffix}"
    outcome = command("compress", path, small)
    assert (outcome.code, outcome.err) == (0, "")
    assert ("Only the weights of the checkpoint are kept, not epoch, " in outcome.out) is (kind == "checkpoint")
    dense = sum(tensor.nbytes for tensor in weights().values())
    stored = sum(count.bytes.best for count in count_tensors(weights()))
    size = small.stat().st_size
    shown = dict(re.findall(r"^(\w+ size) {2,}([\d,]+) bytes", outcome.out, re.MULTILINE))
    assert shown == {"dense size": f"{dense:,}", "stored size": f"{stored:,}", "file size": f"{size:,}"}
    assert command("expand", small, large).code == 0
    assert command("diff", path, large, "--exact").code == 0
    expected = dict(read_weights(path).tensors)
    if suffix == ".safetensors":
        assert identical(dict(sorted(load_file(large).items())), dict(sorted(expected.items())))
    else:
        content = torch.load(large, weights_only=True)
        assert identical(content["state_dict"] if suffix == ".ckpt" else content, expected)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "small", large.name}


class Net(LightningModule):
    """Something to load."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)


def test_lightning_loads_an_expanded_checkpoint(tmp_path: Path, command: Command) -> None:
    net = Net()
    save_compressed(net, tmp_path / "small")
    assert command("expand", tmp_path / "small", tmp_path / "net.ckpt").code == 0
    assert torch.equal(Net.load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True).net.weight, net.net.weight)


def test_ties_are_kept_where_the_file_can_hold_them(tmp_path: Path, command: Command) -> None:
    weight = torch.randn(3, 4)
    path = write(tmp_path / "model.pt", "state_dict", {"encoder": weight, "decoder": weight.t()})
    assert command("compress", path, tmp_path / "small").code == 0
    assert "copies" not in command("expand", tmp_path / "small", tmp_path / "tied.pt").out
    tied = torch.load(tmp_path / "tied.pt", weights_only=True)
    assert tied["encoder"].data_ptr() == tied["decoder"].data_ptr()
    outcome = command("expand", tmp_path / "small", tmp_path / "plain.safetensors")
    assert "A safetensors file cannot hold tied tensors; these are copies now: decoder." in outcome.out
    assert identical(load_file(tmp_path / "plain.safetensors"), {"decoder": weight.t(), "encoder": weight})
    assert command("diff", path, tmp_path / "plain.safetensors").code == 0


def test_a_file_is_replaced_only_if_that_is_asked_for(tmp_path: Path, command: Command) -> None:
    path, target = write(tmp_path / "in", "state_dict", weights()), tmp_path / "out.pt"
    target.write_bytes(b"old")
    for name in ("compress", "expand"):
        assert refused(command(name, path, target), r"out\.pt: this file exists\. Replace it with --overwrite\.")
        assert target.read_bytes() == b"old"
    assert command("compress", path, target, "--overwrite").code == 0
    assert command("compress", path, path, "--overwrite").code == 0  # in place: it is read from the old one to the end
    assert identical(load_compressed(path), weights())
    assert command("expand", path, path.rename(target), "--overwrite").code == 2  # the source is gone
    assert identical(load_compressed(target), weights())


def test_what_cannot_be_written_is_an_error_before_anything_is_read(tmp_path: Path, command: Command) -> None:
    small = write(tmp_path / "small", "compressed", weights())
    for name in ("compress", "expand"):
        assert refused(
            command(name, small, tmp_path / "none" / "out.pt"), "must lie in a folder that exists, got path="
        )
        (tmp_path / f"{name}.pt").mkdir()
        assert refused(command(name, small, tmp_path / f"{name}.pt", "--overwrite"), "must be a file, or not exist yet")
    for path in ("/proc/out.pt", "/proc/out.safetensors"):
        assert refused(command("expand", small, path), f"error: {path}: ")
    assert refused(command("expand", small, tmp_path / "out.zip"), r"out\.zip: the suffix must say what to write: ")
    assert refused(command("expand", small, tmp_path / "out"), r"out: the suffix must say what to write: ")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["compress.pt", "expand.pt", "small"]


def test_a_full_disk_is_an_error_that_names_the_target(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "in", "state_dict", weights())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", "something else")

    monkeypatch.setattr(os, "fsync", full)
    assert refused(command("compress", path, tmp_path / "out"), f"error: {tmp_path / 'out'}: No space left on device")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", ["checkpoint", "state_dict", "legacy", "safetensors"])
def test_only_a_compressed_file_is_expanded(tmp_path: Path, command: Command, kind: str) -> None:
    path = write(tmp_path / "model", kind, weights())
    assert refused(command("expand", path, tmp_path / "out.pt"), "model: this is not a compressed file, but a ")


def test_a_type_that_safetensors_lacks_is_expanded_elsewhere(tmp_path: Path, command: Command) -> None:
    save_compressed({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "small")
    outcome = command("expand", tmp_path / "small", tmp_path / "out.safetensors")
    assert refused(outcome, r"tensor 'w': safetensors has no torch\.complex64\. Give OUT the suffix \.pt\.")
    assert command("expand", tmp_path / "small", tmp_path / "out.pt").code == 0
    save_compressed({"__metadata__": torch.ones(2)}, tmp_path / "small")
    outcome = command("expand", tmp_path / "small", tmp_path / "out.safetensors")
    assert refused(outcome, "tensor '__metadata__': safetensors reserves this name")


# --- diff ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_the_same_tensors_do_not_differ_whatever_they_are_in(
    tmp_path: Path, command: Command, left: str, right: str
) -> None:
    one, other = write(tmp_path / "a", left, weights()), write(tmp_path / "b", right, weights())
    outcome = command("diff", one, other, "--exact")
    assert outcome == (0, "No difference in 6 tensors.\n", "")


def test_what_differs_is_said_and_the_answer_is_no(tmp_path: Path, command: Command) -> None:
    left = {
        "equal": torch.tensor([math.nan, math.inf, 0.0]),
        "gone": torch.ones(2),
        "shape": torch.ones(2, 3),
        "type": torch.ones(2),
        "values": torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0]),
    }
    right = {
        "equal": torch.tensor([math.nan, math.inf, -0.0]),
        "shape": torch.ones(3, 2),
        "type": torch.ones(2, dtype=torch.float16),
        "values": torch.tensor([0.0, 0.25, 0.0, 0.0, 3.0]),
        "new": torch.tensor(1),
    }
    outcome = command("diff", write(tmp_path / "a", "state_dict", left), write(tmp_path / "b", "safetensors", right))
    assert (outcome.code, outcome.err) == (1, "")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["gone", "only", "in", "A:", "2", "float32"] in lines
    assert ["new", "only", "in", "B:", "scalar", "int64"] in lines
    assert ["shape", "2x3", "float32", "in", "A,", "3x2", "float32", "in", "B"] in lines
    assert ["type", "2", "float32", "in", "A,", "2", "float16", "in", "B"] in lines
    assert ["values", "5", "float32", "3", "5", "2", "1", "2"] in lines
    assert outcome.out.endswith("\n5 differ, 1 are equal.\n")
    assert "equal   " not in outcome.out
    exact = command("diff", tmp_path / "a", tmp_path / "b", "--exact").out
    assert re.search(r"^equal +3 float32 +1 +3 +0 +0 +0$", exact, re.MULTILINE)


@pytest.mark.parametrize(
    ("left", "right", "largest"),
    [
        (torch.tensor([1.0]), torch.tensor([math.nan]), math.nan),
        (torch.tensor([1.0, math.inf]), torch.tensor([2.0, math.inf]), 1.0),
        (torch.tensor([1.0, math.inf]), torch.tensor([2.0, -math.inf]), math.inf),
        (torch.tensor([3 + 0j]), torch.tensor([0 + 4j]), 5.0),
        (torch.tensor([-(2**63)]), torch.tensor([2**63 - 1]), 2.0**64),
        (torch.tensor([2**60]), torch.tensor([2**60 + 1]), 1.0),
        (torch.tensor([2**62 + 1], dtype=torch.uint64), torch.tensor([2**62], dtype=torch.uint64), 1.0),
        (torch.tensor([200], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8), 200.0),
        (torch.tensor([True]), torch.tensor([False]), 1.0),
        (torch.tensor([1.0]).to(torch.float8_e5m2), torch.tensor([-1.0]).to(torch.float8_e5m2), 2.0),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, Tensor) else str(value),
)
def test_the_largest_difference_is_exact_in_every_type(left: Tensor, right: Tensor, largest: float) -> None:
    for one, other in ((left, right), (right, left)):
        [difference] = differences({"w": one}, {"w": other})
        assert difference.largest == largest or (math.isnan(difference.largest) and math.isnan(largest))
        assert difference.to_nonzero == int(not one[0].to(torch.complex128))
        assert difference.to_zero == int(not other[0].to(torch.complex128))


def test_large_and_strided_tensors_are_compared_to_their_last_entry() -> None:
    left = torch.zeros(3, 1 << 20).t()
    right = left.clone()
    right[-1, -1] = 2.0
    [difference] = differences({"w": left}, {"w": right})
    assert (difference.differing, difference.weights, difference.largest) == (1, 3 << 20, 2.0)
    assert (difference.to_nonzero, difference.to_zero) == (1, 0)


# --- bad files -----------------------------------------------------------------------------------------------------


class Malicious:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["legacy", "pickle", "weights"])
def test_what_needs_a_pickle_is_refused_and_not_executed(tmp_path: Path, command: Command, kind: str) -> None:
    content = {"state_dict": weights(), "hyper_parameters": {"config": Malicious(tmp_path / "executed")}}
    path = tmp_path / "model.safetensors"  # the suffix does not matter
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["hyper_parameters"], protocol=2))
    elif kind == "weights":
        torch.save({"state_dict": weights() | {"w": Malicious(tmp_path / "executed")}}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    small = tmp_path / "small"
    for arguments in (["report", path], ["compress", path, small], ["expand", path, "x.pt"], ["diff", path, path]):
        message = r"model\.safetensors: it needs (posix|nt|os)\.mkdir, which only executing the pickle could"
        assert refused(command(*arguments), message if kind != "pickle" else r"model\.safetensors: it ")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_objects_beside_the_weights_of_a_checkpoint_are_left_out_and_not_executed(
    tmp_path: Path, command: Command
) -> None:
    hyperparameters = {
        "config": Malicious(tmp_path / "executed"),
        "loss": nn.L1Loss(),
        "function": functools.partial(os.mkdir, str(tmp_path / "executed")),
        "paths": {tmp_path, tmp_path / "x"},
    }
    content = {"state_dict": weights() | typed(), "hyper_parameters": hyperparameters}
    torch.save(content, tmp_path / "model.ckpt")
    assert identical(read_weights(tmp_path / "model.ckpt").tensors, weights() | typed())
    assert command("report", tmp_path / "model.ckpt").code == 0
    assert command("compress", tmp_path / "model.ckpt", tmp_path / "small").code == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.ckpt", "small"]


def typed() -> dict[str, Tensor]:
    """Tensors that torch pickles in other ways."""
    return {
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "uint16": torch.ones(3, dtype=torch.uint16),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    }


STEPS = {
    "sets": b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00wrongK\x01s\x86b",
    "allocates": b"ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x10\x85R",
    "makes": b"ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x10\x85\x81",
    "makes by name": b"(S'wrong'\nios\nmkdir\n",
    "makes by class": b"(ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x10o",
}


@pytest.mark.parametrize("name", STEPS)
def test_a_pickle_neither_sets_attributes_nor_makes_objects(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "model.ckpt") as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        for member, data in members.items():
            archive.writestr(member, b"\x80\x02" + STEPS[name] + b"." if member.endswith("data.pkl") else data)
    loaded = load_inert(tmp_path / "model.ckpt")
    assert isinstance(loaded, Inert) or name == "sets"
    assert not hasattr(torch._utils._rebuild_tensor_v2, "wrong")
    with pytest.raises(ValueError, match=r"model\.ckpt: it"):
        read_weights(tmp_path / "model.ckpt")


def raw_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def deflated(path: Path) -> None:
    """A bomb: the pickle is of nothing but zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(10_000_000))
        archive.writestr("archive/version", b"3\n")


def script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/constants.pkl", b"")


def unknown_type(path: Path) -> None:
    raw_safetensors(path, {"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, bytes(3))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file or directory"),
    "folder": (lambda path: path.mkdir(), "this is not a file, but a folder, a device or a pipe"),
    "pipe": (lambda path: os.mkfifo(path), "this is not a file, but a folder, a device or a pipe"),
    "empty": (lambda path: path.write_bytes(b""), "this is neither a file of torch.save nor a safetensors file"),
    "text": (lambda path: path.write_text("hello, hello"), "this is neither a file of torch.save nor a safetensors"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a/b", "c"), "it is a zip file, but not one that torch."),
    "end of a zip": (lambda path: path.write_bytes(b"PK\x03\x04" * 20), "it is a zip file that is damaged or cut off"),
    "bomb": (deflated, "it is a zip file that expands when it is read"),
    "script": (script, "it is a TorchScript archive, which holds code"),
    "module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"it needs torch\.nn\.modules\.linear\.Linear, which",
    ),
    "list": (lambda path: torch.save([1], path), "it holds no state dict, but a list"),
    "other": (lambda path: torch.save({"model": {}, "step": 1}, path), "it holds no tensors by name, but 'model', 's"),
    "number": (
        lambda path: torch.save({3: torch.ones(1)}, path),
        "it has a tensor with the name 3, which is not proper text",
    ),
    "surrogate": (
        lambda path: torch.save({"\ud800": torch.ones(1)}, path),
        r"it has a tensor with the name '\\ud800', w",
    ),
    "sparse": (lambda path: torch.save({"w": torch.ones(1).to_sparse()}, path), "tensor 'w': it is quantized, sparse"),
    "meta": (
        lambda path: torch.save({"w": torch.ones(1, device="meta")}, path),
        "tensor 'w': it is on the meta device",
    ),
    "expanded": (
        lambda path: torch.save({"w": torch.zeros(1).expand(1 << 40)}, path),
        "its tensors take 4,398,046,511,104 bytes, more than the 1,073,741,824 allowed .* max_bytes=4398046511104",
    ),
    "unknown type": (unknown_type, "tensor 'w': (this version of torch cannot hold it|Dtype not understood)"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_cannot_be_used_is_an_error(
    tmp_path: Path, command: Command, make: Callable[[Path], object], message: str
) -> None:
    path, good = tmp_path / "model", write(tmp_path / "good", "state_dict", {})
    make(path)
    for arguments in (["report", path], ["compress", path, tmp_path / "out"], ["diff", good, path]):
        assert refused(command(*arguments), re.escape(f"error: {path}: ") + message)
    assert not (tmp_path / "out").exists()


def test_a_file_may_be_trusted_with_more_memory(tmp_path: Path, command: Command) -> None:
    for kind in ("state_dict", "compressed"):
        path = write(tmp_path / kind, kind, {"w": torch.zeros(1000)})
        assert command("report", path, "--max-bytes", 4000).code == 0
        assert refused(
            command("report", path, "--max-bytes", 3999), "its tensors take 4,000 bytes, more than the 3,999"
        )
        assert refused(command("report", path, "--max-bytes", -1), "`max_bytes` must be an integer of at least 0")
        assert command("report", path, "--max-bytes", "many").code == 2


def test_tensors_of_no_entries_may_have_any_shape(tmp_path: Path, command: Command) -> None:
    nothing = {"dtype": "F32", "data_offsets": [0, 0]}
    header = {"wide": nothing | {"shape": [0, 10**18]}, "long": nothing | {"shape": [10**18, 0]}}
    raw_safetensors(tmp_path / "model", header, b"")
    assert command("report", tmp_path / "model").code == 0
    assert command("compress", tmp_path / "model", tmp_path / "small").code == 0
    assert command("diff", tmp_path / "model", tmp_path / "small").code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_of_every_kind_are_errors_or_can_be_read(tmp_path: Path, command: Command, kind: str) -> None:
    path = write(tmp_path / "model", kind, weights())
    data, number = path.read_bytes(), random.Random(KINDS.index(kind))
    start = data.find(b"\x80\x02", 0 if kind == "legacy" else data.find(b"data.pkl"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes = set()
    for i in range(MUTATIONS):
        if kind in ("safetensors", "compressed"):
            changed = mutated(data, number)
        elif i % 2:  # where the objects are, and the sizes of the tensors
            changed = bytearray(data)
            for _ in range(number.choice([1, 1, 2, 5])):
                changed[number.randrange(start, start + 700)] = number.choice([*b"JMKRqhtX)}.", number.randrange(256)])
        else:
            at, to = sorted(number.choices(range(len(data)), k=2))
            flipped = bytes([data[at] ^ 1 << number.randrange(8)])
            rest = [
                flipped + data[at + 1 :],
                b"",
                data[to:],
                bytes(to - at) + data[to:],
                number.randbytes(9) + data[at + 9 :],
            ]
            changed = data[:at] + number.choice(rest)
        path.write_bytes(changed)
        outcome = command("report", path, *[["--json"], ["--csv"], []][i % 3])
        codes.add(outcome.code)
        if outcome.code == 0:
            assert outcome.out
        else:
            assert refused(outcome, re.escape(f"error: {path}: "))
    assert codes == {0, 2}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


# --- speed ---------------------------------------------------------------------------------------------------------


def test_speed_measures_a_network_of_the_users_own_with_its_weights(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
        from torch import nn
        def make():
            return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
        def make_for_tokens():
            return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 2))
    """
    (tmp_path / "networks_of_mine.py").write_text(textwrap.dedent(source))
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    with torch.no_grad():
        net[0].weight[32:] = 0
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    path = write(tmp_path / "model.ckpt", "checkpoint", state | {"loss.weight": torch.ones(3)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = ["speed", "networks_of_mine:make", "16x64", "--weights", path, "--prefix", "net.", "--repeats", "2"]
    before = torch.get_num_threads()
    outcome = command(*given, "--threads", 1)
    assert (outcome.code, outcome.err, torch.get_num_threads()) == (0, "", before)
    assert "input 16×64; cpu" in outcome.out
    assert "1 thread," in outcome.out
    assert "Scattered zeros, of which the dense network has 76.7%" in outcome.out
    numbers = json.loads(command(*given, "--json").out)
    assert (numbers["dense"]["parameters"], numbers["smaller"]["parameters"]) == (18_696, 2_344)

    outcome = command("speed", "networks_of_mine:make_for_tokens", "4x5", "--repeats", 2)
    assert (outcome.code, outcome.err) == (0, "")

    expected = (
        rf"--weights must hold .* that networks_of_mine:make makes, got {path} with --prefix ''.*has net.0.weight"
    )
    assert refused(command(*given[:5]), expected)
    expected = (
        "MODULE:FUNCTION must name a function that can be imported from this folder, got networks_of_mine: .*Write"
    )
    assert refused(command("speed", "networks_of_mine", "16,64"), expected)
    expected = "MODULE:FUNCTION must return a torch.nn.Module, got builtins:dict, which returns dict. Name"
    assert refused(command("speed", "builtins:dict", "16,64"), expected)
    expected = "MODULE:FUNCTION must name a function that makes a network without arguments, got torch.nn:Linear, which"
    assert refused(command("speed", "torch.nn:Linear", "16,64"), expected)
    assert refused(command(*given, "--max-bytes", "-5"), "max_bytes.*must be an integer of at least 0, got .*-5")
    expected = "SHAPE must be the shape of an input that the network accepts, got 16,63: mat1 and mat2 .*Write"
    assert refused(command("speed", "networks_of_mine:make", "16,63"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["1y3"],
            "argument SHAPE: must be sizes of at least 1 with commas or x between them, got 1y3. Write 1,3,32,32.",
        ),
        (
            ["4,0"],
            "argument SHAPE: must be sizes of at least 1 with commas or x between them, got 4,0. Write 1,3,32,32.",
        ),
        (["4", "--threads", "0"], "argument --threads: must be an integer of at least 1, got 0. Leave it out"),
        (["4", "--repeats", "1.5"], "argument --repeats: must be an integer of at least 2, got 1.5. Leave it out"),
    ],
)
def test_speed_names_its_own_arguments(command: Command, arguments: list[str], message: str) -> None:
    outcome = command("speed", "torch.nn:Identity", *arguments)
    assert outcome.code == 2
    assert f"lightning-gcsr speed: error: {message}" in outcome.err


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report", "compress", "expand", "diff", "speed"])
def test_help_has_an_example(command: Command, name: str) -> None:
    outcome = command(name, "--help")
    assert outcome.code == 0
    assert re.search(rf"\nExample:\n  lightning-gcsr {name} (model\.|mymodels:)", outcome.out)
    assert name in command("--help").out


def test_python_runs_the_package_as_the_command() -> None:
    outcome = subprocess.run([sys.executable, "-m", "lightning_gcsr", "--help"], capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("usage: lightning-gcsr ")


def test_version_is_said(command: Command) -> None:
    assert command("--version")[:2] == (0, f"lightning-gcsr {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prune"],
        ["report"],
        ["report", "a", "b"],
        ["report", "a", "--sort", "size"],
        ["report", "a", "--json", "--csv"],
        ["compress", "a"],
        ["compress", "a", "b", "--overwrite", "true"],
        ["diff", "a"],
        ["expand", "a", "b.pt", "--threshold", "1"],
        ["speed", "torch.nn:Identity"],
    ],
)
def test_wrong_arguments_are_errors(command: Command, arguments: list[str]) -> None:
    outcome = command(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: " in outcome.err
    assert "Traceback" not in outcome.err


def test_names_of_files_are_taken_as_they_are(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("null", "1", "{a: 1}", "[b]", "a  b", "é"):
        write(tmp_path / name, "state_dict", weights())
        assert json.loads(command("report", name, "--json").out)["file"] == name
    assert refused(command("report", "no  \x1b[31m"), re.escape(r"error: no  \x1b[31m: No such file"))


def test_arguments_are_called_what_the_help_calls_them(command: Command) -> None:
    for name, missing in {"report": "FILE", "compress": "IN, OUT", "expand": "IN, OUT", "diff": "A, B"}.items():
        assert f"the following arguments are required: {missing}\n" in command(name).err
        assert missing.replace(",", "") in command(name, "--help").out


def test_every_sort_key_of_the_help_is_known() -> None:
    assert tuple(report.SORT_KEYS) == cli._SORT_KEYS


IMPORTS = """
    import sys
    from lightning_gcsr.cli.main import main
    try:
        main(sys.argv[1:])
    finally:
        print("imported:", *sorted({"torch", "lightning", "pytorch_lightning", "torchmetrics"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("arguments", "imported"), [("--help", ""), ("speed --help", ""), ("report m.pt", " torch")])
def test_nothing_is_imported_that_is_not_needed(tmp_path: Path, arguments: str, imported: str) -> None:
    write(tmp_path / "m.pt", "state_dict", weights())
    (tmp_path / "imports.py").write_text(textwrap.dedent(IMPORTS))
    done = shell(f"{sys.executable} imports.py {arguments}", tmp_path)
    assert done.stdout.splitlines()[-1] == f"imported:{imported}"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (MemoryError(), 2, "lightning-gcsr: error: there is not enough memory\n"),
    ],
)
def test_what_happens_in_between_ends_it_quietly(
    monkeypatch: pytest.MonkeyPatch, command: Command, error: BaseException, code: int, message: str
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(console, "read_weights", fail)
    before = signal.getsignal(signal.SIGTERM)
    assert command("report", "x") == (code, "", message)
    assert signal.getsignal(signal.SIGTERM) is before


# --- processes -----------------------------------------------------------------------------------------------------

SHELL = f"exec {sys.executable} -m lightning_gcsr.cli.main"


def shell(command_line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command_line], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_module_is_the_command(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", "state_dict", weights())
    done = shell(f"{SHELL} diff model.pt nothing.pt", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lightning-gcsr: error: nothing.pt: No such file or directory\n"


def test_output_that_nobody_reads_ends_it(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", "state_dict", {f"weight{i}": torch.zeros(2, 2) for i in range(1500)})
    done = shell(f"{SHELL.removeprefix('exec ')} report model.pt --json | head -n 1; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.stdout, done.stderr) == ("{\n141\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_output_that_cannot_be_written_is_an_error(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.pt", "state_dict", weights())
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        outcome = command("report", path)
    assert outcome == (2, "", "lightning-gcsr: error: standard output: No space left on device\n")


def test_without_an_output_there_are_only_exit_codes(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed standard output, or error output, is None in Python."""
    path = write(tmp_path / "model.pt", "state_dict", weights())
    monkeypatch.setattr(sys, "stdout", None)
    assert command("report", path) == (2, "", "lightning-gcsr: error: standard output: it is closed\n")
    assert command("compress", path, tmp_path / "small") == (0, "", "")
    assert command("diff", path, tmp_path / "small") == (0, "", "")
    monkeypatch.setattr(sys, "stderr", None)
    assert command("diff", path, tmp_path / "none") == (2, "", "")


def test_names_are_printed_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.pt", "state_dict", weights())
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert cli.main(["report", str(path)]) == 0
    assert rb"\u5c42.weight [red]" in output.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="there are no files without a name here")
def test_a_killed_compress_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pt", "state_dict", weights())
    program = textwrap.dedent("""
        import os, signal, sys, time
        from lightning_gcsr.cli.main import main

        def wait(descriptor):
            print("written", flush=True)
            time.sleep(120)

        os.fsync = wait
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
        if sys.argv.pop() == "named":
            del os.O_TMPFILE
        sys.exit(main())
    """)
    deaths = [
        ("unnamed", signal.SIGKILL, -signal.SIGKILL),
        ("unnamed", signal.SIGTERM, 143),
        ("named", signal.SIGTERM, 143),
        ("named", signal.SIGINT, 130),
    ]
    processes = []
    for number, (way, _, _) in enumerate(deaths):
        arguments = ["-c", program, "compress", str(path), f"small{number}", way]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, text=True, **pipes))
    for process, (_, number, code) in zip(processes, deaths, strict=True):
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "written\n", process.stderr.read()
            process.send_signal(number)
            assert process.wait(60) == code
            assert process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == [path]
