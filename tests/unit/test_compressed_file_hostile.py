"""Files that are damaged or made to do harm: an error that names the file, and no memory taken for what they claim."""

from __future__ import annotations

import json
import random
import re
import resource
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from lightning_gcsr import load_compressed, save_compressed
from lightning_gcsr.storage.compressed_file import is_compressed

KEY = "lightning_gcsr.compressed"
MUTATIONS = 3000

Records = list[dict[str, Any]]


def state() -> dict[str, Tensor]:
    """Every encoding, a tie, types that are stored as bytes, and tensors of no entry and of one."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(9, 8, generator=generator) * (torch.rand(9, 8, generator=generator) < 0.5)
    few = torch.zeros(10, 40)
    few[2, 3], few[2, 30], few[7, 0] = 1.0, 2.0, 3.0
    return {
        "dense": torch.randn(3, 4, generator=generator),
        "half": half,
        "few": few,
        "tied": few.t(),
        "complex": torch.tensor([1 + 2j, 0j], dtype=torch.complex128),
        "none": torch.empty(0, 3),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_compressed(state(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def no_large_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch make only small tensors: the file is smaller than 10 kB, and so are its tensors."""

    def small(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(size: Any, *args: Any, **kwargs: Any) -> Tensor:
            entries = size if isinstance(size, int) else torch.Size(size).numel()
            assert entries <= 10_000
            return make(size, *args, **kwargs)

        return made

    for name in ("zeros", "empty_strided", "arange"):
        monkeypatch.setattr(torch, name, small(getattr(torch, name)))


def identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name, tensor in left.items()
    )


# --- any damage ----------------------------------------------------------------------------------------------------


def mutated(data: bytes, number: random.Random) -> bytes:
    """The file with a bit flipped, cut off, longer, a stretch overwritten, doubled or lost, or a number changed."""
    at, to = sorted(number.choices(range(len(data)), k=2))
    header = 8 + int.from_bytes(data[:8], "little")
    kind = number.randrange(10)
    if kind <= 2:  # most of the time in the header, where the damage is done
        at = number.randrange(header if kind else len(data))
        return data[:at] + bytes([data[at] ^ 1 << number.randrange(8)]) + data[at + 1 :]
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data + number.randbytes(number.randrange(1, 50))
    if kind == 5:
        return data[:at] + number.randbytes(to - at) + data[to:]
    if kind == 6:
        return data[:at] + data[to:]
    if kind == 7:
        return data[:to] + data[at:]
    if kind == 8:
        return data[:at] + bytes(to - at) + data[to:]
    digits = number.choice(list(re.finditer(rb"\d+", data[8:header])))
    new = number.choice([b"0", b"1", b"-1", b"1e9", b"9" * 18, b"%d" % number.randrange(1 << 64), b"null", b"NaN"])
    content = data[8 : 8 + digits.start()] + new + data[8 + digits.end() : header]
    return len(content).to_bytes(8, "little") + content + data[header:]


@pytest.mark.usefixtures("no_large_memory")
def test_thousands_of_damaged_files_are_errors_or_do_not_matter(path: Path) -> None:
    data, original = path.read_bytes(), load_compressed(path)
    number = random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, number))
        message = ""
        try:
            loaded = load_compressed(path)
        except ValueError as error:
            message = str(error)
            errors += 1
        assert message.startswith(f"{path}: ") if message else identical(loaded, original)
        assert is_compressed(path) in (True, False)
    assert errors > 0.9 * MUTATIONS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.usefixtures("no_large_memory")
def test_every_flipped_bit_of_the_tensors_is_found_with_the_tensor(path: Path) -> None:
    data = path.read_bytes()
    for at in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors: tensor '\w+': its checksum does not fit"):
            load_compressed(path)


