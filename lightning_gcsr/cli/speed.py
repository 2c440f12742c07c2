"""``lightning-gcsr speed``: a network against what is left of it without its zero units, measured on this machine."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace

from lightning_gcsr.cli.console import write
from lightning_gcsr.structured.speed_report import speed_of_factory

__all__ = ["run"]


def run(given: Namespace) -> int:
    """Print the report and return the exit code."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that the user's own modules are found
    try:
        report = speed_of_factory(
            given.network,
            given.shape,
            given.weights,
            prefix=given.prefix,
            max_bytes=given.max_bytes,
            threads=given.threads,
            repeats=given.repeats,
        )
    except TypeError as error:  # what the function returns is no module
        raise ValueError(str(error)) from error
    write(json.dumps(report.as_dict(), indent=2) + "\n" if given.json else f"{report}\n")
    return 0
