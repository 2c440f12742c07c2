"""Timing contestants against each other: in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Benchmark", "Times", "machine", "time_in_turns"]


class Benchmark(NamedTuple):
    """What a benchmark found."""

    text: str
    """Its tables, in Markdown."""
    ratios: dict[str, float]
    """The ratios that later runs are compared with, by a name that says what was measured; less is better."""


class Times:
    """The seconds that each contestant took in each round."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = dict(seconds)

    def median(self, name: str) -> float:
        """The median seconds of a contestant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """The median over the rounds of what a contestant took, over what the reference took in the same round."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(one / other for one, other in pairs)


def machine(device: torch.device) -> str:
    """What the numbers were taken on, without names."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}"


def time_in_turns(contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> Times:
    """Call each contestant once in each round. The first two rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, call in contestants.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return Times(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
