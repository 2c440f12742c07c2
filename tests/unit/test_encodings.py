"""The encodings themselves: sizes that are those of the parts, and parts that give the tensor back."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcsr import StoredBytes, count_tensors, stored_bytes
from lightning_gcsr.storage.dtypes import DTYPES, nonzero_entries
from lightning_gcsr.storage.encodings import ENCODINGS


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
def test_stored_bytes_are_those_of_scipy_and_numpy(array: np.ndarray) -> None:
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
    [count] = count_tensors({"w": torch.from_numpy(array)})
    assert count.bytes == expected


@pytest.mark.parametrize(
    ("stored", "encoding", "size"),
    [
        (StoredBytes(dense=3, bitmask=4, rows=5), "dense", 3),
        (StoredBytes(dense=4, bitmask=3, rows=5), "bitmask", 3),
        (StoredBytes(dense=4, bitmask=5, rows=3), "rows", 3),
        (StoredBytes(dense=3, bitmask=3, rows=3), "dense", 3),
        (StoredBytes(dense=4, bitmask=3, rows=3), "bitmask", 3),
    ],
)
def test_best_encoding_is_the_smallest_and_of_equals_the_simplest(
    stored: StoredBytes, encoding: str, size: int
) -> None:
    assert (stored.best_encoding, stored.best) == (encoding, size)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@given(
    name=st.sampled_from(sorted(DTYPES)),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    seed=st.integers(0, 2**32),
    kept=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_every_encoding_has_its_size_and_gives_the_tensor_back(
    name: str, shape: tuple[int, ...], seed: int, kept: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype, entries = DTYPES[name], int(np.prod(shape))
    raw = torch.randint(0, 2 if name == "bool" else 256, (entries, dtype.itemsize), generator=generator)
    raw *= torch.rand(entries, 1, generator=generator) < kept
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape) if entries else torch.empty(shape, dtype=dtype)
    nonzero = nonzero_entries(tensor)
    where = nonzero.view(shape)
    for encoding in ENCODINGS.values():
        parts = encoding.encode(tensor, nonzero)
        types = encoding.part_types(shape, dtype, int(nonzero.sum()))
        assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == types
        assert sum(part.nbytes for part in parts.values()) == encoding.size(shape, int(nonzero.sum()), dtype.itemsize)
        decoded = encoding.decode(shape, dtype, parts)
        assert torch.equal(decoded[where].view(torch.uint8), tensor[where].view(torch.uint8))
        assert not nonzero_entries(decoded).view(shape)[~where].any()
