"""The command: what it leaves behind, what it says, and that it goes on where it was whoever was killed."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import run as command
import yaml
from batches import Dataset
from grid import Run, read_study
from training import train

from . import workers
from .conftest import STUDY

PROBLEM: dict[str, Any] = {"data": "digits", "network": "deep_mlp", "epochs": 2, "lr": 0.02, "batch_size": 64}
PLAIN: dict[str, Any] = {"method": "plain", "penalty": "l1", "update": "proximal", "strength": 0.01}
TINY: dict[str, Any] = {
    "name": "tiny",
    "problems": [PROBLEM],
    "seeds": [0],
    "methods": [{"method": "none"}, PLAIN, {"method": "magnitude_pruning", "compression": 5}],
}
LONGER: dict[str, Any] = {
    "name": "longer",
    "problems": [PROBLEM | {"epochs": 25}],
    "seeds": [0, 1, 2, 3],
    "methods": [{"method": "none"}, PLAIN],
}


def write_study(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# -- what the database holds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A trial."""

    number: int
    state: str
    key: str
    process: int | None


def rows(output: Path) -> list[Row]:
    """What an onlooker finds; nothing while there is no database."""
    try:
        connection = sqlite3.connect(f"file:{output / 'studies.db'}?mode=ro", uri=True, timeout=30)
    except sqlite3.OperationalError:
        return []
    attribute = "(SELECT value_json FROM trial_user_attributes a WHERE a.trial_id = t.trial_id AND a.key = '{}')"
    columns = f"{attribute.format('run')}, {attribute.format('process')}"
    try:
        found = connection.execute(f"SELECT number, state, {columns} FROM trials t ORDER BY number").fetchall()
    except sqlite3.OperationalError:
        return []
    finally:
        connection.close()
    return [
        Row(number, state, json.loads(key), int(json.loads(process).rsplit(":", 1)[1]) if process else None)
        for number, state, key, process in found
        if key
    ]


def in_state(output: Path, state: str) -> list[Row]:
    return [row for row in rows(output) if row.state == state]


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    """Give other processes time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


def half_done(output: Path, least: int) -> list[Row]:
    """The run that is being trained, as soon as so many are done and one is."""
    if len(in_state(output, "COMPLETE")) < least:
        return []
    return [row for row in in_state(output, "RUNNING") if row.process is not None]


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


# -- the command -----------------------------------------------------------------------------------------------------


def arguments(study: Path, output: Path, workers: int) -> list[str]:
    options = {"--output": str(output), "--workers": str(workers), "--device": "cpu"}
    return [str(STUDY / "run.py"), str(study), *(word for option in options.items() for word in option)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command as a user does, in a group of its own, of which nothing is left after the test."""
    started = []

    def start(study: Path, output: Path, workers: int = 1) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments(study, output, workers)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell may have it ignored
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def here(
    quick_processes: ForkServerContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int | str | None]:
    """Calls the command in this process, with workers that start quickly, and returns the exit code."""

    def context(method: str) -> ForkServerContext:
        assert method == "spawn"
        return quick_processes

    def here(study: Path, output: Path, **more: Any) -> int | str | None:
        monkeypatch.chdir(tmp_path)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(multiprocessing, "get_context", context)
                with pytest.raises(SystemExit) as exit_:
                    command.main(study, output=output, **{"workers": 1, "device": "cpu"} | more)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return exit_.value.code

    return here


