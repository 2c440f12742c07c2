"""The report on speed counts what it says, and says which runtimes make use of zeros."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gcsr import speed_report
from lightning_gcsr.structured.network_cost import Milliseconds
from lightning_gcsr.structured.scattered_zeros import RuntimeZeros


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    with torch.no_grad():
        net[0].weight[32:] = 0
    return net


def test_costs_are_counted_before_and_after() -> None:
    net, inputs = network(), torch.randn(16, 64)
    report = speed_report(net, inputs, repeats=3, runtimes=False)
    assert (report.dense.parameters, report.smaller.parameters) == (64 * 256 + 256 + 256 * 8 + 8, 64 * 32 + 32 + 264)
    assert report.dense.zeros == 64 * 224
    assert (report.dense.flops, report.smaller.flops) == (2 * 16 * 72 * 256, 2 * 16 * 72 * 32)
    # At one time there are the weights, the hidden units, and what the activation makes of them.
    assert report.dense.peak_bytes == 4 * (report.dense.parameters + 2 * 16 * 256)
    assert report.dense.file_bytes > 4 * report.dense.parameters > report.dense.compressed_bytes
    assert report.dense.milliseconds.runs == report.smaller.milliseconds.runs == 3
    assert report.dense.milliseconds.low <= report.dense.milliseconds.median <= report.dense.milliseconds.high
    assert net.training
    json.dumps(report.as_dict())


def test_it_prints_as_a_table_that_says_the_threads() -> None:
    text = repr(speed_report(network(), torch.randn(16, 64), repeats=2, runtimes=False))
    assert [line.split("  ")[0] for line in text.splitlines()[1:-1]] == [
        *("milliseconds", "parameters", "MFLOP", "peak memory in MB", "file in MB", "compressed file in MB")
    ]
    threads = torch.get_num_threads()
    assert "of 2 runs in turn; input 16×64; cpu" in text
    assert f"{threads} thread" in text


def test_runtimes_are_measured_or_it_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    report = speed_report(network(), torch.randn(16, 64), repeats=2)
    dense, sparse, onnx = report.runtimes
    assert dense.with_zeros is not None
    assert sparse.compared_with == "in dense kernels"
    assert str(onnx) == "ONNX Runtime: not measured, since it is not installed; pip install onnx onnxscript onnxruntime"
    assert "Scattered zeros, of which the dense network has 76.7%:" in repr(report)
    assert "2:4 pattern only" in repr(report)
    report = speed_report(nn.Sequential(nn.Conv1d(2, 3, 1)), torch.randn(4, 2, 5), repeats=2)
    assert "there are no linear layers" in str(report.runtimes[1])
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)  # torch has a kernel for the whole of it
    report = speed_report(nn.TransformerEncoder(layer, 1), torch.randn(2, 3, 16), repeats=2)
    assert report.runtimes[1].with_zeros is not None


@pytest.mark.parametrize(
    ("with_zeros", "without", "verdict"),
    [
        ((1.0, 0.9, 1.1), (4.0, 3.9, 4.1), "1 ms with the zeros, 4 ms without zeros (4.00×), uses the zeros"),
        ((4.0, 3.0, 5.0), (4.2, 3.9, 4.4), "makes no use of the zeros"),
        ((4.0, 3.9, 4.1), (1.0, 0.9, 1.1), "(0.25×), is slower with the zeros"),
    ],
)
def test_the_verdict_is_that_of_the_quartiles(with_zeros: Any, without: Any, verdict: str) -> None:
    assert str(RuntimeZeros("it", Milliseconds(*with_zeros, 9), Milliseconds(*without, 9))).endswith(verdict)


def test_a_smaller_network_can_be_given_and_bad_ones_are_refused() -> None:
    inputs = torch.randn(16, 64)
    report = speed_report(network(), inputs, nn.Linear(64, 8), repeats=2, runtimes=False)
    assert report.smaller.parameters == 520
    with pytest.raises(TypeError, match=r"`smaller` must be a module, got smaller='half'. Leave it out"):
        speed_report(network(), inputs, "half")
    with pytest.raises(ValueError, match=r"`repeats` must be an integer of at least 2, got repeats=1"):
        speed_report(network(), inputs, repeats=1)
    with pytest.raises(ValueError, match=r"that the module accepts, .* for which Linear raises"):
        speed_report(network(), inputs, nn.Linear(3, 8))
