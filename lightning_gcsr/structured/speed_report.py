"""What removing units is worth on this machine, dense against shrunk, and what scattered zeros are worth."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from torch import nn

from lightning_gcsr.sparsity.text_table import plain_table
from lightning_gcsr.structured.network_cost import NetworkCost, network_cost, take_turns
from lightning_gcsr.structured.output_tree import tensors_in
from lightning_gcsr.structured.scattered_zeros import NOT_MEASURED, RuntimeZeros, runtime_zeros
from lightning_gcsr.structured.shrink import check_module, copy_of, shrink_units
from lightning_gcsr.structured.tracing import run_module
from lightning_gcsr.validation import argument_error, check_integer

__all__ = ["SpeedReport", "speed_report"]


@dataclass(frozen=True, repr=False)
class SpeedReport:
    """What a network costs, and the smaller one; printed, it is a table."""

    dense: NetworkCost
    smaller: NetworkCost
    runtimes: tuple[RuntimeZeros, ...]
    """What runtimes make of the zeros of the dense network."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors of the example input."""
    machine: str
    """Device, threads and version of PyTorch."""

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table: what is measured, dense, shrunk, and the ratio of both."""
        dense, smaller = self.dense, self.smaller
        found = [("milliseconds", str(dense.milliseconds), str(smaller.milliseconds), self.speedup)]
        for title, field, unit in _ROWS:
            before, after = getattr(dense, field), getattr(smaller, field)
            form = ",d" if unit == 1 else ",.4g"
            cells = [f"{number if unit == 1 else number / unit:{form}}" for number in (before, after)]
            found.append((title, cells[0], cells[1], before / after if after else 1.0))
        return [(*row[:3], f"{row[3]:.2f}×") for row in found]

    @property
    def speedup(self) -> float:
        """How many times as fast the smaller network is."""
        return self.dense.milliseconds.median / self.smaller.milliseconds.median

    def __repr__(self) -> str:
        header = ("", "dense", "shrunk", "ratio")
        lines = [plain_table(header, self.rows(), left=header)]
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.shapes)
        runs = self.dense.milliseconds.runs
        lines.append(f"Median and quartiles of {runs} runs in turn; input {shapes}; {self.machine}.")
        if self.runtimes:
            share = self.dense.zeros / max(1, self.dense.parameters)
            lines.append(f"Scattered zeros, of which the dense network has {share:.1%}:")
            lines += [f"  {runtime}" for runtime in self.runtimes]
            lines.append(f"  {NOT_MEASURED}")
        return "\n".join(lines)


_ROWS = [
    ("parameters", "parameters", 1),
    ("MFLOP", "flops", 1e6),
    ("peak memory in MB", "peak_bytes", 1e6),
    ("file in MB", "file_bytes", 1e6),
    ("compressed file in MB", "compressed_bytes", 1e6),
]


def speed_report(
    module: nn.Module,
    example_input: Any,
    smaller: Optional[nn.Module] = None,
    *,
    repeats: int = 30,
    runtimes: bool = True,
) -> SpeedReport:
    """Measure a network and the smaller one that :func:`~lightning_gcsr.shrink_units` makes of it, on this machine.

    Both run in turn, in eval mode and without gradients. The report also says whether the installed runtimes gain from
    the zeros of the dense network: PyTorch's dense kernels, its sparse CSR layout for linear layers (compared with the
    dense kernels), and ONNX Runtime. A ratio below 1 means slower.

    Args:
        module: The network as it was trained. It stays as it is.
        example_input: An input, or a tuple of positional arguments, on the module's device.
        smaller: The smaller network; by default :func:`~lightning_gcsr.shrink_units` makes it.
        repeats: How often each network runs, after three runs that do not count.
        runtimes: Whether to measure the effect of scattered zeros in each runtime.

    Returns:
        The report, which prints as a table.

    Raises:
        TypeError: If ``module`` or ``smaller`` is not a module, or ``repeats`` not an integer.
        ValueError: If ``repeats`` is below 2, or if a network fails on ``example_input``.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
        >>> _ = net[0].weight.data[32:].zero_()
        >>> report = speed_report(net, torch.randn(16, 64), repeats=5, runtimes=False)
        >>> report.dense.parameters, report.smaller.parameters
        (18696, 2344)
        >>> print(report)  # doctest: +SKIP
                               dense                    shrunk                     ratio
        milliseconds           0.0683 (0.0638 – 0.178)  0.0332 (0.0312 – 0.0336)   2.06×
        ...
    """
    check_module(module)
    check_integer("repeats", repeats, minimum=2)
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    dense = copy_of(module)
    if smaller is None:
        smaller = shrink_units(dense, arguments)[0]
    elif not isinstance(smaller, nn.Module):
        raise argument_error("smaller", smaller, "must be a module", "Leave it out to have it made.", TypeError)
    tensors = tensors_in(arguments)
    device = next((tensor.device for tensor in [*module.parameters(), *tensors]), torch.device("cpu"))
    networks = [dense.eval(), copy_of(smaller).eval()]
    for network in networks:
        run_module(network, arguments)  # which names the submodule that fails
    times = take_turns([_run(network, arguments) for network in networks], device, repeats)
    before, after = (network_cost(network, arguments, time) for network, time in zip(networks, times, strict=True))
    zeros = tuple(runtime_zeros(dense, arguments, device, repeats)) if runtimes else ()
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    return SpeedReport(before, after, zeros, shapes, _machine(device))


def _run(network: nn.Module, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: network(*arguments)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    threads = torch.get_num_threads()
    plural = "thread" if threads == 1 else "threads"
    return f"{device.type} ({platform.machine()}), {threads} {plural}, PyTorch {torch.__version__}"
