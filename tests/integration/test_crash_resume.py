"""A run that is killed again and again ends in the very weights, and makes the very decisions, of one that was not."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_gcsr import GradientCoherentRegularization

from .crash_worker import ACCUMULATE, CASES, DELAY, STEPS, WARMUP, train, work

CRASHES = 5
SLACK = 8
"""So many steps after it was told of one must the killer have struck; a checkpoint is written every five."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Starts processes that have imported torch and Lightning already, since that takes longer than what they do.

    They are forked off a fresh interpreter: not from this one, of which they know nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        # Lightning writes a checkpoint into a temporary file first, which a kill leaves behind.
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        yield context


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of the run that nobody kills, by case."""
    folders = {}

    def get(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("uninterrupted")
            torch.set_num_threads(1)
            train(folders[case], case)
        return folders[case]

    return get


def kill_steps(case):
    """A random step in each fifth of the training."""
    generator = random.Random(case)
    length = (STEPS[ACCUMULATE[case]] - SLACK) // CRASHES
    return [generator.randint(i * length + 1, (i + 1) * length) for i in range(CRASHES)]


def newest_checkpoint(folder):
    """The newest checkpoint that loads, as a user would look for it, or ``None``.

    On one file system Lightning replaces the file in one go. Between two it copies, and a kill may leave half a file.
    """
    paths = (folder / "checkpoints").glob("*.ckpt")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError):
            continue
        return path
    return None


def run(processes, folder, case, kill_at=None, delay=0.0):
    """Train in a process of its own, to a step or to the end; returns the steps it told of, and its exit code."""
    checkpoint = newest_checkpoint(folder)
    receiver, sender = processes.Pipe(duplex=False)
    limit = None if kill_at is None else kill_at + SLACK
    process = processes.Process(target=work, args=(folder, case, checkpoint, sender, limit))
    process.start()
    sender.close()  # so that the end of the process is seen as the end of what it has to tell
    steps = []
    try:
        while receiver.poll(120):
            steps.append(receiver.recv())
            if kill_at is not None and steps[-1] >= kill_at:
                time.sleep(delay)
                process.kill()
                kill_at = None
    except EOFError:
        pass
    finally:
        if process.is_alive():
            process.join(10)
        process.kill()
        process.join()
        receiver.close()
    return steps, process.exitcode


def journal(folder):
    """What was logged by step and key; where a step was made twice, what was logged last."""
    result, torn = {}, 0
    for line in filter(None, (folder / "journal.jsonl").read_text().splitlines()):
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill; the step is no part of a checkpoint yet and is made again
            torn += 1
            assert torn <= CRASHES
            continue
        result.setdefault(metrics.pop("step"), {}).update(metrics)
    return result


def assert_equal(actual, expected, where=""):
    """Equal to the last bit, all the way down."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_equal(actual[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert actual == expected, where


def training_state(path, case):
    """What a checkpoint knows of the training: all of it but the progress of the loops and the paths of the files."""
    checkpoint = torch.load(path, weights_only=True)
    state = {
        key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    }
    key = GradientCoherentRegularization(**CASES[case]).state_key
    return state | {"regularization": checkpoint["callbacks"][key]}


@pytest.mark.parametrize("case", CASES)
def test_killed_run_ends_where_the_uninterrupted_one_does(tmp_path, processes, uninterrupted, case):
    delays = random.Random(case)
    starts = []
    for kill_at in kill_steps(case):
        steps, exitcode = run(processes, tmp_path, case, kill_at, delays.uniform(0.0, 0.02))
        assert exitcode == -signal.SIGKILL
        assert kill_at <= steps[-1] <= kill_at + SLACK
        starts.append(steps[0])
    steps, exitcode = run(processes, tmp_path, case)
    assert exitcode == 0
    assert steps[-1] == STEPS[ACCUMULATE[case]]
    starts.append(steps[0])

    # The crashes were where it matters: delay and ramp were both begun again in the middle.
    assert any(1 < step < DELAY for step in starts)
    assert any(DELAY < step < DELAY + WARMUP for step in starts)

    assert_equal(journal(tmp_path), journal(uninterrupted(case)))
    final, expected = (training_state(folder / "final.ckpt", case) for folder in (tmp_path, uninterrupted(case)))
    assert_equal(final, expected)


@pytest.mark.parametrize("case", CASES)
def test_the_decisions_that_are_compared_are_not_trivial(uninterrupted, case):
    rows = journal(uninterrupted(case))
    assert sorted(rows) == list(range(STEPS[ACCUMULATE[case]]))
    before, after = [rows[i] for i in range(DELAY)], [rows[i] for i in range(DELAY, len(rows))]
    assert all(row["gcsr/injected"] == 0 for row in before)
    assert len({row["gcsr/injected"] for row in after}) > 2
    assert len({row["gcsr/strength"] for row in after}) == WARMUP
    assert len({row["gcsr/coherence"] for row in after}) == len(after)
    if CASES[case]["update"] == "proximal":
        assert rows[len(rows) - 1]["sparsity/model"] > 0.3


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("case", list(CASES)[:1])  # the other goes by the Trainer's clock alone
def test_without_the_state_of_the_callback_the_resumed_run_ends_elsewhere(tmp_path, uninterrupted, case):
    """The test above would notice if the callback forgot its steps: here its state is taken out of the checkpoint."""
    step = DELAY - 10
    checkpoint = torch.load(uninterrupted(case) / "checkpoints" / f"step={step}.ckpt", weights_only=True)
    whole = tmp_path / "whole.ckpt"
    torch.save(checkpoint, whole)
    del checkpoint["callbacks"][GradientCoherentRegularization(**CASES[case]).state_key]
    robbed = tmp_path / "robbed.ckpt"
    torch.save(checkpoint, robbed)

    expected = training_state(uninterrupted(case) / "final.ckpt", case)["state_dict"]
    for path, as_expected in ((whole, True), (robbed, False)):
        folder = tmp_path / path.stem
        folder.mkdir()
        final = torch.load(train(folder, case, path), weights_only=True)["state_dict"]
        assert all(torch.equal(final[key], expected[key]) for key in expected) == as_expected
