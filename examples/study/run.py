"""Run a study and write its report: `python examples/study/run.py examples/study/digits_smoke.yaml`.

Stopped, killed or cut off, the same command goes on where it was: finished runs are kept in a database and never
repeated. On several machines, give each the same --storage (a URL of PostgreSQL or MySQL; see Optuna) and they share
the work. `optuna-dashboard URL` shows a running study in the browser.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Optional

import optuna
import torch
from batches import Dataset
from data import load_data
from grid import Run, Study, StudyFileError, read_study
from images import MissingDataError
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from optuna.trial import TrialState
from pat import PAT_METHODS, has_torchao
from report import write_report
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rows import read_outcomes
from storage import (
    StorageError,
    count,
    enqueue_missing,
    enter,
    failed,
    finished,
    give_back,
    open_study,
    parent_is_alive,
    work,
)
from training import Outcome, quieten, train

POLL_SECONDS = 3
"""How often the database is asked what is new; it costs time that the training could use."""
RUNS_AHEAD = 16
"""How many runs for each worker wait in the database, enough for the time between two looks."""


def main(
    study: Path,
    data_root: Path = Path("data"),
    output: Path = Path("runs/study"),
    storage: Optional[str] = None,
    workers: Optional[PositiveInt] = None,
    device: str = "auto",
    retry_failed: bool = False,
    report_only: bool = False,
    text: Optional[Path] = None,
    known_rows: Optional[Path] = None,
) -> None:
    """Run all of a study that is not done yet, then write its report.

    Args:
        study: The study file, such as examples/study/digits_smoke.yaml.
        data_root: Where image sets are looked for, and downloaded to where there is a network.
        output: The report goes to a folder named for the study in it; the decoded images and the database, too.
        storage: URL of the database; SQLite in ``output`` where none is given.
        workers: Processes that train at the same time, several on a GPU if there are more of them than GPUs; one for
            each core, or with GPUs for each GPU, where not given.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU where there is one.
        retry_failed: Do runs again that failed with an error.
        report_only: Train nothing, and write the report of what is done so far.
        text: The text for problems on text, a file in UTF-8; the sources of Python's standard library by default.
        known_rows: The runs.csv of an earlier report of this study, whose database may be lost: its runs are entered as
            finished. Give only what the same problems and versions came to.
    """
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers and keeps what is done, too
    storage = storage or f"sqlite:///{output / 'studies.db'}"
    try:
        whole = read_study(study, text)
        known = read_outcomes(whole, known_rows) if known_rows else {}
        asked = _without_missing_packages(whole, console)
        opened = open_study(asked.name, storage)
        enter(opened, known)
        stopped = False
        if not report_only:
            stopped = train_all(asked, opened, data_root, output, storage, workers, device, retry_failed, console)
        complete = report(asked, opened, output, console) and not stopped
    except (StudyFileError, MissingDataError, StorageError, ValueError) as error:
        console.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}", markup=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Stopped. Finished runs are kept; the same command goes on.")
        sys.exit(130)
    sys.exit(0 if complete else 1)


def _without_missing_packages(asked: Study, console: Console) -> Study:
    """The study without the methods whose package is not installed, which is said."""
    possible = [run for run in asked.runs if has_torchao() or run.method.method not in PAT_METHODS]
    if len(possible) < len(asked.runs):
        console.print(
            f"{len(asked.runs) - len(possible)} runs of PAT are left out: they need torchao. `pip install"
            " 'torchao>=0.18'` adds it.",
            markup=False,
        )
    return replace(asked, runs=possible)


def train_all(
    asked: Study,
    study: optuna.Study,
    data_root: Path,
    output: Path,
    storage: str,
    workers: int | None,
    device: str,
    retry_failed: bool,
    console: Console,
) -> bool:
    """Do all runs that are to be done. Returns whether a worker ended before its work was done."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be one of 'auto', 'cpu', 'cuda', got device={device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` must be 'cpu' or 'auto' where torch finds no GPU, got device='cuda'.")
    cache = output / "images"
    for data, train_images in {(run.problem.data, run.problem.train_images) for run in asked.runs}:
        load_data(data, data_root, cache, train_images)  # what is missing is said before anything is trained
    processes = workers or (torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1)
    console.print(
        f"Study {asked.name}: {len(asked.runs)} runs, {processes} at a time, on {device}. Database: {storage}"
    )
    again = set(failed(study, asked.runs)) if retry_failed else set()
    while _anything_left(study, asked.runs, again, console):
        if _work_side_by_side(study, asked.runs, again, processes, storage, data_root, cache, device, console):
            return True
    return False


