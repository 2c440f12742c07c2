"""Runs every Python code block of the README and the documentation."""

import os
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


@pytest.fixture(scope="session", autouse=True)
def _quiet_folder(tmp_path_factory: pytest.TempPathFactory):
    """Code blocks and doctests may write logs; they must not land in the checkout."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("run"))
    yield
    os.chdir(before)


collect_ignore = ["docs/_build", "docs/api", "docs/tutorials"]  # made by the build of the documentation

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    fixtures=["_quiet_folder"],  # autouse does not reach code blocks
).pytest()
