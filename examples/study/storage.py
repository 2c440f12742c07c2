"""The runs of a study in a database of Optuna: what is done stays done, what was cut off is done again."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import optuna
from grid import Run
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError
from training import Outcome

HEARTBEAT_SECONDS = 10
"""A run whose process was killed counts as cut off when it has not been heard of for twice as long."""
STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError)
RESULTS_VERSION = 2
"""To be raised when results of older versions can no longer stand beside new ones."""


class StorageError(Exception):
    """The database cannot be used."""


def open_study(name: str, storage: str) -> optuna.Study:
    """The study of this name in the database at this URL, made where there is none.

    Raises:
        StorageError: If the database cannot be opened, was made by another version, or its disk is full.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        if storage.startswith("sqlite:///"):
            Path(storage.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            study = _open(name, storage)
        except SQLAlchemyError:  # another process may be making the tables in this moment
            time.sleep(2)
            study = _open(name, storage)
        version = study.user_attrs.get("results_version")
        if version is None and not trials(study):
            study.set_user_attr("results_version", RESULTS_VERSION)
            version = RESULTS_VERSION
    except RuntimeError as error:  # Optuna's own word on a schema of another version
        raise StorageError(
            f"The database {storage} was written by another version of Optuna: {error} Upgrade it as that says, or give"
            " another --storage."
        ) from error
    except (*STORAGE_ERRORS, ImportError, ValueError) as error:
        raise StorageError(f"The database {storage} cannot be used: {_reason(error)}") from error
    if version != RESULTS_VERSION:
        raise StorageError(
            f"The study {name!r} in {storage} holds results of version {version}, and this is version"
            f" {RESULTS_VERSION}: they cannot stand side by side. Give another --storage, or rename the study."
        )
    return study


def _open(name: str, storage: str) -> optuna.Study:
    sqlite = storage.startswith("sqlite")
    # Several processes write; SQLite makes the others wait.
    database = RDBStorage(
        storage, {"connect_args": {"timeout": 120}} if sqlite else {}, heartbeat_interval=HEARTBEAT_SECONDS
    )
    if sqlite:
        # Optuna takes a waiting run by SELECT ... FOR UPDATE, which SQLite does not know: without a lock from the
        # start of a transaction on, two processes would take the same one.
        event.listen(database.engine, "connect", _leave_transactions_to_sqlalchemy)
        event.listen(database.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        database.engine.dispose()
    return optuna.create_study(
        storage=database,
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
    )


def _leave_transactions_to_sqlalchemy(connection: Any, _: Any) -> None:
    connection.isolation_level = None


def enqueue_missing(study: optuna.Study, runs: Iterable[Run], at_most: int, again: set[str]) -> bool:
    """Ask for runs that are neither done, nor waiting, nor running, nor failed by their own fault.

    Args:
        study: The study.
        runs: All that is to be done.
        at_most: How many may wait at a time; a database is slow with thousands of them.
        again: Keys of runs to do again whatever became of them; those that are now asked for are removed.

    Returns:
        Whether all have been asked for.
    """
    try:
        optuna.storages.fail_stale_trials(study)
        settled = {trial.user_attrs.get("run") for trial in trials(study) if not _cut_off(trial)} - again
        missing = [run for run in runs if run.key not in settled]
        room = max(0, at_most - count(study, TrialState.WAITING))
        for run in missing[:room]:
            study.enqueue_trial({}, user_attrs={"run": run.key, "title": run.title})
            again.discard(run.key)
    except STORAGE_ERRORS as error:
        raise StorageError(f"The runs cannot be written to the database: {_reason(error)}") from error
    return len(missing) <= room


def enter(study: optuna.Study, outcomes: dict[str, Outcome]) -> None:
    """Enter what came out of runs elsewhere, by their keys; runs that are finished here stay as they are."""
    try:
        done = {trial.user_attrs.get("run") for trial in trials(study, TrialState.COMPLETE)}
        for key, outcome in outcomes.items():
            if key not in done:
                attributes = {"run": key, "title": Run.from_key(key).title, "outcome": dataclasses.asdict(outcome)}
                study.add_trial(create_trial(value=outcome.validation_accuracy, user_attrs=attributes))
    except STORAGE_ERRORS as error:
        raise StorageError(f"The known runs cannot be written to the database: {_reason(error)}") from error


def work(study: optuna.Study, perform: Callable[[Run], Outcome], wanted: Container[str] | None = None) -> None:
    """Take waiting runs until none is left. A run that fails is recorded with its error and does not stop the rest.

    With ``wanted``, keys of runs, others are let go: a study file that has changed since may no longer ask for them.
    """

    def objective(trial: Trial) -> float:
        key = trial.user_attrs.get("run")
        # Another process may have taken the last one, or the same one.
        if key is None or (wanted is not None and key not in wanted) or _taken(study, key, trial.number):
            raise optuna.TrialPruned
        trial.set_user_attr("process", process_name(os.getpid()))
        run = Run.from_key(key)
        try:
            outcome = perform(run)
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            trial.set_user_attr("traceback", traceback.format_exc()[-4_000:])
            raise
        trial.set_user_attr("outcome", dataclasses.asdict(outcome))
        return outcome.validation_accuracy

    def stop_when_done(study: optuna.Study, trial: FrozenTrial) -> None:
        if count(study, TrialState.WAITING) == 0 or not parent_is_alive():
            study.stop()

    try:
        if count(study, TrialState.WAITING):
            study.optimize(objective, catch=(Exception,), callbacks=[stop_when_done])
    except Exception as error:  # not of a run, whose errors are caught
        raise StorageError(f"A result cannot be written to the database: {_reason(error)}") from error


def parent_is_alive() -> bool:
    """Whether the process that started this one is there still: its workers end with it, however it ended."""
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def count(study: optuna.Study, state: TrialState) -> int:
    """The number of trials in this state."""
    return len(trials(study, state))


def trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The trials in these states, or all."""
    try:
        return study.get_trials(deepcopy=False, states=states or None)
    except STORAGE_ERRORS as error:
        raise StorageError(f"The database cannot be read: {_reason(error)}") from error


def give_back(study: optuna.Study, processes: Iterable[int]) -> None:
    """Let what processes of this machine were at when they ended be done again, without waiting for the heartbeat."""
    names = {process_name(process) for process in processes}
    for trial in trials(study, TrialState.RUNNING):
        if trial.user_attrs.get("process") in names:
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except STORAGE_ERRORS as error:
                raise StorageError(f"The database cannot be written: {_reason(error)}") from error


def process_name(process: int) -> str:
    """What a process is known by in a database that several machines use."""
    return f"{platform.node()}:{process}"


def finished(study: optuna.Study, runs: Iterable[Run]) -> dict[str, Outcome]:
    """What came out of those of the runs that are done, by their keys."""
    wanted = {run.key for run in runs}
    return {
        trial.user_attrs["run"]: Outcome(**trial.user_attrs["outcome"])
        for trial in trials(study, TrialState.COMPLETE)
        if trial.user_attrs.get("run") in wanted
    }


def failed(study: optuna.Study, runs: Iterable[Run]) -> dict[str, str]:
    """The errors of those of the runs that failed and were not done since, by their keys."""
    done = finished(study, runs)
    wanted = {run.key for run in runs} - set(done)
    return {
        trial.user_attrs["run"]: trial.user_attrs["error"]
        for trial in trials(study, TrialState.FAIL)
        if trial.user_attrs.get("run") in wanted and "error" in trial.user_attrs
    }


def _cut_off(trial: FrozenTrial) -> bool:
    """Whether the run of a trial was stopped before its end, or never began."""
    return trial.state == TrialState.PRUNED or (trial.state == TrialState.FAIL and "error" not in trial.user_attrs)


def _taken(study: optuna.Study, key: str, number: int) -> bool:
    """Whether a trial before this one has the same run: two machines may ask for it in the same moment."""
    return any(
        trial.number < number and trial.user_attrs.get("run") == key
        for trial in trials(study, TrialState.COMPLETE, TrialState.RUNNING)
    )


def _reason(error: BaseException) -> str:
    """The database's own words, without the statement that it was at."""
    while not isinstance(error, SQLAlchemyError) and (before := error.__cause__ or error.__context__) is not None:
        error = before
    return str(getattr(error, "orig", None) or error)