def report(asked: Study, study: optuna.Study, output: Path, console: Console) -> bool:
    """Say what failed, and write the report of what is done. Returns whether that is everything."""
    errors, done = failed(study, asked.runs), finished(study, asked.runs)
    for key, error in list(errors.items())[:5]:
        console.print(f"Failed: {Run.from_key(key).title}: {error}", markup=False)
    if errors:
        console.print(f"{len(errors)} runs failed; --retry_failed true does them again.")
    if not done:
        console.print("No run is done yet, so there is no report.")
        return False
    folder = write_report(asked, done, output / asked.name)
    console.print(f"{len(done):,} of {len(asked.runs):,} runs done. Report: {folder / 'index.md'}")
    return len(done) == len(asked.runs)


def _anything_left(study: optuna.Study, runs: list[Run], again: set[str], console: Console) -> bool:
    """Whether runs are to be taken; where others are still at the last, wait until they are done or given up."""
    said = False
    while True:
        everything_asked = enqueue_missing(study, runs, 1, again)
        running = count(study, TrialState.RUNNING)
        if count(study, TrialState.WAITING) or not everything_asked or not running:
            return bool(count(study, TrialState.WAITING)) or not everything_asked
        if not said:
            console.print(f"Waiting for {running} runs that other processes are at, or were when they were killed.")
            said = True
        time.sleep(2)


def _work_side_by_side(
    study: optuna.Study,
    runs: list[Run],
    again: set[str],
    processes: int,
    storage: str,
    data_root: Path,
    cache: Path,
    device: str,
    console: Console,
) -> bool:
    """Start the workers and show how far they are. Returns whether one of them ended before its work was done."""
    context = multiprocessing.get_context("spawn")
    everything_asked = context.Event()
    workers = []
    for number in range(processes):
        place = f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device
        arguments = (study.study_name, storage, data_root, cache, place, everything_asked, {run.key for run in runs})
        workers.append(context.Process(target=_worker, args=arguments))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        seen = set(finished(study, runs)) | set(failed(study, runs))
        bar = progress.add_task("runs", total=len(runs), completed=len(seen))
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                if not everything_asked.is_set() and enqueue_missing(study, runs, RUNS_AHEAD * processes, again):
                    everything_asked.set()
                _wait_for_any(workers, POLL_SECONDS)
                seen = _show_news(study, runs, seen, progress)
                progress.update(bar, completed=len(seen))
        finally:
            started = [worker for worker in workers if worker.pid is not None]
            for worker in started:
                worker.terminate()
                worker.join()
            give_back(study, [worker.pid for worker in started if worker.pid is not None])
        progress.update(bar, completed=len(_show_news(study, runs, seen, progress)))
    for worker in workers:
        if worker.exitcode:
            why = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit code {worker.exitcode}"
            console.print(f"A worker ended early ({why}). Finished runs are kept; the same command goes on.")
    return any(worker.exitcode for worker in workers)


def _wait_for_any(workers: list[SpawnProcess], seconds: float) -> None:
    """Sleep, but not longer than until a worker ends."""
    wait([worker.sentinel for worker in workers], timeout=seconds)


def _show_news(study: optuna.Study, runs: list[Run], seen: set[str], progress: Progress) -> set[str]:
    outcomes, errors = finished(study, runs), failed(study, runs)
    for key in (outcomes.keys() | errors.keys()) - seen:
        if key in outcomes:
            outcome = outcomes[key]
            ratio = f"{outcome.weights / outcome.nonzeros:.3g}×" if outcome.nonzeros else "all zero"
            news = f"{outcome.validation_accuracy:.1%}, {ratio}, {outcome.seconds:.1f} s"
        else:
            news = f"failed: {errors[key]}"
        progress.console.print(f"{Run.from_key(key).title}: {news}", markup=False)
    return set(outcomes) | set(errors)


def _worker(
    name: str, storage: str, data_root: Path, cache: Path, device: str, everything_asked: Event, wanted: set[str]
) -> None:
    """What each process does. The interrupt from the keyboard is for the first process, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # runs side by side use the cores better than threads that wait for each other
    quieten()
    loaded: dict[tuple[str, int | None], Dataset] = {}

    def perform(run: Run) -> Outcome:
        wanted = run.problem.data, run.problem.train_images
        if wanted not in loaded:
            loaded[wanted] = load_data(run.problem.data, data_root, cache, run.problem.train_images, device)
        return train(run.problem, run.method, run.seed, loaded[wanted])

    try:
        study, last = open_study(name, storage), False
        while not last and parent_is_alive():
            last = everything_asked.is_set()
            work(study, perform, wanted)
            everything_asked.wait(0.2)
    except StorageError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    auto_cli(main)
