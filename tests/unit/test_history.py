"""The history of layers: bounded, evenly spread, with its last column, and the same after a resume."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcsr.callbacks.reporting.history import History


def filled(steps, limit=256):
    history = History(limit)
    for step in steps:
        history.record(step, {"a": step / 1000, "b": -step / 1000})
    return history


@given(limit=st.integers(2, 20), count=st.integers(1, 300), stride=st.integers(1, 50))
def test_columns_are_bounded_and_even_and_the_last_is_there(limit, count, stride):
    steps = list(range(0, count * stride, stride))
    history = filled(steps, limit)
    assert len(history.steps) <= limit
    assert len(history.steps) >= min(count, limit // 2)
    assert history.steps[0] == 0
    assert history.steps[-1] == steps[-1]
    gaps = {b - a for a, b in zip(history.steps[:-2], history.steps[1:-1], strict=True)}
    assert len(gaps) <= 1
    torch.testing.assert_close(history.table()[0], torch.tensor(history.steps, dtype=torch.float64) / 1000)


@given(limit=st.integers(2, 20), before=st.integers(1, 100), back=st.integers(0, 30), after=st.integers(0, 100))
def test_a_history_that_goes_on_from_a_state_is_the_one_that_never_stopped(limit, before, back, after):
    total = before + after
    expected = filled(range(total), limit)
    history = History(limit)
    history.load_state_dict(filled(range(before), limit).state_dict())
    for step in range(before, total):
        history.record(step, {"a": step / 1000, "b": -step / 1000})
    assert history.steps == expected.steps
    assert torch.equal(history.table(), expected.table())
    # Steps that are made once more take the place of what was there.
    for step in range(max(0, total - back), total):
        history.record(step, {"a": 0.0})
    assert history.steps == sorted(set(history.steps))
    assert history.steps[-1] == total - 1


def test_state_survives_a_weights_only_checkpoint(tmp_path):
    history = filled(range(10))
    history.record(10, {"c": 1.0})
    torch.save(history.state_dict(), tmp_path / "state")
    restored = History()
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert restored.names == ["a", "b", "c"]
    assert torch.equal(restored.table().nan_to_num(7.0), history.table().nan_to_num(7.0))
    assert math.isnan(restored.table()[0, -1])


def test_empty_history_has_a_state():
    history = History()
    history.load_state_dict(History().state_dict())
    assert (history.steps, history.names, history.table().shape) == ([], [], (0, 0))