@pytest.mark.usefixtures("no_large_memory")
def test_every_cut_is_an_error(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            load_compressed(path)


# --- damage that fits: with checksums as they should be ------------------------------------------------------------


def forge(path: Path, change: Callable[[Records, dict[str, Tensor]], Any]) -> None:
    """Let ``change`` do what it likes to the entries, by name, and to the parts; then make the checksums fit."""
    data = path.read_bytes()
    parts = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    contents = json.loads(header["__metadata__"][KEY])
    for record in contents["tensors"]:  # with the keys that are left out
        form = record.setdefault("form", "dense")
        record.setdefault("dtype", "float32")
        if form != "tied":
            keys = {"dense": ["values"], "bitmask": ["mask", "values"], "rows": ["starts", "columns", "values"]}[form]
            names = {key: record["name"] if form == "dense" else f"{record['name']}::{key}" for key in keys}
            record.setdefault("parts", names)
    contents["version"] = 1  # which leaves nothing out
    changed = change(contents["tensors"], parts)
    for record in contents["tensors"]:
        if isinstance(record, dict) and isinstance(record.get("crc32"), int):
            rest = {key: value for key, value in record.items() if key != "crc32"}
            crc = zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
            if isinstance(record.get("parts"), dict):
                for _, part in sorted(record["parts"].items()):
                    if isinstance(part, str) and part in parts:
                        crc = zlib.crc32(parts[part].reshape(-1).view(torch.uint8).numpy().data, crc)
            record["crc32"] = crc
    text = changed if isinstance(changed, str) else json.dumps(contents)
    path.write_bytes(save(parts, {KEY: text}))


def entry(records: Records, name: str) -> dict[str, Any]:
    return next(record for record in records if record["name"] == name)


def setting(name: str, /, **values: Any) -> Callable[[Records, dict[str, Tensor]], None]:
    """Sets keys of one entry."""
    return lambda records, parts: entry(records, name).update(values)


def without(name: str, key: str) -> Callable[[Records, dict[str, Tensor]], None]:
    """Takes a key out of one entry."""

    def change(records: Records, parts: dict[str, Tensor]) -> None:
        del entry(records, name)[key]

    return change


def part(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Records, dict[str, Tensor]], None]:
    """Changes one part."""
    return lambda records, parts: parts.update({name: value(parts[name])})


def entries_of(tensor: Tensor, *values: int) -> Tensor:
    return torch.tensor(values).to(tensor.dtype)


def with_bits(tensor: Tensor, at: int, bits: int) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = bits
    return tensor


