"""Compressed files: every value comes back, in the bytes that were promised."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_gcsr import count_tensors, load_compressed, module_bytes, save_compressed, stored_bytes
from lightning_gcsr.storage.compressed_file import is_compressed
from lightning_gcsr.storage.dtypes import DTYPES

from .test_compressed_file_hostile import identical, state

# torch says of its own type complex32 that it is experimental, whenever a tensor of it is made.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def bits(tensor: Tensor) -> list[int]:
    """The bytes of the entries, in row-major order, with 0.0 in place of −0.0."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    if not tensor.numel():
        return []
    if tensor.is_complex() or (tensor.is_floating_point() and "fnuz" not in str(tensor.dtype)):  # no −0.0 there
        size = tensor.element_size() // (2 if tensor.is_complex() else 1)
        words = tensor.reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
        words[words << 1 == 0] = 0
        return words.tolist()
    return tensor.reshape(-1).view(torch.uint8).tolist()


def assert_same(loaded: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    assert sorted(loaded) == sorted(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].device.type == "cpu"
        assert bits(loaded[name]) == bits(tensor), name


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lightning_gcsr.compressed"])


def through(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What comes back."""
    save_compressed(tensors, path)
    loaded = load_compressed(path)
    assert_same(loaded, tensors)
    assert list(loaded) == (list(tensors) if "tensors" in metadata(path) else sorted(tensors))
    return loaded


def encodings(path: Path) -> dict[str, str]:
    """The encoding of each tensor, as the file says."""
    contents = metadata(path)
    if "tensors" not in contents:
        return dict.fromkeys(load_file(path), "dense")
    return {entry["name"]: entry.get("form", "dense") for entry in contents["tensors"]}


def header_bytes(path: Path) -> int:
    """All but the tensors: the length, then as many bytes."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def of_bytes(raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of these bytes, whatever they mean."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return raw.to(torch.uint8).contiguous().reshape(*shape, dtype.itemsize).view(dtype).squeeze(-1)


# --- generated tensors ---------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any type, of any bits, more or less of them zero, in any memory layout."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape), dtype.itemsize), generator=generator)
    kept = torch.rand(math.prod(shape), 1, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    tensor = of_bytes(raw * kept, dtype, shape)
    layout = draw(st.sampled_from(["contiguous", "reversed", "sliced", "expanded"]))
    if layout == "reversed":
        return tensor.permute(tuple(range(tensor.dim() - 1, -1, -1)))
    if layout == "sliced" and tensor.dim():
        return tensor[::2]
    if layout == "expanded":
        return tensor.expand(2, *tensor.shape)
    return tensor


@given(state=st.dictionaries(st.text(max_size=8), tensors(), max_size=5))
def test_any_state_dict_comes_back(tmp_path: Path, state: dict[str, Tensor]) -> None:
    loaded = through(tmp_path / "generated.safetensors", state)
    assert all(tensor.is_contiguous() for tensor in loaded.values())


@given(
    array=hnp.arrays(
        "float32",
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
        elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, -0.0, math.nan, math.inf, -math.inf, 2**-149]),
        fill=st.just(0.0),
    )
)
def test_bytes_are_those_of_the_smallest_encoding(tmp_path: Path, array: np.ndarray) -> None:
    tensor = torch.from_numpy(array)
    path = tmp_path / "one.safetensors"
    save_compressed({"w": tensor}, path)
    stored = stored_bytes(array.shape, int((array != 0).sum()), 4)
    save_file({"w": tensor}, tmp_path / "plain.safetensors")
    plain = (tmp_path / "plain.safetensors").stat().st_size
    if "tensors" in metadata(path):
        assert path.stat().st_size - header_bytes(path) == stored.best
        assert encodings(path) == {"w": stored.best_encoding}
    assert path.stat().st_size <= plain + 100  # the metadata
    assert path.stat().st_size <= header_bytes(tmp_path / "plain.safetensors") + stored.best + 400


BASE = torch.arange(24.0).reshape(2, 3, 4)


@given(
    views=st.lists(st.sampled_from([BASE, BASE.permute(2, 0, 1), BASE.view(6, 4).t(), BASE.view(-1), BASE[:, None]]))
)
@pytest.mark.parametrize("zero", [False, True])
def test_tied_tensors_are_tied_again_and_stored_once(tmp_path: Path, views: list[Tensor], zero: bool) -> None:
    memory = torch.zeros(24) if zero else torch.arange(24.0)
    state = {str(i): memory.as_strided(view.shape, view.stride()) for i, view in enumerate(views)}
    loaded = through(tmp_path / "tied.safetensors", state)
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == min(1, len(views))
    assert [form == "tied" for form in encodings(tmp_path / "tied.safetensors").values()] == [
        i > 0 for i in range(len(views))
    ]
    for name, tensor in loaded.items():
        tensor.copy_(torch.rand(tensor.shape))
        changed = memory.clone().as_strided(state[name].shape, state[name].stride()).copy_(tensor)
        whole = changed.as_strided((24,), (1,))
        for other, original in state.items():
            assert torch.equal(loaded[other], whole.as_strided(original.shape, original.stride()))


# --- tensors by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_every_type_in_every_form(tmp_path: Path, name: str, share: float) -> None:
    dtype = DTYPES[name]
    raw = torch.randint(1, 2 if dtype == torch.bool else 256, (40 * 50, dtype.itemsize)) * (torch.rand(2000, 1) < share)
    through(tmp_path / "typed.safetensors", {"w": of_bytes(raw, dtype, (40, 50))})
    form = encodings(tmp_path / "typed.safetensors")["w"]
    assert form == {0.0: "rows", 1.0: "dense"}.get(share, form)


def test_payloads_of_nan_come_back_and_negative_zeros_as_zeros(tmp_path: Path) -> None:
    tensor = torch.ones(100) * (torch.arange(100) % 2)
    tensor[4], tensor[50] = -0.0, math.inf
    tensor.view(torch.int32)[8] = 0x7FC0_1234
    tensor = tensor.repeat(10)
    loaded = through(tmp_path / "special.safetensors", {"w": tensor})["w"]
    assert encodings(tmp_path / "special.safetensors") == {"w": "bitmask"}
    assert not loaded[4].signbit()
    assert loaded.view(torch.int32)[8] == 0x7FC0_1234


def test_weights_that_a_mask_was_multiplied_into_are_small(tmp_path: Path) -> None:
    weight = torch.randn(200, 300)
    weight *= torch.rand(200, 300) > 0.9  # half of the zeros are −0.0 now
    loaded = through(tmp_path / "masked.safetensors", {"w": weight})["w"]
    assert torch.equal(loaded, weight)
    assert (tmp_path / "masked.safetensors").stat().st_size < 0.15 * weight.nbytes


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (2**40, 0)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_tensors_of_no_or_one_entry(tmp_path: Path, shape: tuple[int, ...], value: float) -> None:
    through(tmp_path / "tiny.safetensors", {"w": torch.full(shape, value)})


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_strides_that_do_not_matter_do_no_harm(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    odd = torch.ones(8, dtype=dtype).as_strided(shape, [0] * len(shape))
    through(tmp_path / "odd.safetensors", {"a": odd, "b": odd, "c": odd.zero_().clone()})


def test_an_empty_state_dict_is_a_file(tmp_path: Path) -> None:
    assert through(tmp_path / "empty.safetensors", {}) == {}


def test_parameters_conjugates_and_tagged_tensors_are_saved_as_plain_ones(tmp_path: Path) -> None:
    class Tagged(Tensor):
        pass

    number = torch.tensor([1 + 2j, 0j, 3 - 1j])
    state = {"p": nn.Parameter(torch.ones(2)), "c": number.conj(), "n": number.conj().imag, "b": number}
    state["tagged"] = torch.ones(3).as_subclass(Tagged)
    loaded = through(tmp_path / "plain.safetensors", state)
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in loaded.values())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (BASE[:1], BASE),
        (BASE[0, :2], BASE[0, 1:]),
        (BASE, BASE.view(torch.int32)),
        (BASE[:1].expand(2, 3, 4), BASE[:1]),
    ],
    ids=["part", "overlap", "type", "expanded"],
)
def test_tensors_that_share_less_are_stored_each(tmp_path: Path, left: Tensor, right: Tensor) -> None:
    loaded = through(tmp_path / "apart.safetensors", {"left": left, "right": right})
    assert loaded["left"].untyped_storage().data_ptr() != loaded["right"].untyped_storage().data_ptr()


