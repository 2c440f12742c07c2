"""Timing contestants against each other: in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["machine", "median_times"]


def machine(device: torch.device) -> str:
    """What the numbers were taken on, without names."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()}-core CPU"


def median_times(
    contestants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """The median seconds that each takes over so many rounds, in which each is called once; two more do not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, call in contestants.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
