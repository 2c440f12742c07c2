"""What the tests of the study share: its modules, the digits, and processes that need not import torch first."""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

STUDY = Path(__file__).parents[2] / "examples" / "study"
sys.path.insert(0, str(STUDY))  # its modules import each other as scripts do

if TYPE_CHECKING:
    from batches import Dataset


@pytest.fixture(scope="session")
def digits() -> "Dataset":
    """The handwritten digits, split and standardized."""
    from images import load_images

    return load_images("digits", Path("nowhere"), Path("nowhere"))


@pytest.fixture(scope="session")
def quick_processes() -> ForkServerContext:
    """A context whose processes come from one that has imported the study already, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    path = os.pathsep.join([str(STUDY), *filter(None, [before["PYTHONPATH"]])])
    os.environ.update(PYTHONPATH=path, OMP_NUM_THREADS="1")
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context