def test_the_same_expanded_tensor_is_tied(tmp_path: Path) -> None:
    expanded = torch.arange(3.0).expand(4, 3)
    loaded = through(tmp_path / "expanded.safetensors", {"a": expanded, "b": expanded.detach()})
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_tied_tensors_with_gaps_are_tied(tmp_path: Path) -> None:
    part = BASE[:, :, :2]
    loaded = through(tmp_path / "gaps.safetensors", {"a": part, "b": part.permute(2, 1, 0)})
    loaded["b"][1, 2, 0] = 77.0
    assert loaded["a"][0, 2, 1] == 77.0
    assert loaded["a"].untyped_storage().nbytes() == 12 * 4


def test_no_name_is_in_the_way_of_another(tmp_path: Path) -> None:
    empty = torch.zeros(50, 50)
    names = ["w", "w::starts", "w::starts_", "w::values", "__metadata__", "__metadata__::values", "", "a\0b", "ü", "😀"]
    state = {name: torch.tensor([float(i)]) for i, name in enumerate(names)} | {"w": empty}
    through(tmp_path / "names.safetensors", state)
    through(tmp_path / "names.safetensors", dict(reversed(state.items())))
    through(tmp_path / "names.safetensors", {"__metadata__": empty, "__metadata__::starts": torch.ones(1)})


