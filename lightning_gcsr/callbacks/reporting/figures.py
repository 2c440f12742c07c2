"""The monitor's figures: heat maps of layers × steps, and histograms of weights with their zeros beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lightning_gcsr.core.sharding import is_sharded, local_part, replication_factors, sum_over_processes

__all__ = ["heat_map", "magnitudes", "pixels", "weight_histograms"]

DECADES = range(-8, 2)
"""Magnitudes from 1e-8 to 100; what lies beyond counts in the first or last bin."""
BINS_PER_DECADE = 6
WIDTH = 5.6
"""Inches: TensorBoard shows images side by side, of half as many pixels, and the text has to survive it."""
_RED, _BLUE, _GREY = "#d62728", "#4c72b0", "#d9d9d9"


def heat_map(names: Sequence[str], steps: Sequence[int], values: Tensor, title: str, mark_full: bool = False) -> Figure:
    """Shares in [0, 1], a row for each layer, with its last value behind it; where there is none it is grey.

    Args:
        names: The layers, the first one above.
        steps: The optimizer step of each column.
        values: Of shape (layers, steps).
        title: What the values are.
        mark_full: Whether 1 is red, and the scale ever finer towards it: of a sparsity, 99 % and 99.9 % are as
            different as 90 % and 99 %.
    """
    figure = Figure(
        figsize=(WIDTH + _more(names, 16), 1.2 + 0.2 * len(names)), layout="constrained"
    )  # without pyplot, which keeps it
    panel = figure.subplots()
    bounds, ticks = [i / 20 for i in range(21)], [0.0, 0.25, 0.5, 0.75, 1.0]
    if mark_full:
        bounds = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1]
        ticks = [0.0, 0.5, 0.9, 0.99, 0.999, 1.0]
    colors = colormaps["YlGnBu"].resampled(len(bounds) - 1).with_extremes(bad=_GREY, over=_RED)
    # A column reaches from its step to the next one; the last is as wide as the one before it.
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    mesh = panel.pcolormesh(
        [*steps, steps[-1] + width],
        np.arange(len(names) + 1) - 0.5,
        np.ma.masked_invalid(values.numpy()),
        norm=BoundaryNorm(bounds, colors.N, extend="neither", clip=not mark_full),
        cmap=colors,
    )
    panel.set(ylim=(len(names) - 0.5, -0.5))
    panel.set_title(title, fontsize="medium")
    panel.set_xlabel("optimizer step", fontsize="small")
    panel.tick_params(labelsize="small")
    panel.set_yticks(range(len(names)), names, fontsize="small")
    last = panel.secondary_yaxis("right")
    last.set_yticks(range(len(names)), [_percent(value) for value in values[:, -1].tolist()], fontsize="small")
    last.tick_params(length=0)
    extend = "max" if mark_full else "neither"
    bar = figure.colorbar(mesh, ax=panel, ticks=ticks, spacing="uniform", pad=0.02, extend=extend)
    bar.ax.set_yticklabels([f"{100 * tick:g} %" for tick in ticks], fontsize="small")
    return figure


def _more(names: Iterable[str], fitting: int) -> float:
    """The inches that the longest name takes beyond so many characters."""
    return 0.085 * max(0, max(map(len, names)) - fitting)


def _percent(value: float) -> str:
    """As many digits as tell a layer that has a weight left from one that has none."""
    if value != value:
        return ""
    return f"{100 * value:.0f} %" if value in (0, 1) else f"{min(100 * value, 99.99):.{2 if value > 0.99 else 1}f} %"


def magnitudes(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """For each tensor the number of exact zeros, then of weights in each bin of magnitude.

    NaN and infinity are left out. Where tensors are sharded over processes, all processes must call this: it adds up.

    Example:
        >>> zeros, *bins = magnitudes({"weight": torch.tensor([0.0, 0.0, 0.5, -0.5, 1e-30])})["weight"]
        >>> zeros, bins[0], max(bins)
        (2, 1, 2)
    """
    counts = [_count(local_part(weight.detach())) for weight in weights.values()]
    if any(map(is_sharded, weights.values())):
        parts = zip(counts, replication_factors(weights.values()), strict=True)
        counts = list(sum_over_processes(torch.stack([count.double() * part for count, part in parts])).round().long())
    return {name: count.tolist() for name, count in zip(weights, counts, strict=True)}


def _count(weight: Tensor) -> Tensor:
    magnitude = weight.abs().float().flatten()
    magnitude = magnitude[magnitude.isfinite()]
    first, bins = DECADES[0], len(DECADES) * BINS_PER_DECADE
    place = ((magnitude.log10() - first) * BINS_PER_DECADE).floor().clamp(0, bins - 1).long() + 1
    return torch.bincount(torch.where(magnitude == 0, 0, place), minlength=bins + 1)


def weight_histograms(counts: Mapping[str, Sequence[int]], title: str) -> Figure:
    """A panel for each layer: how many weights there are of each magnitude, both on a log scale, and how many zeros.

    Args:
        counts: What :func:`magnitudes` gives.
        title: The title of the figure.
    """
    columns = min(2, len(counts))
    rows = -(-len(counts) // columns)
    figure = Figure(figsize=(WIDTH + columns * _more(counts, 22), 1.35 * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    edges = DECADES[0] + np.arange(len(DECADES) * BINS_PER_DECADE + 1) / BINS_PER_DECADE
    largest = max(max(count) for count in counts.values())
    for panel, (name, (zeros, *bins)) in zip(panels, counts.items(), strict=False):
        panel.bar(DECADES[0] - 1.5, zeros, width=1.0, color=_RED)
        panel.stairs(bins, edges, fill=True, color=_BLUE, baseline=0.5)
        share = zeros / max(1, zeros + sum(bins))
        panel.set_title(f"{name}: {_percent(share)} zero", fontsize="small")
        panel.set(yscale="log", ylim=(0.5, 3 * max(1, largest)))
        panel.minorticks_off()  # they take half of the time
        ticks = list(DECADES)[2::3]
        panel.set_xticks([DECADES[0] - 1.5, *ticks], ["zero", *[f"$10^{{{t}}}$" for t in ticks]])
        panel.tick_params(labelsize="small")
    for panel in panels[len(counts) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    figure.supxlabel("magnitude of the weight", fontsize="small")
    figure.supylabel("number of weights", fontsize="small")
    return figure


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as an image, of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
