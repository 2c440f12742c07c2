"""What a report says; that it agrees with the slow regularizer is shown where steps are."""

from __future__ import annotations

import pytest
import torch
from reference.training import batches, loss_of, small_net

from lightning_gcsr import CoherentRegularizer, Gate, Schedule

NOW = Schedule(warmup=0)


def optimizer_of(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def test_numbers_are_tensors_of_one_or_of_the_number_of_parameters() -> None:
    net = small_net()
    loss_of(net, batches(1)[0]).backward()
    report = CoherentRegularizer(net, strength=0.1, schedule=NOW).before_step(optimizer_of(net))
    for field in ("coherence", "injected", "strength", "grad_norm", "penalty_grad_norm", "finite"):
        assert getattr(report, field).shape == ()
    for field in ("coherence_by_parameter", "injected_by_parameter"):
        assert getattr(report, field).shape == (3,)
    assert report.sizes == (30, 20, 8)


def test_the_gradient_is_that_of_this_step_and_coherence_that_of_the_average() -> None:
    net = small_net()
    gate = Gate("agreement", "model", averaging=0.5)
    regularizer = CoherentRegularizer(net, strength=0.1, gate=gate, schedule=NOW)
    optimizer = optimizer_of(net)
    for sign in (1, -1):  # the average of both is −1/3 of the sign of the weights
        for parameter in net.parameters():
            parameter.grad = sign * parameter.detach().sign()
        report = regularizer.before_step(optimizer)
    assert float(report.grad_norm) == pytest.approx(58**0.5)
    assert float(report.coherence) == pytest.approx(-1)


def test_the_coherence_is_without_the_tolerance_and_measured_at_strength_zero() -> None:
    net = small_net()
    loss_of(net, batches(1)[0]).backward()
    found = set()
    for tolerance, strength in ((0.0, 0.5), (0.5, 0.5), (1.0, 0.5), (1.0, 0.0)):
        gate = Gate(averaging=0, tolerance=tolerance)
        report = CoherentRegularizer(net, strength=strength, gate=gate, schedule=NOW).before_step(optimizer_of(net))
        found.add(float(report.coherence))
        assert (float(report.injected) > 0) is (strength > 0)
    assert len(found) == 1


def test_reading_a_report_late_gives_the_numbers_of_its_own_step() -> None:
    net = small_net()
    optimizer = optimizer_of(net)
    regularizer = CoherentRegularizer(net, strength=0.1, schedule=NOW)
    reports, read_at_once = [], []
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        report = regularizer.before_step(optimizer)
        reports.append(report)
        read_at_once.append([float(report.coherence), float(report.injected), float(report.grad_norm)])
        optimizer.step()
        regularizer.after_step(optimizer)
    assert [[float(r.coherence), float(r.injected), float(r.grad_norm)] for r in reports] == read_at_once
