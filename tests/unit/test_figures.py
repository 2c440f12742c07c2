"""The monitor's figures: right numbers, readable names, and what stands out is what matters."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from lightning_gcsr.callbacks.reporting.figures import (
    BINS_PER_DECADE,
    DECADES,
    heat_map,
    magnitudes,
    pixels,
    weight_histograms,
)

RED = to_rgb("#d62728")


def cells(figure):
    """The colours of a heat map, of shape (layers, steps, 3)."""
    [mesh] = figure.axes[0].collections
    shape = mesh.get_array().shape
    return mesh.cmap(mesh.norm(mesh.get_array()))[..., :3].reshape(*shape, 3)


def labels(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def test_heat_map_names_layers_and_says_where_they_are_now():
    values = torch.tensor([[0.0, 0.125], [0.5, 1.0], [0.9, 0.9995], [float("nan"), float("nan")]])
    figure = heat_map(["a", "b", "c", "d"], [9, 19], values, "title", mark_full=True)
    assert labels(figure.axes[0]) == ["a", "b", "c", "d"]
    [right] = figure.axes[0].child_axes
    assert labels(right) == ["12.5 %", "100 %", "99.95 %", ""]
    assert figure.axes[0].get_title() == "title"
    assert figure.axes[0].yaxis_inverted()  # the first layer is above


def test_only_a_layer_without_a_weight_is_red():
    values = torch.tensor([[0.0, 0.99, 0.9999999, 1.0]], dtype=torch.float64)
    red = [tuple(color) == RED for color in cells(heat_map(["a"], [0, 1, 2, 3], values, "", mark_full=True))[0]]
    assert red == [False, False, False, True]
    assert not any(tuple(color) == RED for color in cells(heat_map(["a"], [0, 1, 2, 3], values, ""))[0])


def test_layers_that_differ_where_it_matters_look_different():
    shares = torch.tensor([[0.0, 0.5, 0.9, 0.99, 0.999, 1.0]], dtype=torch.float64)
    colors = cells(heat_map(["a"], list(range(6)), shares, "", mark_full=True))[0]
    assert len({tuple(color) for color in colors}) == 6


def test_columns_reach_from_step_to_step():
    figure = heat_map(["a"], [0, 10, 30], torch.zeros(1, 3), "")
    [mesh] = figure.axes[0].collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 10, 30, 50]
    heat_map(["a"], [5], torch.zeros(1, 1), "")  # one column is a heat map, too


@pytest.mark.parametrize("length", [3, 60])
def test_long_names_make_the_image_wider_and_leave_room_for_it(length):
    figure = heat_map(["n" * length] * 2, [0, 1], torch.zeros(2, 2), "")
    image = pixels(figure)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert figure.axes[0].get_window_extent().width > 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitudes_are_a_histogram_of_logarithms(dtype):
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:5] = 0.0
    weight[5, :2] = torch.tensor([float("nan"), float("-inf")])
    zeros, *bins = magnitudes({"weight": weight})["weight"]
    known = weight.float().abs().numpy().ravel()
    known = known[np.isfinite(known)]
    edges = np.linspace(DECADES[0], DECADES[-1] + 1, len(bins) + 1)
    assert len(bins) == len(DECADES) * BINS_PER_DECADE
    assert zeros == np.count_nonzero(known == 0) == 250
    assert sum(bins) == len(known) - zeros
    expected = np.histogram(np.log10(known[known > 0]), edges)[0]
    assert np.abs(np.array(bins) - expected).sum() <= 4  # on an edge, rounding decides


def test_extremes_are_counted_at_the_ends():
    zeros, *bins = magnitudes({"weight": torch.tensor([0.0, -0.0, 1e-30, -1e30])})["weight"]
    assert (zeros, bins[0], bins[-1], sum(bins)) == (2, 1, 1, 2)


def test_histogram_shows_the_zeros_beside_the_others():
    counts = magnitudes({"a": torch.tensor([0.0, 0.0, 0.0, 1.0]), "b": torch.ones(3), "c": torch.zeros(3)})
    figure = weight_histograms(counts, "title")
    panels = [panel for panel in figure.axes if panel.axison]
    assert [panel.get_title() for panel in panels] == ["a: 75.0 % zero", "b: 0 % zero", "c: 100 % zero"]
    assert all(panel.get_yscale() == "log" for panel in panels)
    assert [panel.containers[0].patches[0].get_height() for panel in panels] == [3, 0, 3]
    assert all(to_rgb(panel.containers[0].patches[0].get_facecolor()[:3]) == RED for panel in panels)
    assert pixels(figure).shape[2] == 3
