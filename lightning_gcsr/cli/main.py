"""The command ``lightning-gcsr``: how it starts and ends; what it does is in :mod:`lightning_gcsr.cli.commands`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 is done, 1 that the answer is no, 2 wrong arguments and files that cannot be used, 130 an interrupt, 141 that
    the reader of the output has gone.

    Raises:
        SystemExit: For ``--help``, ``--version``, wrong arguments (2) and SIGTERM (143).
    """
    try:
        from lightning_gcsr.cli.commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("jsonargparse", "rich"):
            raise
        return _refuse(f"{error.name} is not installed. Install it with: pip install 'lightning-gcsr[cli]'")
    try:
        with _cleaned_up():
            return run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except MemoryError:
        return _refuse("there is not enough memory")
    except ValueError as error:
        return _refuse(str(error))


def _refuse(problem: str) -> int:
    if sys.stderr is not None:
        printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in problem)
        print(f"lightning-gcsr: error: {printable}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _cleaned_up() -> Iterator[None]:
    """Make SIGTERM an exception, so that no file is left half written."""
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield
        return

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