# --- the file ------------------------------------------------------------------------------------------------------


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    dense, sparse = torch.randn(3, 4), torch.zeros(50, 300)
    sparse[7, 290] = 2.0
    save_compressed({"dense": dense, "sparse": sparse}, tmp_path / "both.safetensors")
    plain = load_file(tmp_path / "both.safetensors")
    assert torch.equal(plain["dense"], dense)
    assert {name: (part.dtype, part.tolist()) for name, part in plain.items() if name != "dense"} == {
        "sparse::starts": (torch.uint8, [0] * 8 + [1] * 43),
        "sparse::columns": (torch.uint16, [290]),
        "sparse::values": (torch.float32, [2.0]),
    }


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9)).state_dict()
    for name in ("a", "b"):
        save_compressed(state, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_changes_nothing_and_loading_gives_memory_of_its_own(tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    loaded = through(tmp_path / "own.safetensors", net.state_dict())
    loaded["weight"].zero_()
    assert_same(net.state_dict(), before)
    assert net.weight.requires_grad
    assert_same(load_compressed(tmp_path / "own.safetensors"), before)


def test_a_small_dense_network_takes_no_more_than_in_a_plain_file(tmp_path: Path) -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)])
    save_compressed(net, tmp_path / "small")
    save_file(net.state_dict(), tmp_path / "plain")
    assert (tmp_path / "small").stat().st_size <= (tmp_path / "plain").stat().st_size + 100
    assert_same(load_compressed(tmp_path / "small"), net.state_dict())
    assert is_compressed(tmp_path / "small")


def test_every_flipped_bit_of_a_dense_file_is_found(tmp_path: Path) -> None:
    save_compressed({"a": torch.randn(9), "b": torch.randn(3)}, tmp_path / "small")
    assert "tensors" not in metadata(tmp_path / "small")
    data = (tmp_path / "small").read_bytes()
    for at in range(header_bytes(tmp_path / "small"), len(data)):
        (tmp_path / "small").write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(ValueError, match="its checksum does not fit; the file is damaged"):
            load_compressed(tmp_path / "small")


def test_a_dense_file_may_be_limited_too(tmp_path: Path) -> None:
    save_compressed({"a": torch.randn(9)}, tmp_path / "small")
    with pytest.raises(ValueError, match="its tensors take 36 bytes, more than the 35 allowed"):
        load_compressed(tmp_path / "small", max_bytes=35)


def test_a_file_of_version_1_is_read() -> None:
    """The file was written by the code of that version; it keeps the sign of zeros."""
    expected = state() | {"signs": torch.tensor([0.0] * 60 + [-0.0, 1.5, -2.0, math.inf])}
    loaded = load_compressed(Path(__file__).parent / "files" / "compressed_version_1.safetensors")
    assert identical(loaded, expected)
    assert loaded["tied"].data_ptr() == loaded["few"].data_ptr()


def test_a_part_of_a_state_dict_is_saved_and_loaded_into_the_whole(tmp_path: Path) -> None:
    net = nn.ModuleDict({"backbone": nn.Linear(50, 50), "adapter": nn.Linear(50, 2)})
    adapters = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("adapter.")}
    save_compressed(adapters, tmp_path / "adapter")
    with torch.no_grad():
        net["adapter"].weight.zero_()
    assert net.load_state_dict(load_compressed(tmp_path / "adapter"), strict=False).unexpected_keys == []
    assert net["adapter"].weight.any()


