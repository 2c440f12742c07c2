"""What one network costs on this machine: time, parameters, operations, memory, bytes."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_gcsr.storage.compressed_file import save_compressed
from lightning_gcsr.structured.tracing import run_module

__all__ = ["Milliseconds", "NetworkCost", "network_cost", "take_turns"]

_WARM_UP = 3


@dataclass(frozen=True)
class Milliseconds:
    """The times of some runs."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third quartile."""
    runs: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} – {self.high:.3g})"


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs for an example input, in eval mode and without gradients."""

    milliseconds: Milliseconds
    parameters: int
    zeros: int
    """Parameters that are exactly zero."""
    flops: int
    """Floating-point operations of matrix products, convolutions and attention; others are not counted."""
    peak_bytes: int
    """The largest memory for parameters, buffers and what the operations return, at one time; buffers within kernels
    are not counted."""
    file_bytes: int
    """Of ``torch.save`` of the state dict."""
    compressed_bytes: int
    """Of :func:`~lightning_gcsr.save_compressed`."""


@torch.no_grad()
def network_cost(module: nn.Module, arguments: tuple[Any, ...], milliseconds: Milliseconds) -> NetworkCost:
    """The costs of a network, of which the time has been measured."""
    with FlopCounterMode(display=False) as counter:
        run_module(module, arguments)
    parameters = list(module.parameters())
    held = sum(tensor.nbytes for tensor in [*parameters, *module.buffers()])
    with _LiveBytes() as live:
        run_module(module, arguments)
    file, compressed = _file_bytes(module)
    return NetworkCost(
        milliseconds,
        sum(parameter.numel() for parameter in parameters),
        sum(int((parameter == 0).sum()) for parameter in parameters),
        counter.get_total_flops(),
        held + live.peak,
        file,
        compressed,
    )


@torch.no_grad()
def take_turns(runs: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> list[Milliseconds]:
    """The times of several functions that take turns, so that all of them meet the same disturbances."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(_WARM_UP + repeats):
        for run, measured in zip(runs, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn >= _WARM_UP:
                measured.append(1_000 * (time.perf_counter() - start))
    results = []
    for measured in times:
        low, median, high = statistics.quantiles(measured, n=4, method="inclusive")
        results.append(Milliseconds(median, low, high, len(measured)))
    return results


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # torch.accelerator is not in torch 2.5


class _LiveBytes(TorchDispatchMode):
    """Adds up the memory of what operations return, as long as it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # the memory of parameters and inputs is not new
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


def _file_bytes(module: nn.Module) -> tuple[int, int]:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_compressed(module, path)
        return len(buffer.getvalue()), path.stat().st_size
