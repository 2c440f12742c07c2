"""The database: every run is done once, whoever is killed, and what stands in the way is said."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import optuna
import pytest
import storage
from grid import Run
from optuna.trial import TrialState
from storage import StorageError, count, enqueue_missing, failed, finished, give_back, open_study, work
from training import Outcome

from . import workers
from .outcomes import outcome_of, some_runs

RUNS = some_runs(6)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Where the database will be."""
    return tmp_path / "made" / "studies.db"


@pytest.fixture
def url(database: Path) -> str:
    return f"sqlite:///{database}"


class Performer:
    """Does runs and counts them; those of these keys fail."""

    def __init__(self, failing: set[str] | None = None) -> None:
        self.done: list[str] = []
        self.failing = failing or set()

    def __call__(self, run: Run) -> Outcome:
        self.done.append(run.key)
        if run.key in self.failing:
            raise ArithmeticError(f"seed {run.seed} cannot be done")
        return outcome_of(run)


def do_all(
    study: optuna.Study,
    runs: list[Run],
    perform: Callable[[Run], Outcome],
    at_most: int = 100,
    again: set[str] | None = None,
) -> None:
    """Ask for the runs and do them, as the command does with its workers."""
    last = False
    while not last:
        last = enqueue_missing(study, runs, at_most, set() if again is None else again)
        assert count(study, TrialState.WAITING) <= at_most
        work(study, perform)


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    """Give another process time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


# -- once and no more ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_most", [2, 100])
def test_finished_runs_are_never_repeated(at_most: int, url: str) -> None:
    first, second = Performer(), Performer()
    do_all(open_study("s", url), RUNS[:4], first, at_most)
    assert first.done == [run.key for run in RUNS[:4]]
    study = open_study("s", url)
    do_all(study, RUNS, second, at_most)
    assert second.done == [run.key for run in RUNS[4:]]
    assert finished(study, RUNS) == {run.key: outcome_of(run) for run in RUNS}
    assert failed(study, RUNS) == {}


def test_only_the_runs_that_are_asked_for_are_shown(url: str) -> None:
    study = open_study("s", url)
    do_all(study, RUNS, Performer({RUNS[0].key, RUNS[1].key}))
    assert list(finished(study, RUNS[1:4])) == [RUNS[2].key, RUNS[3].key]
    assert list(failed(study, RUNS[1:4])) == [RUNS[1].key]


def test_studies_of_one_database_do_not_mix(url: str) -> None:
    do_all(open_study("one", url), RUNS[:2], Performer())
    other = Performer()
    do_all(open_study("other", url), RUNS[:3], other)
    assert len(other.done) == 3


def test_a_run_that_fails_is_recorded_and_the_rest_goes_on(url: str) -> None:
    study = open_study("s", url)
    bad = RUNS[1].key
    performer = Performer({bad})
    do_all(study, RUNS, performer)
    assert performer.done == [run.key for run in RUNS]
    assert failed(study, RUNS) == {bad: "ArithmeticError: seed 1 cannot be done"}
    assert set(finished(study, RUNS)) == {run.key for run in RUNS} - {bad}
    [trial] = study.get_trials(states=(TrialState.FAIL,))
    assert "in __call__" in trial.user_attrs["traceback"]
    assert trial.user_attrs["title"] == RUNS[1].title
    do_all(study, RUNS, performer)
    assert len(performer.done) == len(RUNS)


@pytest.mark.parametrize("at_most", [1, 100])
def test_failed_runs_are_repeated_where_asked(at_most: int, url: str) -> None:
    study = open_study("s", url)
    bad = {RUNS[1].key, RUNS[4].key}
    do_all(study, RUNS, Performer(bad))
    again = set(failed(study, RUNS))
    assert again == bad
    performer = Performer({RUNS[4].key})
    do_all(study, RUNS, performer, at_most, again)
    assert performer.done == [RUNS[1].key, RUNS[4].key]  # once each, although one fails again
    assert again == set()
    assert set(failed(study, RUNS)) == {RUNS[4].key}
    do_all(study, RUNS, Performer(), at_most, set(failed(study, RUNS)))
    assert failed(study, RUNS) == {}
    assert len(finished(study, RUNS)) == len(RUNS)


def test_an_interrupted_run_is_done_again(url: str) -> None:
    study = open_study("s", url)
    performer = Performer()

    def interrupted(run: Run) -> Outcome:
        if len(performer.done) == 2:
            raise KeyboardInterrupt
        return performer(run)

    with pytest.raises(KeyboardInterrupt):
        do_all(study, RUNS, interrupted)
    assert failed(study, RUNS) == {}
    do_all(study, RUNS, performer)
    assert performer.done == [*(run.key for run in RUNS[:2]), *(run.key for run in RUNS[3:]), RUNS[2].key]


def test_an_outcome_comes_back_as_it_was(url: str) -> None:
    study = open_study("s", url)
    strange = outcome_of(RUNS[0]).__class__(**{**vars(outcome_of(RUNS[0])), "train_loss": float("inf"), "nonzeros": 0})
    do_all(study, RUNS[:1], lambda run: strange)
    assert finished(open_study("s", url), RUNS) == {RUNS[0].key: strange}


# -- several processes -----------------------------------------------------------------------------------------------


def test_waiting_run_that_is_no_longer_asked_for_is_let_go(tmp_path: Path) -> None:
    study = open_study("tiny", f"sqlite:///{tmp_path / 'studies.db'}")
    old, new = some_runs(6)[:3], some_runs(6)[3:]
    enqueue_missing(study, old, 10, set())
    enqueue_missing(study, new, 10, set())
    done: list[str] = []

    def perform(run: Run) -> Outcome:
        done.append(run.key)
        return outcome_of(run)

    work(study, perform, wanted={run.key for run in new})
    assert sorted(done) == sorted(run.key for run in new)
    enqueue_missing(study, old, 10, set())  # and is done when it is asked for again
    work(study, perform)
    assert sorted(done) == sorted(run.key for run in [*old, *new])


def test_two_processes_do_each_run_once(url: str, tmp_path: Path, quick_processes: ForkServerContext) -> None:
    total = 10
    study, log = open_study("shared", url), tmp_path / "log"
    together = quick_processes.Barrier(2)
    both = [quick_processes.Process(target=workers.work_off, args=(url, log, together, total)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    # The last run may still have been with one of them when the other looked: its own is done all the same.
    done = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert sorted(key for _, key in done) == sorted(run.key for run in some_runs(total))
    assert {int(process) for process, _ in done} == {process.pid for process in both}
    assert len(finished(study, some_runs(total))) == total
    assert failed(study, some_runs(total)) == {}


def test_two_processes_may_make_the_database_at_once(
    url: str, tmp_path: Path, quick_processes: ForkServerContext
) -> None:
    log, together = tmp_path / "log", quick_processes.Barrier(2)
    both = [quick_processes.Process(target=workers.open_at_once, args=(url, log, together)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert not log.exists(), log.read_text()


@pytest.fixture
def killed(url: str, tmp_path: Path, quick_processes: ForkServerContext) -> int:
    """The process that was killed with its third run half done; two others wait."""
    study, log = open_study("shared", url), tmp_path / "log"
    enqueue_missing(study, RUNS[:5], 100, set())
    process = quick_processes.Process(target=workers.stay_at_the_third, args=(url, log, 1))
    process.start()
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return process.pid


def test_run_of_a_killed_process_is_given_back(killed: int, url: str) -> None:
    study, performer = open_study("shared", url), Performer()
    assert count(study, TrialState.RUNNING) == 1
    give_back(study, [killed + 1])
    do_all(study, RUNS[:5], performer)
    assert performer.done == [RUNS[3].key, RUNS[4].key]  # the third may be at work elsewhere
    give_back(study, [killed])
    assert count(study, TrialState.RUNNING) == 0
    assert failed(study, RUNS) == {}
    do_all(study, RUNS[:5], performer)
    assert performer.done == [RUNS[3].key, RUNS[4].key, RUNS[2].key]
    assert finished(study, RUNS) == {run.key: outcome_of(run) for run in RUNS[:5]}


def test_run_of_a_process_that_is_not_heard_of_is_given_back(
    killed: int, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 1)
    study, performer = open_study("shared", url), Performer()

    def all_done() -> bool:
        do_all(study, RUNS[:5], performer)
        return len(finished(study, RUNS)) == 5

    wait_until(all_done)
    assert sorted(performer.done) == sorted(run.key for run in RUNS[2:5])


def test_a_second_request_for_a_run_is_dropped(url: str) -> None:
    """Two machines may ask for it in the same moment."""
    study, performer = open_study("s", url), Performer()
    for run in (RUNS[0], RUNS[1], RUNS[0], RUNS[1]):
        study.enqueue_trial({}, user_attrs={"run": run.key, "title": run.title})
    work(study, performer)
    assert performer.done == [RUNS[0].key, RUNS[1].key]
    assert count(study, TrialState.PRUNED) == 2


# -- databases that cannot be used -----------------------------------------------------------------------------------


def execute(database: Path, statement: str, *values: str) -> None:
    """Change the database behind everyone's back."""
    connection = sqlite3.connect(database)
    assert connection.execute(statement, values).rowcount == 1
    connection.commit()
    connection.close()


