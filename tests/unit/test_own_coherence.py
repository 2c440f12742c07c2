"""A coherence measure of one's own, at every scope and in every update, against the built-in one that it imitates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.training import batches, loss_of, small_net
from torch import Tensor

from lightning_gcsr import CoherenceMeasure, CoherentRegularizer, GradientCoherentRegularization
from lightning_gcsr.core.old_gate import Gate


class Direction(CoherenceMeasure):
    """What ``"direction"`` is."""

    threshold = 0.1

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        return torch.add(gradient, penalty_gradient, alpha=strength)


class Agreement(CoherenceMeasure):
    """What ``"agreement"`` is."""

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        return penalty_gradient


@pytest.mark.parametrize("scope", ["model", "parameter", "element"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize(("own", "built_in"), [(Direction(), "direction"), (Agreement(), "agreement")])
def test_it_trains_as_the_built_in_one_in_every_bit(
    own: CoherenceMeasure, built_in: Any, averaging: float, update: Any, scope: Any
) -> None:
    nets, reports = [], []
    for coherence in (own, built_in):
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        regularizer = CoherentRegularizer(
            net,
            strength={"^0": 2.0, ".": 0.5},
            coherence=coherence,
            scope=scope,
            update=update,
            averaging=averaging,
        )
        for batch in batches(6):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            reports.append(regularizer.before_step(optimizer))
            optimizer.step()
            regularizer.after_step(optimizer)
        nets.append(net)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert 0 < sum(float(report.injected) for report in reports[:6]) <= 6
    assert [float(report.coherence) for report in reports[:6]] == [float(report.coherence) for report in reports[6:]]


def test_its_threshold_is_the_default() -> None:
    assert Gate(Direction(), "model").threshold == 0.1
    assert Gate(Agreement(), "model").threshold == 0.0
    assert Gate(Direction(), "model", 0.4).threshold == 0.4


class Flat(CoherenceMeasure):
    """Forgets the shape."""

    def __init__(self, size: int) -> None:
        self.size = size

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Tensor:
        return gradient.flatten()


class Number(CoherenceMeasure):
    """Gives no tensor."""

    def companion(self, gradient: Tensor, penalty_gradient: Tensor, strength: float) -> Any:
        return 1.0


@pytest.mark.parametrize(
    ("coherence", "error", "message"),
    [
        (
            Flat(3),
            ValueError,
            r"`coherence` must have .*got coherence=Flat\(size=3\)\. Of numbers .*\(2, 2\) it gave \(4,\)",
        ),
        (Number(), ValueError, r"`coherence` must have a companion shaped like the gradient, .*it gave float"),
        (Direction, TypeError, r"`coherence` must be an instance, got .*Write Direction\(\)\."),
        (Direction().companion, ValueError, r"`coherence` must be one of 'direction', 'agreement', 'temporal', None"),
    ],
)
def test_what_is_no_measure_is_refused(coherence: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientCoherentRegularization("l1", strength=0.1, coherence=coherence)


def test_a_tolerance_has_no_meaning_with_it() -> None:
    with pytest.raises(ValueError, match="`tolerance` must be 0 but with coherence='agreement'"):
        GradientCoherentRegularization("l1", strength=0.1, coherence=Direction(), tolerance=0.1)
