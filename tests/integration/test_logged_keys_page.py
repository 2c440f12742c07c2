"""The page of logged keys says what real trainings log, no more and no less."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gcsr import CompressionMonitor, CoupledGroupLasso, Gate, GradientCoherentRegularization, Schedule

from .models import Adversaries, MemoryLogger, Regression, fit, loader

pytestmark = pytest.mark.filterwarnings("ignore:.*have collapsed", "ignore:.*target_sparsity=0.5 asked for")

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
PLACES = {"{name}": r"[A-Za-z0-9_.-]+", "{parameter}": r"[a-z_]+(\.\w+)*\.weight", "{i}": r"\d+"}
RANGES = {"[−1, 1]": (-1.0, 1.0), "[0, 1]": (0.0, 1.0), "≥ 0": (0.0, math.inf), "≥ 1": (1.0, math.inf)}


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables whose first column has this heading."""
    found: list[list[str]] = []
    inside = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = cells[:1] == [heading] or (inside and bool(cells))
        if inside and cells[0].startswith("`"):
            found.append(cells)
    return found


def pattern(key: str) -> str:
    """A regular expression for a key of the page."""
    expression = re.escape(key.strip("`"))
    for place, names in PLACES.items():
        expression = expression.replace(re.escape(place), names)
    return expression


DOCUMENTED = {pattern(key): RANGES[bounds] for key, _, _, bounds in rows("key")}


def train(path: Path, model: LightningModule, **kwargs: Any) -> MemoryLogger:
    """A short training that logs each step."""
    logger = MemoryLogger()
    callbacks = [GradientCoherentRegularization(**kwargs), CompressionMonitor()]
    fit(path, model, callbacks, loader(), logger=logger, max_epochs=2)
    return logger


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The values of each key that any of these trainings logged; the losses are of the module itself."""
    path = tmp_path_factory.mktemp("keys")
    loggers = [
        train(path, Regression(), strength=0.05, log_per_parameter=True),
        train(path, Regression(), strength=0.05, gate=Gate("temporal", scope="parameter"), name="second"),
        train(path, Regression(), gate=None, strength=1e6),  # everything collapses except what cannot
        train(path, Regression(), target_sparsity=0.5, schedule=Schedule(stop=8)),
        train(path, Regression(), penalty=CoupledGroupLasso(example_input=torch.zeros(1, 4)), strength=0.05),
        train(path, Adversaries(toggle=True), strength=0.05, log_per_parameter=True),
    ]
    keys = {key for logger in loggers for key in logger.logged} - {"epoch", "loss"}
    return {key: [value for logger in loggers for value in logger.values(key)] for key in sorted(keys)}


def test_every_key_that_is_logged_is_on_the_page_once(logged: dict[str, list[float]]) -> None:
    for key in logged:
        assert len([known for known in DOCUMENTED if re.fullmatch(known, key)]) == 1, key


def test_every_key_on_the_page_is_logged(logged: dict[str, list[float]]) -> None:
    assert [known for known in DOCUMENTED if not any(re.fullmatch(known, key) for key in logged)] == []


def test_every_value_lies_in_its_range(logged: dict[str, list[float]]) -> None:
    for known, (least, most) in DOCUMENTED.items():
        for key, values in logged.items():
            if re.fullmatch(known, key):
                assert values
                assert all(least <= value <= most for value in values), key


@pytest.mark.parametrize("callback", [GradientCoherentRegularization, CompressionMonitor])
def test_keys_in_the_docstrings_are_on_the_page(callback: type) -> None:
    page = {key for cells in [*rows("key"), *rows("image or table")] for key in re.findall("`(.+?)`", cells[0])}
    named = set(re.findall(r"``([\w{}]+(?:/[\w{}]+)+)``", callback.__doc__ or ""))
    assert len(named) >= 4
    assert named <= page


def test_histograms_are_those_of_the_page(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, Regression(), CompressionMonitor(histograms=True), loader(), logger=logger)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["histograms"]
    [known] = [pattern(key) for key, *_ in rows("histogram")]
    assert tags
    assert all(re.fullmatch(known, tag) for tag in tags)
