"""A repr can be typed in: it gives an object with the same repr."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_gcsr import (
    L1,
    L2,
    CoherentRegularizer,
    CompressedCheckpoint,
    CompressionMonitor,
    ElasticNet,
    Gate,
    GradientCoherentRegularization,
    GroupLasso,
    KeepZeros,
    Schedule,
)

module = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (GradientCoherentRegularization("l1", strength=0.1), "GradientCoherentRegularization(strength=0.1)"),
        (
            GradientCoherentRegularization(
                "l2", strength={"weight": 0.1}, gate=None, schedule=Schedule(stop=0.5), name="a"
            ),
            "GradientCoherentRegularization('l2', strength={'weight': 0.1}, gate=None, schedule=Schedule(stop=0.5),"
            " name='a')",
        ),
        (GradientCoherentRegularization(GroupLasso(1), target_sparsity=0.9, gate=Gate("direction", "model")), None),
        (CoherentRegularizer(module, "l1", strength=0.1), "CoherentRegularizer(module, strength=0.1)"),
        (CoherentRegularizer(module, L2(), strength={"w": 0.1}, update="proximal", include=["weight"]), None),
        (CoherentRegularizer(module, target_sparsity=0.9, schedule=Schedule(delay=3)), None),
        (CompressionMonitor(), "CompressionMonitor()"),
        (CompressionMonitor(1e-3, histograms=True), "CompressionMonitor(0.001, histograms=True)"),
        (CompressedCheckpoint(min_sparsity=0.9), "CompressedCheckpoint(min_sparsity=0.9)"),
        (CompressedCheckpoint(Path("here"), "small"), "CompressedCheckpoint('here', 'small')"),
        (KeepZeros(), "KeepZeros()"),
        (KeepZeros(0.5, include=["weight"]), "KeepZeros(0.5, include=['weight'])"),
        (Gate(), None),
        (Gate("temporal", scope="parameter", threshold=0.2), None),
        (Gate(tolerance=0.0, averaging=0.9), None),
        (Schedule(), "Schedule()"),
        (Schedule(delay=0.1, warmup=0.2, stop=0.9), "Schedule(delay=0.1, warmup=0.2, stop=0.9)"),
        (L1(), None),
        (ElasticNet(0.3), None),
    ],
    ids=repr,
)
def test_repr_can_be_typed_in(thing: Any, text: str | None) -> None:
    assert repr(eval(repr(thing))) == repr(thing)
    assert text is None or repr(thing) == text
