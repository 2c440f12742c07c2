"""The command line of ``lightning-gcsr``: its arguments, and how the command starts and ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["main", "parser"]

_SORT_KEYS = ("name", "weights", "zeros", "sparsity", "dense", "stored")
_ANY_KIND = "a checkpoint, a state dict, a safetensors file or a compressed file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    The code is 0 if the command is done, 1 if the answer is no, 2 for wrong arguments and files that cannot be used,
    130 after an interrupt, and 141 if the reader of the output has gone.

    Raises:
        SystemExit: For ``--help``, ``--version``, wrong arguments (2) and SIGTERM (143).
    """
    given = parser().parse_args(arguments)
    try:
        with _exit_on_sigterm():
            return _run(given)
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


def _run(given: Namespace) -> int:
    """Run the subcommand. It is imported here, so that ``--help`` does not wait for torch."""
    command: Callable[[Namespace], int]
    if given.command == "report":
        from lightning_gcsr.cli.report import run as command
    elif given.command == "compress":
        from lightning_gcsr.cli.convert import compress as command
    elif given.command == "expand":
        from lightning_gcsr.cli.convert import expand as command
    elif given.command == "speed":
        from lightning_gcsr.cli.speed import run as command
    else:
        from lightning_gcsr.cli.diff import run as command
    return command(given)


def parser() -> ArgumentParser:
    """The parser of all arguments, from which shtab makes completions for a shell."""
    parser = ArgumentParser(
        prog="lightning-gcsr",
        description="Inspect, compress and compare files of weights, and measure what zeros are worth.",
        epilog="Exit codes: 0 done, 1 the answer is no (diff), 2 wrong arguments or files that cannot be used.",
        allow_abbrev=False,
    )
    version = sys.modules["lightning_gcsr"].__version__  # of this very code, installed or not
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_report(commands)
    _add_compress(commands)
    _add_expand(commands)
    _add_diff(commands)
    _add_speed(commands)
    return parser


def _add_command(commands: Any, name: str, summary: str, details: str, example: str) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=details,
        epilog=f"Example:\n  lightning-gcsr {name} {example}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="BYTES",
        help="the most memory that the tensors of a file may take, for a file that you trust; by default 1 GiB, or a"
        " thousand times the size of the file if that is more",
    )
    return parser


def _add_file(parser: ArgumentParser, name: str, shown: str, summary: str) -> None:
    argument = parser.add_argument(name, metavar=shown, help=summary)
    # What shtab completes with names of files.
    argument.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]


def _add_report(commands: Any) -> None:
    summary = "show the zeros and the sizes of the tensors in a file"
    details = "Show the zeros, the empty rows and columns, and the sizes of each tensor in a file, and the totals."
    parser = _add_command(commands, "report", summary, details, "model.ckpt --sort stored")
    _add_file(parser, "file", "FILE", _ANY_KIND)
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print JSON: the tensors and their totals")
    formats.add_argument("--csv", action="store_true", help="print CSV: a line for each tensor")
    parser.add_argument(
        "--sort",
        choices=_SORT_KEYS,
        help="sort by name, or by a number with the largest first; by default the order is that of the file",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="MAGNITUDE",
        help="the magnitude up to which a weight counts as zero (default: 0)",
    )


def _add_compress(commands: Any) -> None:
    summary = "write the weights of a file into a compressed file"
    details = "Write the weights of a file into a compressed file. Nothing else of a checkpoint is kept."
    parser = _add_command(commands, "compress", summary, details, "model.ckpt model.safetensors")
    _add_file(parser, "input", "IN", _ANY_KIND)
    _add_file(parser, "output", "OUT", "the file to write, usually with the suffix .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_expand(commands: Any) -> None:
    summary = "write a compressed file as a plain one"
    details = "Write a compressed file as a plain one, of the kind that the suffix of OUT says."
    parser = _add_command(commands, "expand", summary, details, "model.safetensors model.pt")
    _add_file(parser, "input", "IN", "a compressed file")
    kinds = (
        ".safetensors; .pt, .pth or .bin for a state dict of torch.save; or .ckpt for a checkpoint that Lightning loads"
    )
    _add_file(parser, "output", "OUT", f"the file to write: {kinds}")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_diff(commands: Any) -> None:
    summary = "show which tensors of two files differ"
    details = (
        "Show which tensors of two files differ, and by how much. NaN equals NaN. The exit code is 0 if none differs,"
        "\nelse 1."
    )
    parser = _add_command(commands, "diff", summary, details, "model.ckpt model.safetensors")
    _add_file(parser, "left", "A", _ANY_KIND)
    _add_file(parser, "right", "B", "another one, of any of these kinds")
    parser.add_argument("--exact", action="store_true", help="compare bits: −0.0 differs from 0.0, and NaNs may differ")


def _add_speed(commands: Any) -> None:
    summary = "measure a network against the smaller one without its zero units"
    details = (
        "Measure a network on this machine, as it is and without the units that do nothing: milliseconds, parameters,"
        "\noperations, memory and bytes. It also measures what installed runtimes make of scattered zeros."
        "\nThe function that makes the network is imported and called; nothing in the file of weights is executed."
    )
    parser = _add_command(commands, "speed", summary, details, "mymodels:make_resnet 1,3,32,32 --weights model.ckpt")
    parser.add_argument(
        "network", metavar="MODULE:FUNCTION", help="a function without arguments that returns the network"
    )
    parser.add_argument(
        "shape", metavar="SHAPE", type=_shape, help="the shape of an example input, as 1,3,32,32 or 1x3x32x32"
    )
    parser.add_argument("--weights", metavar="FILE", help=f"the trained weights: {_ANY_KIND}")
    parser.add_argument("--prefix", metavar="PREFIX", default="", help="what to take off the names in FILE, as model.")
    parser.add_argument(
        "--threads", type=_count(1), metavar="N", help="how many threads PyTorch uses (default: its own)"
    )
    parser.add_argument("--repeats", type=_count(2), default=30, metavar="N", help="how often each runs (default: 30)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _shape(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.replace("x", ",").split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ArgumentTypeError(
            f"must be sizes of at least 1 with commas or x between them, got {text}. Write 1,3,32,32."
        )
    return sizes


def _count(minimum: int) -> Callable[[str], int]:
    """A type of argument: an integer of at least the minimum."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ArgumentTypeError(
                f"must be an integer of at least {minimum}, got {text}. Leave it out for the default."
            )
        return int(text)

    return count


def _refuse(problem: str) -> int:
    if sys.stderr is not None:
        printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in problem)
        print(f"lightning-gcsr: error: {printable}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM an exception, so that temporary files are removed."""
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
