"""Counts of zeros, and the bytes of modules."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from lightning_gcsr import TensorCount, count_tensors, module_bytes, stored_bytes
from lightning_gcsr.sparsity.counting import near_and_exact_zeros
from lightning_gcsr.storage.dtypes import DTYPES

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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_any_dtype_is_counted(dtype: torch.dtype, threshold: float) -> None:
    result = count(torch.tensor([[0, 1, 1], [0, 0, 1]]).to(dtype), threshold)
    assert (result.zeros, result.near_zeros, result.value_bytes) == (3, 3, dtype.itemsize)


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


def test_masks_of_pruning_are_applied_to_a_state_dict_and_to_a_module() -> None:
    layer = prune.random_unstructured(nn.Linear(8, 16, bias=False), "weight", 0.75)
    assert [(c.name, c.zeros) for c in count_tensors(layer.state_dict())] == [("weight", 96)]
    assert module_bytes(layer) == (512, 16 + 4 * 32)


def test_a_module_in_place_of_tensors_is_an_error_that_says_what_to_use() -> None:
    with pytest.raises(TypeError, match=r"`tensors` must be .*, got a module, Linear\. Pass its state_dict\(\)"):
        count_tensors(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`tensors` must be a mapping of names to tensors, got tensors="):
        count_tensors([torch.zeros(2)])


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


# --- bytes ---------------------------------------------------------------------------------------------------------


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