def test_a_prefix_is_stripped(tmp_path: Path) -> None:
    save_compressed({"module.a": torch.ones(1), "module.b.module.c": torch.ones(1), "d": torch.ones(1)}, tmp_path / "m")
    assert set(load_compressed(tmp_path / "m", strip_prefix="module.")) == {"a", "b.module.c", "d"}
    with pytest.raises(
        ValueError, match=r"`strip_prefix` must be the beginning of a name in the file, got .*'module\.a'"
    ):
        load_compressed(tmp_path / "m", strip_prefix="model.")
    save_compressed({"module.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"`strip_prefix` must leave the names different, .*'module\.a' and 'a'"):
        load_compressed(tmp_path / "m", strip_prefix="module.")


def test_only_our_files_are_ours(tmp_path: Path) -> None:
    save_compressed({}, tmp_path / "ours")
    (tmp_path / "text").write_text("hello")
    assert is_compressed(tmp_path / "ours")
    assert not is_compressed(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        is_compressed(tmp_path / "none")


# --- what cannot be saved ------------------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    """A module whose state dict is not tensors alone."""

    def get_extra_state(self) -> Any:
        return {"version": 1}


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("text", "weights.pt", TypeError, "`module_or_state_dict` must be a module or a mapping of tensors, got"),
    ("name", {3: BASE}, TypeError, "must have strings as names, got the name 3"),
    ("unicode", {"\ud800": BASE}, ValueError, "must have names in proper Unicode, got"),
    ("value", {"a": BASE, "epoch": 3}, TypeError, "must hold nothing but tensors, got 'epoch'=3"),
    ("extra state", WithExtraState(2, 2), TypeError, "must hold nothing but tensors, got '_extra_state'="),
    ("meta", {"w": torch.empty(2, device="meta")}, ValueError, "got 'w', which is on the meta device"),
    ("lazy", nn.LazyLinear(2), ValueError, "got 'weight', which is not initialized yet"),
    ("sparse", {"w": torch.ones(2, 2).to_sparse()}, ValueError, "got 'w', which is quantized, sparse or nested"),
]


@pytest.mark.parametrize(
    ("state", "kind", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_not_a_plain_tensor_is_refused_before_anything_is_written(
    tmp_path: Path, state: Any, kind: type[Exception], message: str
) -> None:
    (tmp_path / "model").write_bytes(b"old")
    with pytest.raises(kind, match=message):
        save_compressed(state, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == b"old"


def test_a_type_that_torch_cannot_handle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'w', which is of torch\.bits8\. The types that can be stored are"):
        save_compressed({"w": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)}, tmp_path / "model")


def test_a_tensor_that_only_looks_like_one_is_refused(tmp_path: Path) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(ValueError, match="got 'w', which is of the type FakeTensor"):
        save_compressed({"w": fake}, tmp_path / "model")


def test_a_missing_folder_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`path` must lie in a folder that exists"):
        save_compressed({}, tmp_path / "none" / "model")


# --- models --------------------------------------------------------------------------------------------------------


def test_resnet18_with_nine_zeros_in_ten_takes_less_than_a_sixth(tmp_path: Path) -> None:
    net = torchvision.models.resnet18().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape) < 0.9] = 0.0
    path = tmp_path / "resnet18.safetensors"
    save_compressed(net, path)
    size = path.stat().st_size
    dense = sum(tensor.nbytes for tensor in net.state_dict().values())
    assert size < 0.16 * dense
    buffers = sum(count.bytes.best for count in count_tensors(dict(net.named_buffers())))
    assert size - header_bytes(path) == module_bytes(net)[1] + buffers
    other = torchvision.models.resnet18().eval()
    other.load_state_dict(load_compressed(path))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(images), net(images))


def test_a_module_with_tied_weights(tmp_path: Path) -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(50, 30), "head": nn.Linear(30, 50, bias=False)})
    net["head"].weight = net["embedding"].weight
    save_compressed(net, tmp_path / "tied.safetensors")
    loaded = load_compressed(tmp_path / "tied.safetensors")
    assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()
    assert (tmp_path / "tied.safetensors").stat().st_size - header_bytes(tmp_path / "tied.safetensors") == 6000
    net.load_state_dict(loaded, assign=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_the_gpu_come_back_on_the_cpu(tmp_path: Path) -> None:
    weight = torch.randn(30, 40, device="cuda") * (torch.rand(30, 40, device="cuda") < 0.1)
    loaded = through(tmp_path / "gpu.safetensors", {"a": weight, "b": weight.t()})
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
