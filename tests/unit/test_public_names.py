"""The public surface of the package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gcsr

PACKAGE = Path(lightning_gcsr.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(module_name(path) for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


@pytest.mark.parametrize("name", lightning_gcsr.__all__)
def test_public_name_is_there_and_documented(name: str) -> None:
    assert (getattr(lightning_gcsr, name).__doc__ or "").strip()


def test_star_import_gives_all() -> None:
    namespace: dict[str, object] = {}
    exec("from lightning_gcsr import *", namespace)
    assert set(lightning_gcsr.__all__) <= set(namespace)


@pytest.mark.parametrize("name", MODULES)
def test_module_lists_every_public_class_and_only_names_that_exist(name: str) -> None:
    module = importlib.import_module(f"lightning_gcsr.{name}")
    assert all(hasattr(module, public) for public in module.__all__)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    assert {n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"} <= set(module.__all__)


def test_packages_work_without_lightning() -> None:
    """All in one process, since it takes seconds to import torch."""
    without = ("core", "sparsity", "storage", "structured", "cli")
    names = [module_name(path) for package in without for path in sorted((PACKAGE / package).glob("*.py"))]
    code = "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
    code += "".join(f"import lightning_gcsr.{name}\n" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)
