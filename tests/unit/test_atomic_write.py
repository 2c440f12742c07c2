"""Files are replaced as a whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightning_gcsr.storage import atomic_write as files
from lightning_gcsr.storage.atomic_write import replace_file


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of writing, of which the first is only on Linux."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("there are no files without a name here")
    return request.param


@pytest.mark.usefixtures("way")
def test_a_file_is_written_and_replaced_and_nothing_else_is_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for data in (b"old", b"newer", b""):
        replace_file(target, data)
        assert target.read_bytes() == data
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("way")
def test_others_may_read_the_file_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    replace_file(tmp_path / "model", b"data")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "model")
    replace_file(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "model").read_bytes() == b"data"


def test_a_relative_path_is_one_of_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace_file("model", b"data")
    assert (tmp_path / "model").read_bytes() == b"data"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)], ids=lambda e: type(e).__name__
)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    target = tmp_path / "model"
    target.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)):
        replace_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`path` must lie in a folder that exists, got path=.*none/model'"):
        replace_file(tmp_path / "none" / "model", b"data")
    assert not list(tmp_path.iterdir())


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="`path` must be a file, or not exist yet, got path="):
        replace_file(tmp_path / "folder", b"data")
    with pytest.raises(ValueError, match="`path` must be a file, or not exist yet, got path='/dev/null'"):
        replace_file("/dev/null", b"data")


WRITER = """
    import os, signal, sys, time, types

    package = sys.modules["lightning_gcsr"] = types.ModuleType("lightning_gcsr")  # the real one imports a lot
    package.__path__ = [sys.argv[4]]
    from lightning_gcsr.storage.atomic_write import replace_file

    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    if sys.argv[2] == "named":
        del os.O_TMPFILE
    if sys.argv[3] == "handled":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def wait(descriptor):
        print("written", flush=True)
        time.sleep(60)

    os.fsync = wait
    replace_file(sys.argv[1], b"new" * 1000)
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="there are no files without a name here")
@pytest.mark.parametrize(
    ("way", "handler", "number"),
    [
        ("unnamed", "none", signal.SIGKILL),
        ("unnamed", "none", signal.SIGTERM),
        ("unnamed", "none", signal.SIGINT),
        ("named", "none", signal.SIGINT),
        ("named", "handled", signal.SIGTERM),
    ],
)
def test_a_killed_process_leaves_nothing_behind(tmp_path: Path, way: str, handler: str, number: signal.Signals) -> None:
    target = tmp_path / "model"
    target.write_bytes(b"old")
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(WRITER),
        str(target),
        way,
        handler,
        str(Path(files.__file__).parent),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