STARTS = [0, 0, 0, 2, 2, 2, 2, 2, 3, 3, 3]
DAMAGED = "its metadata are damaged: "
FORGERIES: dict[str, tuple[Callable[[Records, dict[str, Tensor]], Any], str]] = {
    # the shape
    "huge dense": (
        setting("dense", shape=[2**40]),
        r"tensor 'dense': its values must be F32 of shape \(1099511627776,\)",
    ),
    "huge mask": (setting("half", shape=[2**40]), r"tensor 'half': its mask must be U8 of shape \(137438953472,\)"),
    "many rows": (
        lambda records, parts: [
            records.remove(entry(records, "tied")),
            setting("few", shape=[2**40, 40])(records, parts),
        ],
        r"tensor 'few': its starts must be U8 of shape \(1099511627777,\)",
    ),
    "many columns": (setting("few", shape=[10, 2**40]), r"tensor '(few|tied)': .*"),
    "more than there is": (setting("few", shape=[2**62, 2**62]), "tensor 'few': its shape is not one that a tensor"),
    "more than there is, of nothing": (setting("none", shape=[2**62, 2**62, 0]), "tensor 'none': its shape is not one"),
    "negative": (setting("dense", shape=[-3, -4]), "tensor 'dense': its shape is not one"),
    "no list": (setting("dense", shape="34"), "tensor 'dense': its shape is not one"),
    "fractions": (setting("dense", shape=[3.0, 4.0]), "tensor 'dense': its shape is not one"),
    "booleans": (setting("dense", shape=[True, True]), "tensor 'dense': its shape is not one"),
    "NaN": (setting("dense", shape=[float("nan")]), "tensor 'dense': its shape is not one"),
    "missing shape": (without("dense", "shape"), "tensor 'dense': its shape is not one"),
    "other shape": (setting("dense", shape=[4, 3]), r"tensor 'dense': its values must be F32 of shape \(4, 3\)"),
    # the type
    "other type": (
        setting("dense", dtype="int32"),
        r"tensor 'dense': its values must be I32 of shape \(3, 4\), but are",
    ),
    "wider type": (
        setting("complex", dtype="complex64"),
        r"tensor 'complex': its values must be U8 of shape \(\d, 8\)",
    ),
    "no type": (setting("dense", dtype="float31"), "tensor 'dense': its type 'float31' is not known"),
    "a type that is none": (setting("dense", dtype=[]), r"tensor 'dense': its type \[\] is not known"),
    "index type": (part("few::columns", lambda t: t.to(torch.int64)), r"tensor 'few': its columns must be U8 of shape"),
    "values of no dimension": (part("half::values", lambda t: t[0]), "tensor 'half': its "),
    # the encoding
    "encoding": (setting("dense", form="zip"), "tensor 'dense': its encoding 'zip' is not known"),
    "an encoding that is none": (setting("dense", form={}), "tensor 'dense': its encoding {} is not known"),
    "parts of another encoding": (
        setting("dense", form="bitmask"),
        "tensor 'dense': its parts are not those of the encoding",
    ),
    "no parts": (setting("dense", parts=[]), "tensor 'dense': its parts are not given by name"),
    "a part that is none": (setting("dense", parts={"values": 3}), "tensor 'dense': its parts are not given by name"),
    "missing parts": (without("dense", "parts"), f"tensor 'dense': {DAMAGED}they must be"),
    "more than parts": (setting("dense", more=1), f"tensor 'dense': {DAMAGED}they must be"),
    "an unknown part": (setting("dense", parts={"values": "nowhere"}), "it holds 'dense', which belongs to no tensor"),
    "another's part": (setting("dense", parts={"values": "steps"}), "tensor 'steps': it has a part that belongs to"),
    "one part twice": (
        setting("half", parts={"mask": "half::mask", "values": "half::mask"}),
        "tensor 'half': it has a part that belongs to another one",
    ),
    # the mask
    "bits beyond": (
        lambda records, parts: [setting("half", shape=[71])(records, parts), parts["half::mask"][8].fill_(255)],
        "tensor 'half': its mask has bits set beyond its last entry",
    ),
    "more bits": (part("half::mask", lambda t: t | 255), r"tensor 'half': 72 bits of its mask are set, but it has"),
    "fewer bits": (part("half::mask", lambda t: t * 0), r"tensor 'half': 0 bits of its mask are set, but it has"),
    "short mask": (part("half::mask", lambda t: t[1:]), r"tensor 'half': its mask must be U8 of shape \(9,\)"),
    # the rows
    "column outside": (part("few::columns", lambda t: entries_of(t, 3, 40, 0)), "tensor 'few': it has a column index"),
    "columns not increasing": (
        part("few::columns", lambda t: entries_of(t, 30, 3, 0)),
        "tensor 'few': the column indices within a row",
    ),
    "column twice": (
        part("few::columns", lambda t: entries_of(t, 3, 3, 0)),
        "tensor 'few': the column indices within a row",
    ),
    "starts not at 0": (part("few::starts", lambda t: with_bits(t, 0, 1)), "tensor 'few': the starts of its rows"),
    "starts beyond": (part("few::starts", lambda t: with_bits(t, 10, 200)), "tensor 'few': the starts of its rows"),
    "starts that fall": (part("few::starts", lambda t: with_bits(t, 4, 1)), "tensor 'few': the starts of its rows"),
    "short starts": (part("few::starts", lambda t: t[1:]), r"tensor 'few': its starts must be U8 of shape \(11,\)"),
    # ties
    "tied to nothing": (setting("tied", to="nowhere"), "tensor 'tied': it is tied to 'nowhere', which is not a tensor"),
    "tied to itself": (setting("tied", to="tied"), "tensor 'tied': it is tied to 'tied', which is not a tensor before"),
    "tied to a later one": (setting("tied", to="steps"), "tensor 'tied': it is tied to 'steps', which is not a tensor"),
    "tied to no name": (setting("tied", to=7), "tensor 'tied': it is tied to nothing"),
    "tied to a tied one": (
        lambda records, parts: records.append(entry(records, "tied") | {"name": "chain", "to": "tied"}),
        "tensor 'chain': it is tied to 'tied', which is not a tensor before it that is stored itself",
    ),
    "tied to more": (setting("tied", shape=[40, 11]), "tensor 'tied': it is tied to 'few', whose type or number"),
    "tied to less": (
        setting("tied", shape=[40, 11], strides=[11, 1]),
        "tensor 'tied': it is tied to 'few', whose type",
    ),
    "tied to another type": (setting("tied", dtype="int32"), "tensor 'tied': it is tied to 'few', whose type"),
    "strides outside": (setting("tied", strides=[1, 41]), "tensor 'tied': its strides leave entries out"),
    "strides of 0": (setting("tied", strides=[0, 0]), "tensor 'tied': its strides leave entries out"),
    "strides too many": (setting("tied", strides=[1, 40, 1]), "tensor 'tied': its strides leave entries out"),
    "no strides": (setting("tied", strides=None), "tensor 'tied': its strides leave entries out"),
    "strides of the first": (setting("few", strides=[40, 2]), "tensor 'few': its strides leave entries out"),
    # the list
    "twice": (lambda records, parts: records.append(entry(records, "tied")), "tensor 'tied': it is there twice"),
    "no entry": (lambda records, parts: records.append(3), f"{DAMAGED}their tensor 7 has no name"),
    "no name": (without("dense", "name"), f"{DAMAGED}their tensor 0 has no name"),
    "a name that is none": (setting("dense", name=["dense"]), f"{DAMAGED}their tensor 0 has no name"),
    "left out": (lambda records, parts: records.pop(0), "it holds 'dense', which belongs to no tensor"),
    "no checksum": (setting("dense", crc32="0"), f"tensor 'dense': {DAMAGED}they must be"),
    "no JSON": (lambda records, parts: "{", f"{DAMAGED}Expecting"),
    "nested": (lambda records, parts: "[" * 100_000, f"{DAMAGED}maximum recursion depth"),
    "a long number": (lambda records, parts: "1" * 100_000, f"{DAMAGED}"),
    "no object": (lambda records, parts: "[]", f"{DAMAGED}they have no version"),
    "no list of tensors": (lambda records, parts: '{"version": 1, "tensors": {}}', f"{DAMAGED}they have no list"),
    "a later version": (
        lambda records, parts: '{"version": 3, "tensors": []}',
        "its format has version 3, and this version of",
    ),
    "a version that is none": (
        lambda records, parts: '{"version": true, "tensors": []}',
        f"{DAMAGED}they have no version",
    ),
}


