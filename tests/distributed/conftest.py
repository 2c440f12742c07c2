"""The two processes, which are started once for all tests: to start them takes longer than what they do."""

from pathlib import Path
from typing import Any

import pytest

from .workers import WORK, WORLD, in_processes


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes write; a folder for each work."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def processes(folder: Path) -> list[dict[str, Any]]:
    """What each process found, by the name of the work."""
    return in_processes(folder, WORLD, WORK)