def test_results_of_another_version_are_refused(database: Path, url: str) -> None:
    do_all(open_study("s", url), RUNS[:1], Performer())
    execute(database, "UPDATE study_user_attributes SET value_json = '99' WHERE key = 'results_version'")
    message = rf"'s' in {url} holds results of version 99, and this is version {storage.RESULTS_VERSION}.*--storage"
    with pytest.raises(StorageError, match=message):
        open_study("s", url)
    assert open_study("other", url)


def test_results_without_a_version_are_refused(database: Path, url: str) -> None:
    do_all(open_study("s", url), RUNS[:1], Performer())
    execute(database, "DELETE FROM study_user_attributes WHERE key = 'results_version'")
    with pytest.raises(StorageError, match="holds results of version None"):
        open_study("s", url)


@pytest.mark.parametrize(
    ("version", "advice"), [("v99.0.0.a", "pip install -U optuna"), ("v2.6.0.a", "storage upgrade")]
)
def test_database_of_another_optuna_is_refused(version: str, advice: str, database: Path, url: str) -> None:
    open_study("s", url)
    execute(database, "UPDATE alembic_version SET version_num = ?", version)
    with pytest.raises(StorageError, match=f"{url} was written by another version of Optuna: .*{advice}.*--storage"):
        open_study("s", url)


