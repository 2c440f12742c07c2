"""Counts of zeros, and the bytes of the stored forms."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gcsr import StoredBytes, TensorCount, count_tensors, module_bytes, stored_bytes
from lightning_gcsr.sparsity.counting import distinct_tensors, near_and_exact_zeros
from lightning_gcsr.storage.encodings import DTYPES

TINY = float(np.float32(1e-30))
ENTRIES = st.one_of(st.sampled_from([0.0, -0.0, 0.25, -0.25, TINY, math.nan, math.inf]), st.floats(-2, 2, width=32))
ARRAYS = hnp.arrays("float32", hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), elements=ENTRIES)


def count(tensor: torch.Tensor, threshold: float = 0.0) -> TensorCount:
    [result] = count_tensors({"w": tensor}, threshold)
    return result


# --- counts --------------------------------------------------------------------------------------------------------


@given(array=ARRAYS, threshold=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_counts_are_those_of_numpy(array: np.ndarray, threshold: float) -> None:
    result = count(torch.from_numpy(array.copy()), threshold)
    assert result.name == "w"
    assert result.shape == array.shape
    assert result.entries == array.size
    assert result.value_bytes == 4
    assert result.zeros == int((array == 0).sum())
    assert result.near_zeros == int((np.abs(array) <= threshold).sum())


def test_negative_zero_is_zero_and_nan_is_not() -> None:
    tensor = torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-45])
    result = count(tensor)
    assert (result.zeros, result.near_zeros) == (2, 2)
    result = count(tensor, 1.0)
    assert (result.zeros, result.near_zeros) == (2, 3)


def test_near_zeros_include_the_threshold_itself() -> None:
    result = count(torch.tensor([0.0, 0.5, -0.5, 0.5000001, -1.0]), 0.5)
    assert (result.zeros, result.near_zeros) == (1, 3)


@pytest.mark.parametrize(
    "dtype",
    [d for d in DTYPES.values() if "float4" not in str(d) and "e8m0" not in str(d)],  # which have other numbers
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_any_dtype_is_counted(dtype: torch.dtype, threshold: float) -> None:
    result = count(torch.tensor([[0, 1, 1], [0, 0, 1]]).to(dtype), threshold)
    assert (result.zeros, result.near_zeros, result.value_bytes) == (3, 3, dtype.itemsize)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such type")
def test_two_numbers_in_an_entry_are_as_large_as_the_larger_one() -> None:
    entries = torch.tensor([0x00, 0x80, 0x88, 0x19, 0x02, 0x29], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert (count(entries).zeros, count(entries, 0.5).near_zeros, count(entries, 1.0).near_zeros) == (3, 4, 6)


def test_the_least_integer_is_not_near_zero() -> None:
    assert count(torch.tensor([-128, 0, 127], dtype=torch.int8), 0.5).near_zeros == 1


@pytest.mark.parametrize("threshold", [1, 1.0])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32])
def test_the_threshold_may_be_an_integer(dtype: torch.dtype, threshold: float) -> None:
    result = count(torch.tensor([0, 1, 5], dtype=dtype), threshold)
    assert (result.zeros, result.near_zeros) == (1, 2)


def test_a_complex_number_is_near_zero_by_its_magnitude() -> None:
    assert count(torch.tensor([0.3 + 0.4j, 0.4 + 0.4j, 0j]), 0.5).near_zeros == 2


def test_tensors_that_need_gradients_are_counted() -> None:
    assert count(nn.Parameter(torch.zeros(3))).zeros == 3


def test_no_tensors_have_no_counts() -> None:
    assert count_tensors({}) == []


def test_counts_keep_names_and_order() -> None:
    tensors = {"b": torch.zeros(2), "a": torch.ones(3), "c": torch.tensor([0.0, 1.0])}
    assert [(c.name, c.zeros, c.entries) for c in count_tensors(tensors)] == [("b", 2, 2), ("a", 0, 3), ("c", 1, 2)]


def test_pairs_stay_on_the_device() -> None:
    pair = near_and_exact_zeros(torch.tensor([0.0, 0.1, 1.0]), 0.5)
    assert pair.tolist() == [1, 2]
    assert not pair.dtype.is_floating_point


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_on_two_devices_come_in_order() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3, device="cuda"), "c": torch.ones(4)}
    assert [c.zeros for c in count_tensors(tensors)] == [2, 3, 0]


@pytest.mark.parametrize("threshold", [-1e-9, math.nan, math.inf])
def test_a_bad_threshold_is_an_error(threshold: float) -> None:
    with pytest.raises(ValueError, match="`zero_threshold` must be a finite number of at least 0, got zero_threshold="):
        count_tensors({"w": torch.zeros(2)}, threshold)


@pytest.mark.parametrize("threshold", ["0", None, True])
def test_a_threshold_of_another_type_is_an_error(threshold: object) -> None:
    with pytest.raises(TypeError, match="`zero_threshold` must be a finite number of at least 0, got zero_threshold="):
        count_tensors({"w": torch.zeros(2)}, threshold)


# --- tied tensors --------------------------------------------------------------------------------------------------

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


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "nonzeros", "value_bytes", "expected"),
    [
        ((100, 200), 500, 4, StoredBytes(dense=80_000, bitmask=4_500, rows=101 * 2 + 500 + 2_000)),
        ((100, 257), 500, 4, StoredBytes(dense=102_800, bitmask=3_213 + 2_000, rows=101 * 2 + 1_000 + 2_000)),
        ((100, 256), 255, 4, StoredBytes(dense=102_400, bitmask=3_200 + 1_020, rows=101 + 255 + 1_020)),
        ((100, 256), 256, 4, StoredBytes(dense=102_400, bitmask=3_200 + 1_024, rows=202 + 256 + 1_024)),
        ((16, 3, 5, 5), 10, 2, StoredBytes(dense=2_400, bitmask=150 + 20, rows=17 + 10 + 20)),
        ((70_000,), 65_535, 2, StoredBytes(dense=140_000, bitmask=8_750 + 131_070, rows=4 + 65_535 * 6)),
        ((70_000,), 65_536, 2, StoredBytes(dense=140_000, bitmask=8_750 + 131_072, rows=8 + 65_536 * 6)),
        ((9,), 0, 4, StoredBytes(dense=36, bitmask=2, rows=2)),
        ((), 1, 4, StoredBytes(dense=4, bitmask=5, rows=2 + 1 + 4)),
        ((), 0, 8, StoredBytes(dense=8, bitmask=1, rows=2)),
        ((0,), 0, 4, StoredBytes(dense=0, bitmask=0, rows=2)),
        ((0, 3), 0, 4, StoredBytes(dense=0, bitmask=0, rows=1)),
        ((3, 0), 0, 4, StoredBytes(dense=0, bitmask=0, rows=4)),
    ],
)
def test_stored_bytes_by_hand(shape: tuple, nonzeros: int, value_bytes: int, expected: StoredBytes) -> None:
    assert stored_bytes(shape, nonzeros, value_bytes) == expected


def smallest_unsigned(largest: int) -> np.dtype:
    return next(np.dtype(kind) for kind in ("u1", "u2", "u4", "u8") if largest <= np.iinfo(kind).max)


@given(
    array=hnp.arrays(
        st.sampled_from(["float32", "float64", "float16"]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=20),
        elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.0]),
        fill=st.just(0.0),
    )
)
def test_stored_bytes_are_those_of_the_forms_really_built(array: np.ndarray) -> None:
    values = array[array != 0]
    bitmask = np.packbits(array.reshape(-1) != 0).nbytes + values.nbytes
    matrix = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
    csr = scipy.sparse.csr_array(matrix.astype("float64"))
    starts = csr.indptr.astype(smallest_unsigned(csr.nnz))
    columns = csr.indices.astype(smallest_unsigned(matrix.shape[1] - 1))
    rebuilt = np.zeros_like(matrix)
    for row in range(matrix.shape[0]):
        part = slice(int(starts[row]), int(starts[row + 1]))
        rebuilt[row, columns[part]] = csr.data[part]
    assert np.array_equal(rebuilt, matrix)
    rows = starts.nbytes + columns.nbytes + csr.data.astype(array.dtype).nbytes
    expected = StoredBytes(dense=array.nbytes, bitmask=bitmask, rows=rows)
    assert stored_bytes(array.shape, len(values), array.itemsize) == expected
    assert count(torch.from_numpy(array)).bytes == expected


@pytest.mark.parametrize(
    ("stored", "form", "size"),
    [
        (StoredBytes(dense=3, bitmask=4, rows=5), "dense", 3),
        (StoredBytes(dense=4, bitmask=3, rows=5), "bitmask", 3),
        (StoredBytes(dense=4, bitmask=5, rows=3), "rows", 3),
        (StoredBytes(dense=3, bitmask=3, rows=3), "dense", 3),
        (StoredBytes(dense=4, bitmask=3, rows=3), "bitmask", 3),
    ],
)
def test_best_form_is_the_smallest_and_of_equals_the_simplest(stored: StoredBytes, form: str, size: int) -> None:
    assert (stored.best_form, stored.best) == (form, size)


def test_near_zeros_are_stored_as_zeros() -> None:
    tensor = torch.tensor([[0.0, 1e-5, 0.7, 0.0]])
    assert count(tensor).bytes == stored_bytes((1, 4), 2, 4)
    assert count(tensor, 1e-3).bytes == stored_bytes((1, 4), 1, 4)


def test_module_bytes_hold_every_parameter() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0] = 1e-4
    dense = 4 * (64 * 64 + 64 + 64 + 64)
    bias_and_norm = 4 * (64 + 64) + 2  # the zero biases of the norm: one row that is empty
    assert module_bytes(net) == (dense, 65 + 1 + 4 + bias_and_norm)
    assert module_bytes(net, 1e-3) == (dense, 65 + bias_and_norm)


def test_module_bytes_hold_tied_weights_once() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(50, 30), "head": nn.Linear(30, 50, bias=False)})
    apart = module_bytes(net)
    net["head"].weight = net["embedding"].weight
    assert apart == (2 * 6000, 2 * 6000)
    assert module_bytes(net) == (6000, 6000)


def test_a_module_without_parameters_has_no_bytes() -> None:
    assert module_bytes(nn.ReLU()) == (0, 0)
