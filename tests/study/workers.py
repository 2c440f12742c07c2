"""What the other processes do; a module of its own, because a new process must be able to import it."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import run
import storage
from grid import Run
from optuna.trial import TrialState
from training import Outcome

from .outcomes import outcome_of, some_runs


def note(log: Path, line: str) -> None:
    """Add a line in one piece, whoever else does."""
    with log.open("a") as file:
        file.write(f"{line}\n")


def work_off(url: str, log: Path, together: Barrier, count: int) -> None:
    """Ask for all runs and do them, at the same time as another process does."""
    study = storage.open_study("shared", url)
    together.wait(60)
    done: list[str] = []

    def perform(run: Run) -> Outcome:
        note(log, f"{os.getpid()} {run.key}")
        if not done:
            together.wait(60)  # neither goes on before both have taken one, however slow the machine
        done.append(run.key)
        time.sleep(0.01)
        return outcome_of(run)

    last = False
    while not last:
        last = storage.enqueue_missing(study, some_runs(count), 5, set())
        storage.work(study, perform)


def open_at_once(url: str, log: Path, together: Barrier) -> None:
    """Open a database that is not there yet, at the same time as another process does."""
    together.wait(60)
    try:
        storage.open_study("shared", url)
    except Exception as error:
        note(log, f"{type(error).__name__}: {error}")


def stay_at_the_third(url: str, log: Path, heartbeat: int) -> None:
    """Do two runs and never end the third."""
    storage.HEARTBEAT_SECONDS = heartbeat
    study = storage.open_study("shared", url)
    done: list[str] = []

    def perform(run: Run) -> Outcome:
        note(log, run.key)
        if len(done) == 2:
            time.sleep(600)
        done.append(run.key)
        return outcome_of(run)

    storage.work(study, perform)


def study_command(study: Path, output: Path) -> None:
    """The command, whose worker is a process of its own that must import all itself."""
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = nowhere
        run.main(study, output=output, workers=1, device="cpu")


def fill_the_disk(url: str, log: Path) -> None:
    """Do three runs, then find that no file can grow any more, and note what each call says to that."""
    study = storage.open_study("shared", url)
    done: list[str] = []

    def perform(run: Run) -> Outcome:
        done.append(run.key)
        if len(done) == 4:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, most))
        return outcome_of(run)

    def attempt(what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            note(log, f"{what}: {type(error).__name__}: {error}")
        else:
            note(log, f"{what}: no error")

    attempt("work", lambda: storage.work(study, perform))
    attempt("enqueue_missing", lambda: storage.enqueue_missing(study, some_runs(40), 40, set()))
    if storage.count(study, TrialState.RUNNING):
        attempt("give_back", lambda: storage.give_back(study, [os.getpid()]))
