"""The public surface, and that modules import in one direction only."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import lightning_gcsr

PACKAGE = Path(lightning_gcsr.__file__).parent

# A module may import those before it, as the design lays down. A new one has to be put in its place here.
ORDER = [
    "messages",
    "penalties",
    "coherence",
    "memory",
    "selection",
    "distributed",
    "optimizers",
    "control",
    "settings",
    "terms",
    "blocks",
    "report",
    "passes",
    "regularizer",
    "sparsity",
    "summary",
    "pruning",
    "chains",
    "units",
    "shrink",
    "metrics",
    "files",
    "forms",
    "contents",
    "compression",
    "weights_file",
    "weights_table",
    "weights_difference",
    "callbacks.support",
    "callbacks.layout",
    "callbacks.history",
    "callbacks.figures",
    "callbacks.sinks",
    "callbacks.hyperparameters",
    "callbacks.images",
    "callbacks.regularization",
    "callbacks.keep_zeros",
    "callbacks.monitor",
    "callbacks.compressed_checkpoint",
    "callbacks",
    "finder_figure",
    "finder_result",
    "trials",
    "watch",
    "finder",
    "thresholds",
    "commands",
    "cli",
]
PLAIN_TORCH = {"torch", "typing_extensions"}
MORE = {
    "metrics": {"torchmetrics"},
    "contents": {"safetensors"},
    "compression": {"safetensors"},
    "weights_file": {"safetensors"},
    "summary": {"rich"},
}
FIRST_OF_LIGHTNING = ORDER.index("callbacks.support")

# What the design and the readers of the docs rely on.
PROMISED = {
    "CoherenceMeasure",
    "CoherentRegularizer",
    "CompressedCheckpoint",
    "CompressionMonitor",
    "CompressionRatio",
    "ElasticNet",
    "GateReport",
    "GradientCoherentRegularization",
    "GroupLasso",
    "KeepZeros",
    "L1",
    "L2",
    "Penalty",
    "ShrinkReport",
    "Sparsity",
    "SparsityController",
    "StoredBytes",
    "StrengthFinderResult",
    "Suggestion",
    "TensorCount",
    "ThresholdCurve",
    "ThresholdPoint",
    "ToleranceLevel",
    "Trial",
    "UnitCount",
    "count_tensors",
    "find_strength",
    "load_compressed",
    "module_bytes",
    "prune_small",
    "save_compressed",
    "shrink_units",
    "stored_bytes",
    "threshold_curve",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(name for path in PACKAGE.rglob("*.py") if (name := module_name(path)))


def source(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it: full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module)
    return found


def own(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    return {name.partition(".")[2] for name in imports(path) if name.partition(".")[0] == "lightning_gcsr"}


def isort_style(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_promised_name_is_importable(name: str) -> None:
    assert name in lightning_gcsr.__all__
    assert hasattr(lightning_gcsr, name)


def test_all_lists_what_is_imported_sorted() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(lightning_gcsr.__all__) == imported
    assert lightning_gcsr.__all__ == sorted(lightning_gcsr.__all__, key=isort_style)
    assert len(set(lightning_gcsr.__all__)) == len(lightning_gcsr.__all__)


def test_the_top_module_holds_names_and_nothing_else() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(lightning_gcsr, name).__doc__ or "").strip()


def test_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", lightning_gcsr.__version__)


def test_star_import_gives_all() -> None:
    namespace: dict[str, object] = {}
    exec("from lightning_gcsr import *", namespace)
    assert set(lightning_gcsr.__all__) <= set(namespace)


@pytest.mark.parametrize("name", MODULES)
def test_module_lists_names_that_exist_sorted(name: str) -> None:
    module = importlib.import_module(f"lightning_gcsr.{name}")
    assert module.__all__ == sorted(module.__all__, key=isort_style)
    assert all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_module_lists_every_public_class(name: str) -> None:
    module = importlib.import_module(f"lightning_gcsr.{name}")
    tree = ast.parse(source(name).read_text(encoding="utf-8"))
    assert {n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"} <= set(module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_module_has_its_place_in_the_order(name: str) -> None:
    assert name in ORDER


@pytest.mark.parametrize("name", [name for name in MODULES if name in ORDER])
def test_module_imports_upwards_only(name: str) -> None:
    allowed = set(ORDER[: ORDER.index(name)])
    assert own(source(name)) <= allowed


@pytest.mark.parametrize("name", [name for name in MODULES if name in ORDER[:FIRST_OF_LIGHTNING]])
def test_plain_torch_module_needs_no_lightning(name: str) -> None:
    outside = {module.partition(".")[0] for module in imports(source(name))} - {"lightning_gcsr", "__future__"}
    assert outside - set(sys.stdlib_module_names) <= PLAIN_TORCH | MORE.get(name, set())
