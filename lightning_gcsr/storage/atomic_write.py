"""Atomic file replacement that survives crashes."""

from __future__ import annotations

import contextlib
import os
import uuid

from lightning_gcsr.validation import argument_error

__all__ = ["check_target", "replace_file"]


def check_target(path: str | os.PathLike[str]) -> str:
    """The path that a file would be written to: the path itself, or what it links to.

    Raises:
        FileNotFoundError: If its folder does not exist.
        ValueError: If there is something other than a file: a folder, a device or a pipe.
    """
    target = os.path.realpath(path)  # a link stays one
    folder = os.path.dirname(target)
    shown = os.fspath(path)
    if not os.path.isdir(folder):
        advice = f"Create the folder {folder!r} first."
        raise argument_error("path", shown, "must lie in a folder that exists", advice, FileNotFoundError)
    if os.path.exists(target) and not os.path.isfile(target):
        raise argument_error("path", shown, "must be a file, or not exist yet", "Give the name of a file.")
    return target


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: at every moment there is either the old file, if any, or the complete new one.

    On Linux the data are in a file without a name until all of them are on the disk, so that a process that is killed
    leaves nothing behind. Elsewhere, and on file systems without such files, they are in a hidden file in the same
    folder. Every exception removes it, KeyboardInterrupt too, but a signal that ends the process at once leaves it. To
    clean up after SIGTERM there, turn the signal into an exception:
    ``signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))``.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there is something other than a file.
        OSError: If the file cannot be written; the old file stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(f"{folder}/a", b"old one")
        ...     replace_file(f"{folder}/a", b"new")
        ...     os.listdir(folder), os.path.getsize(f"{folder}/a")
        (['a'], 3)
    """
    target = check_target(path)
    folder = os.path.dirname(target)
    waiting = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            _write_unnamed(folder, waiting, data)
        except (AttributeError, OSError):  # not Linux, or not on this file system; a full disk fails again below
            _write_named(waiting, data)
        os.replace(waiting, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(waiting)
        raise
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_unnamed(folder: str, name: str, data: bytes) -> None:
    with os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        # Only with a `src_dir_fd`, which the absolute path makes void, does Python have the link followed to the file.
        os.link(f"/proc/self/fd/{stream.fileno()}", name, src_dir_fd=stream.fileno())


def _write_named(name: str, data: bytes) -> None:
    with open(name, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
