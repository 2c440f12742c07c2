"""With DDP each process gets the same curve, whose metric is the mean over processes."""

from pathlib import Path

import pytest

from .threshold_workers import WORLD, curves
from .workers import in_processes


@pytest.mark.distributed
def test_the_curve_is_the_mean_over_processes_and_the_same_in_each(tmp_path: Path) -> None:
    one, two = in_processes(tmp_path, WORLD, (curves,))
    one, two = one["curves"], two["curves"]
    assert one["table"] == two["table"]
    assert one["own"] != two["own"]
    for row, own, other in zip(one["table"], one["own"], two["own"], strict=True):
        assert row["val_loss"] == pytest.approx((own + other) / 2)
    assert one["same weights"]
    assert two["same weights"]