def test_file_that_is_no_database_is_refused(database: Path, url: str) -> None:
    database.parent.mkdir()
    database.write_text("This is a letter, not a database. " * 100)
    with pytest.raises(StorageError, match=f"{url} cannot be used: .*not a database"):
        open_study("s", url)
    assert database.read_text().startswith("This is a letter")


def test_database_of_something_else_is_left_alone(database: Path, url: str) -> None:
    database.parent.mkdir()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE studies (letters TEXT)")
    connection.close()
    with pytest.raises(StorageError, match=f"{url} cannot be used"):
        open_study("s", url)


@pytest.mark.parametrize(
    "bad", ["nonsense", "mongodb://host/name", "sqlite:///{folder}", "sqlite:///{file}/studies.db"]
)
def test_bad_url_is_refused(bad: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    url = bad.format(folder=tmp_path, file=tmp_path / "file")
    with pytest.raises(StorageError, match=r"The database .* cannot be used: \S+"):
        open_study("s", url)


def test_full_disk_is_said_and_finished_runs_are_kept(
    url: str, tmp_path: Path, quick_processes: ForkServerContext
) -> None:
    study, log = open_study("shared", url), tmp_path / "log"
    enqueue_missing(study, RUNS, 100, set())
    process = quick_processes.Process(target=workers.fill_the_disk, args=(url, log))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    said = dict(line.split(": ", 1) for line in log.read_text().splitlines())
    for call, end in said.items():
        assert end.startswith("StorageError: "), (call, end)
        assert "disk" in end
    assert set(said) >= {"work", "enqueue_missing"}
    assert list(finished(study, RUNS)) == [run.key for run in RUNS[:3]]

    # There is room again.
    assert process.pid is not None
    give_back(study, [process.pid])
    performer = Performer()
    do_all(study, RUNS, performer)
    assert sorted(performer.done) == sorted(run.key for run in RUNS[3:])
    assert finished(study, RUNS) == {run.key: outcome_of(run) for run in RUNS}
