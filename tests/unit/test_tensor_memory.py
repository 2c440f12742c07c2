"""Which tensors lie over the same memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gcsr import count_tensors
from lightning_gcsr.storage.tensor_memory import distinct_tensors

BASE = torch.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    "other",
    [BASE, BASE.t(), BASE.view(-1), BASE.view(2, 12), BASE[:], nn.Parameter(BASE), BASE.unsqueeze(0), BASE.detach()],
    ids=["object", "transpose", "flat", "view", "slice", "parameter", "unsqueezed", "detached"],
)
def test_tensors_over_the_same_memory_count_once(other: torch.Tensor) -> None:
    assert list(distinct_tensors([("first", BASE), ("second", other), ("third", BASE.clone())])) == ["first", "third"]
    assert [c.name for c in count_tensors({"first": BASE, "second": other})] == ["first"]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (BASE, BASE.clone()),
        (BASE[:2], BASE[2:]),
        (BASE[:2], BASE[:3]),
        (BASE[:, :3], BASE[:, 3:]),
        (torch.empty(0), torch.empty(0)),
        (torch.empty(2, device="meta"), torch.empty(2, device="meta")),
        (BASE[:2], BASE[:, :3]),
        (BASE[0, :4], BASE[:, 0]),
    ],
    ids=["copy", "rows", "sizes", "columns", "empty", "meta", "first-rows-and-first-columns", "row-and-column"],
)
def test_tensors_over_other_memory_count_each(left: torch.Tensor, right: torch.Tensor) -> None:
    assert list(distinct_tensors([("left", left), ("right", right)])) == ["left", "right"]
