"""The oldest versions that are tested are the lower bounds that the package promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
TESTED_EXTRAS = ("cli", "examples", "loggers")


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in TESTED_EXTRAS for requirement in project["optional-dependencies"][extra]]
    requirements = [Requirement(line) for line in (*project["dependencies"], *extras) if "lightning-gcsr" not in line]
    bounds = {
        (canonicalize_name(needed.name), Version(next(iter(needed.specifier)).version)) for needed in requirements
    }
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if "==" in line]
    assert bounds <= {(canonicalize_name(name), Version(version)) for name, version in pins}