def test_study_is_run_and_reported_and_never_repeated(
    start: Callable[..., subprocess.Popen[str]],
    here: Callable[..., int | str | None],
    quick_processes: ForkServerContext,
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    study, output = write_study(tmp_path, TINY), tmp_path / "output"
    stdout, stderr = start(study, output, workers=2).communicate(timeout=300)
    assert stderr == ""
    assert "Study tiny: 3 runs, 2 at a time, on cpu." in stdout
    assert f"3 of 3 runs done. Report: {output / 'tiny' / 'index.md'}" in stdout
    assert {path.name for path in output.iterdir()} == {"studies.db", "tiny"}
    pages = {"index.md", "appendix.md", "runs.csv", "summary.csv"}
    assert {path.name for path in (output / "tiny").iterdir() if path.suffix != ".png"} == pages
    done = in_state(output, "COMPLETE")
    assert {row.key for row in done} == {run.key for run in read_study(study).runs}
    assert rows(output) == done
    for row in done:
        assert f"{Run.from_key(row.key).title}: " in stdout

    # The workers train as anyone does.
    frame = pd.read_csv(output / "tiny" / "runs.csv")
    for number, run in enumerate(read_study(study).runs[:2]):
        wanted = train(run.problem, run.method, run.seed, digits)
        for name in ("validation_accuracy", "test_loss", "nonzeros", "train_loss"):
            assert frame[name][number] == pytest.approx(getattr(wanted, name), rel=1e-4), name

    # Again: nothing is trained, and the report is the same.
    before = {path.name: path.read_bytes() for path in (output / "tiny").iterdir()}
    monkeypatch.setattr(quick_processes, "Process", lambda **_: pytest.fail("a worker is started"))
    assert here(study, output) == 0
    assert "3 of 3 runs done" in capsys.readouterr().out
    assert rows(output) == done
    assert {path.name: path.read_bytes() for path in (output / "tiny").iterdir()} == before


def test_published_study_is_extended_without_its_database(
    here: Callable[..., int | str | None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pruned = {"method": "magnitude_pruning", "target_sparsity": [0.5, 0.9]}
    short = write_study(tmp_path, TINY | {"methods": [{"method": "none"}, PLAIN]})
    assert here(short, tmp_path / "first") == 0
    published = tmp_path / "first" / "tiny" / "runs.csv"
    known = published.read_text().splitlines()
    longer = write_study(tmp_path, TINY | {"methods": [pruned, PLAIN, {"method": "none"}]})
    capsys.readouterr()

    # Rows that are not the study's are refused before anything is trained.
    altered = tmp_path / "altered.csv"
    for old, new, fault in (
        (
            ",0.01,",
            ",0.02,",
            "is no run of this study: deep MLP on digits, SGD: L1 plain proximal, strength 0.02, seed 0.",
        ),
        ("deep MLP", "AlexNet", "is no run of this study: AlexNet on digits"),
        (known[2], f"{known[2]}\n{known[2]}", "is there twice"),
        (known[2], known[2].rsplit(",", 1)[0] + ",7.5", "contradict each other"),
        ("nonzeros,", "zeros,", "have no column 'nonzeros'"),
    ):
        assert old in published.read_text()
        altered.write_text(published.read_text().replace(old, new))
        assert here(longer, tmp_path / "second", known_rows=altered) == 2
        assert fault in capsys.readouterr().out
    assert here(longer, tmp_path / "second", known_rows=tmp_path / "gone.csv") == 2
    assert "gone.csv cannot be read" in capsys.readouterr().out
    assert rows(tmp_path / "second") == []

    for _ in range(2):  # a second time nothing is left to enter or to train
        assert here(longer, tmp_path / "second", known_rows=published) == 0
        trained = [row.key for row in rows(tmp_path / "second") if row.process is not None]
        assert len(rows(tmp_path / "second")) == 4
        assert [Run.from_key(key).method.method for key in trained] == ["magnitude_pruning"] * 2
    extended = (tmp_path / "second" / "tiny" / "runs.csv").read_text().splitlines()
    assert set(known) < set(extended)


def test_stopped_and_killed_the_study_goes_on_where_it_was(
    start: Callable[..., subprocess.Popen[str]],
    here: Callable[..., int | str | None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    study, output = write_study(tmp_path, LONGER), tmp_path / "output"
    asked = {run.key for run in read_study(study).runs}

    # From the keyboard the interrupt goes to the whole group.
    process = start(study, output)
    wait_until(lambda: half_done(output, 1))
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Stopped. Finished runs are kept; the same command goes on." in stdout
    assert "Traceback" not in stdout + stderr
    first = in_state(output, "COMPLETE")
    assert 1 <= len(first) < len(asked)
    assert not in_state(output, "RUNNING")
    wait_until(lambda: not any(is_alive(row.process) for row in first if row.process), 10)

    # A worker is killed.
    halves: list[Row] = []

    def kill() -> None:
        wait_until(lambda: halves.extend(half_done(output, len(first) + 1)) or halves)
        process = halves[0].process
        assert process is not None
        os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    code = here(study, output)
    thread.join()
    said = capsys.readouterr().out
    assert code == 1, said
    assert "A worker ended early (signal 9). Finished runs are kept; the same command goes on." in said
    assert f"of {len(asked)} runs done. Report: " in said
    second = in_state(output, "COMPLETE")
    assert len(first) < len(second) < len(asked)
    assert set(first) <= set(second)
    assert not in_state(output, "RUNNING")

    # The rest, each once.
    assert here(study, output) == 0
    assert f"{len(asked)} of {len(asked)} runs done." in capsys.readouterr().out
    last = in_state(output, "COMPLETE")
    assert set(second) <= set(last)
    assert sorted(row.key for row in last) == sorted(asked)
    assert len({row.process for row in last}) == 3


def test_worker_ends_when_the_command_is_killed(quick_processes: ForkServerContext, tmp_path: Path) -> None:
    study, output = write_study(tmp_path, TINY | {"name": "many", "seeds": list(range(20))}), tmp_path / "output"
    process = quick_processes.Process(target=workers.study_command, args=(study, output))
    process.start()
    worker = None
    try:
        wait_until(lambda: half_done(output, 1))
        [worker] = {row.process for row in rows(output) if row.process is not None}
        process.kill()
        process.join()
        wait_until(lambda: not is_alive(worker), 15)
    finally:
        process.kill()
        if worker is not None and is_alive(worker):
            os.kill(worker, signal.SIGKILL)


def test_run_that_fails_is_said_and_the_rest_is_done(
    here: Callable[..., int | str | None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    content = TINY | {"problems": [PROBLEM | {"network": "lenet_5"}, PROBLEM], "methods": TINY["methods"][:2]}
    study, output = write_study(tmp_path, content), tmp_path / "output"
    for retry_failed, failures in ((False, 2), (False, 2), (True, 4)):
        code = here(study, output, retry_failed=retry_failed)
        said = capsys.readouterr().out
        assert code == 1
        assert "Failed: digits, lenet_5: no penalty, seed 0: ValueError: `network` 'lenet_5' needs images" in said
        assert "2 runs failed; --retry_failed true does them again." in said
        assert "2 of 4 runs done. Report: " in said
        assert len(in_state(output, "COMPLETE")) == 2
        assert len(in_state(output, "FAIL")) == failures
    assert "| plain L1" in (output / "tiny" / "index.md").read_text()


def test_nothing_but_failures_is_said(
    here: Callable[..., int | str | None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study = write_study(tmp_path, TINY | {"problems": [PROBLEM | {"network": "lenet_5"}], "methods": [PLAIN]})
    assert here(study, tmp_path / "output") == 1
    assert "1 runs failed; --retry_failed true does them again." in capsys.readouterr().out
    assert not (tmp_path / "output" / "tiny").exists()


# -- what is said before anything is trained -------------------------------------------------------------------------


def said_by(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says when it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", arguments)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.out + captured.err


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seedz": [1]}, ["StudyFileError: ", "tiny.yaml: unknown name 'seedz' in a study.", "mean 'seeds'?"]),
        (
            {"methods": [{"method": "plane"}]},
            ["StudyFileError: ", "methods, entry 1: `method` must be one of 'none', "],
        ),
        ({"methods": [PLAIN | {"warmup": 7}]}, ["`warmup` must be a number in [0, 1], got warmup=7"]),
        ({"problems": [PROBLEM | {"data": "folder:gone"}]}, ["MissingDataError: ", "gone", "--data_root"]),
        ({"problems": [PROBLEM | {"train_images": 9_999}]}, ["ValueError: `train_images` must be at most 1,118"]),
    ],
    ids=["name", "method", "value", "data", "train_images"],
)
def test_mistake_is_one_clear_message(
    changes: dict[str, Any],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    study = write_study(tmp_path, TINY | changes)
    said = said_by(arguments(study, tmp_path / "output", 1), monkeypatch, capsys)
    for part in parts:
        assert part in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "output" / "tiny").exists()


@pytest.mark.parametrize("words", ["[proximal, gradient]", "[/tmp]", "[bold]"])
def test_message_shows_brackets_as_they_are(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Rich takes them for its own marks where it is not told."""
    study = tmp_path / "tiny.yaml"
    study.write_text(f"name: {words} x\n")
    assert words in said_by(arguments(study, tmp_path / "output", 1), monkeypatch, capsys)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--device", "tpu"], "`device` must be one of 'auto', 'cpu', 'cuda', got device='tpu'"),
        (["--storage", "sqlite:///{study}"], "StorageError: The database"),
        (["--workers", "0"], "workers"),
        (["--output", "{study}"], "{study}"),
    ],
    ids=["device", "storage", "workers", "output"],
)
def test_bad_option_is_one_clear_message(
    more: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    study = write_study(tmp_path, TINY)
    given = [*arguments(study, tmp_path / "output", 1), *(word.format(study=study) for word in more)]
    assert part.format(study=study) in said_by(given, monkeypatch, capsys)