@pytest.mark.usefixtures("no_large_memory")
@pytest.mark.parametrize(("change", "message"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_file_is_an_error_that_says_why(
    path: Path, change: Callable[[Records, dict[str, Tensor]], Any], message: str
) -> None:
    forge(path, change)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + message):
        load_compressed(path)


def test_a_file_that_is_put_together_again_is_the_same(path: Path) -> None:
    """That forging alone does no damage; without this the tests above would prove nothing."""
    original = load_compressed(path)
    forge(path, lambda records, parts: None)
    assert identical(load_compressed(path), original)


def test_explicit_zeros_are_values_as_any_other(path: Path) -> None:
    forge(path, part("few::values", lambda t: t * 0))
    assert not load_compressed(path)["few"].any()


# --- memory --------------------------------------------------------------------------------------------------------


def bomb(path: Path, columns: int) -> None:
    """A file of some hundred bytes, right in itself, that says it is a row of so many zeros."""
    save_compressed({"zeros": torch.zeros(1, 1 << 20)}, path)
    forge(path, setting("zeros", shape=[1, columns]))
    forge_type = {"columns": torch.uint64 if columns > 1 << 32 else torch.uint32}
    forge(path, lambda records, parts: parts.update({"zeros::columns": torch.empty(0, dtype=forge_type["columns"])}))


@pytest.mark.usefixtures("no_large_memory")
@pytest.mark.parametrize("columns", [1 << 29, 1 << 40, 1 << 58])
def test_a_small_file_does_not_become_large_memory(path: Path, columns: int) -> None:
    bomb(path, columns)
    assert path.stat().st_size < 1000
    message = f"its tensors take {4 * columns:,} bytes, more than the 1,073,741,824 allowed"
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_compressed(path)


@pytest.mark.usefixtures("no_large_memory")
def test_many_tensors_are_counted_together(tmp_path: Path) -> None:
    save_compressed({str(i): torch.zeros(1, 2000) for i in range(4)}, tmp_path / "many")
    assert load_compressed(tmp_path / "many", max_bytes=32_000)
    with pytest.raises(ValueError, match="its tensors take 32,000 bytes, more than the 31,999 allowed"):
        load_compressed(tmp_path / "many", max_bytes=31_999)


def test_zeros_may_grow_as_far_as_they_are_allowed_to(path: Path) -> None:
    bomb(path, 1 << 22)
    assert load_compressed(path)["zeros"].shape == (1, 1 << 22)


@pytest.mark.parametrize(("value", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_bad_limit_is_an_error(path: Path, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="`max_bytes` must be an integer"):
        load_compressed(path, max_bytes=value)


# --- other files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello", bytes(8), b"\xff" * 64, b"PK\x03\x04" * 20, bytes(100_000)])
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "other").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'other'}: ")):
        load_compressed(tmp_path / "other")


def test_a_plain_safetensors_file_is_sent_to_its_reader(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain: this is a plain safetensors file, .* safetensors\.torch\.load_file"):
        load_compressed(tmp_path / "plain")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "pickle")
    with pytest.raises(
        ValueError, match=r"pickle: this is a file of torch\.save, .* torch\.load\(path, weights_only=True"
    ):
        load_compressed(tmp_path / "pickle")


def test_a_missing_file_and_a_folder_are_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        load_compressed(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        load_compressed(tmp_path)
