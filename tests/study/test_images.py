"""Image sets: splits that never move, batches, augmentation, and what is said of a set that is not there."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import images
import numpy as np
import pytest
import torch
from batches import Batches, Dataset
from images import MissingDataError, load_images
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

NOWHERE = Path("nowhere")


def numbers(root: Path) -> tuple[images.Arrays, images.Arrays]:
    """A thousand images that differ, each of its number alone, and ten to test on."""
    values = np.broadcast_to(np.arange(1_010.0)[:, None, None], (1_010, 2, 2)).copy()
    labels = np.arange(1_010) % 7
    return (values[:1_000], labels[:1_000]), (values[1_000:], labels[1_000:])


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the image set whose images can be told from each other."""
    monkeypatch.setitem(images.IMAGE_SETS, "numbers", numbers)
    return "numbers"


def numbers_of(found: Dataset) -> list[list[int]]:
    """Which images are in the three parts: the ten of the test, 1,000 to 1,009, undo the standardization."""
    first, last = found.test[0][0, 0, 0, 0], found.test[0][-1, 0, 0, 0]
    slope = 9 / (last - first)
    parts = (found.train, found.validation, found.test)
    return [((part[0][:, 0, 0, 0] - first) * slope + 1_000).round().long().tolist() for part in parts]


# -- splits ----------------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_complete(numbered: str) -> None:
    train, validation, test = numbers_of(load_images(numbered, NOWHERE, NOWHERE))
    assert sorted(train + validation) == list(range(1_000))
    assert test == list(range(1_000, 1_010))
    assert 100 <= len(validation) <= 300


def test_split_is_fixed_whatever_the_seed(numbered: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = load_images(numbered, NOWHERE, NOWHERE)
    torch.manual_seed(2)
    np.random.seed(2)
    second = load_images(numbered, NOWHERE, NOWHERE)
    for one, other in zip(
        (first.train, first.validation, first.test), (second.train, second.validation, second.test), strict=True
    ):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_labels_stay_with_their_images(numbered: str) -> None:
    found = load_images(numbered, NOWHERE, NOWHERE)
    labels = [part[1].tolist() for part in (found.train, found.validation, found.test)]
    assert labels == [[number % 7 for number in part] for part in numbers_of(found)]


def test_fewer_training_images_leave_validation_and_test_alone(numbered: str) -> None:
    train, validation, test = numbers_of(load_images(numbered, NOWHERE, NOWHERE))
    few = numbers_of(load_images(numbered, NOWHERE, NOWHERE, train_images=50))
    assert few == [train[:50], validation, test]


def test_inputs_are_standardized_by_the_training_images(digits: Dataset) -> None:
    assert digits.train[0].mean().abs() < 1e-5
    assert (digits.train[0].std() - 1).abs() < 1e-5
    assert digits.validation[0].mean() != 0
    assert digits.test[0].std() != 1
    raw = torch.from_numpy(load_digits().images).float()
    # Every standardized image is one of the raw ones under one and the same line.
    blank = digits.train[0].min()
    scale = (digits.train[0].max() - blank) / 16
    for part in (digits.train[0], digits.validation[0], digits.test[0]):
        back = ((part[:20, 0] - blank) / scale)[:, None]
        assert ((back - raw).abs().amax((2, 3)).amin(1) < 1e-3).all()


def test_each_channel_is_standardized_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.random.RandomState(0).rand(60, 4, 4, 3) * [1, 10, 100] + [0, 5, -50]
    arrays = colours, np.arange(60) % 2
    monkeypatch.setitem(images.IMAGE_SETS, "colours", lambda root: (arrays, arrays))
    found = load_images("colours", NOWHERE, NOWHERE)
    assert found.shape == (3, 4, 4)
    torch.testing.assert_close(found.train[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.train[0].std((0, 2, 3)), torch.ones(3))


def test_digits_are_what_the_network_is_told(digits: Dataset) -> None:
    assert digits.shape == (1, 8, 8)
    assert digits.classes == 10
    assert sum(len(part[1]) for part in (digits.train, digits.validation, digits.test)) == 1_797
    assert all(part[0].dtype == torch.float32 for part in (digits.train, digits.validation, digits.test))


def test_too_many_training_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`train_images` must be at most 1,118 .* got train_images=1119") as error:
        load_images("digits", NOWHERE, NOWHERE, train_images=1_119)
    assert "'digits'" in str(error.value)
    assert len(load_images("digits", NOWHERE, NOWHERE, train_images=1_118).train[1]) == 1_118


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"`data` must be one of .* got data='digit'\. Did you mean 'digits'\?"
    ) as error:
        load_images("digit", NOWHERE, NOWHERE)
    for name in (*images.IMAGE_SETS, "folder:NAME"):
        assert repr(name) in str(error.value)


# -- batches ---------------------------------------------------------------------------------------------------------


def labelled(count: int, height: int = 6, width: int = 5) -> tuple[Tensor, Tensor]:
    """Images without a zero, and each one's number as its label."""
    return torch.rand(count, 2, height, width) + 1, torch.arange(count)


def test_batches_cover_each_image_once() -> None:
    data = labelled(23)
    for seed in (None, 5):
        batches = Batches(data, 5, seed)
        found = list(batches)
        assert len(found) == len(batches) == 5
        assert [len(rows) for _, rows in found] == [5, 5, 5, 5, 3]
        assert sorted(torch.cat([rows for _, rows in found]).tolist()) == list(range(23))
        for pixels, rows in found:
            assert torch.equal(pixels, data[0][rows])


def order(batches: Batches) -> list[int]:
    """The images of one epoch."""
    return torch.cat([rows for _, rows in batches]).tolist()


def test_order_is_kept_without_a_seed_and_shuffled_by_it() -> None:
    data = labelled(40)
    assert order(Batches(data, 7)) == list(range(40))
    first, second = Batches(data, 7, 3), Batches(data, 7, 3)
    epochs = [order(first) for _ in range(3)]
    torch.manual_seed(99)
    assert [order(second) for _ in range(3)] == epochs
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order(Batches(data, 7, 4)) != epochs[0]


def shifted(image: Tensor, mirrored: bool) -> list[Tensor]:
    """The slow way: every version of an image, moved by up to four pixels, zeros behind it."""
    _, height, width = image.shape
    versions = []
    for down, right in itertools.product(range(-4, 5), repeat=2):
        moved = torch.zeros_like(image)
        for row, column in itertools.product(range(height), range(width)):
            if 0 <= row + down < height and 0 <= column + right < width:
                moved[:, row, column] = image[:, row + down, column + right]
        versions += [moved, moved.flip(2)] if mirrored else [moved]
    return versions


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmented_images_are_moved_versions_of_their_own(augment: str) -> None:
    data = labelled(6)
    before = data[0].clone()
    versions = [torch.stack(shifted(image, mirrored=augment == "crop_flip")) for image in data[0]]
    assert len(versions[0]) == (81 if augment == "crop" else 162)
    batches = Batches(data, 4, 0, augment)
    used = set()
    for _ in range(60):
        for pixels, rows in batches:
            assert pixels.shape[1:] == data[0].shape[1:]
            for image, source in zip(pixels, rows.tolist(), strict=True):
                [*which] = (versions[source] == image).flatten(1).all(1).nonzero().flatten().tolist()
                assert which
                used |= {which[0]}
    assert torch.equal(data[0], before)
    # Of 360 draws: most versions come up, and so do both ends of each axis.
    assert len(used) > (0.9 * 81 if augment == "crop" else 0.75 * 162)


def test_half_of_the_images_are_mirrored() -> None:
    picture = torch.zeros(1, 1, 24, 24)
    picture[..., 8:12, 8:16] = torch.arange(1.0, 9)  # wherever it is moved to, it rises or falls
    batches = Batches((picture.expand(400, 1, 24, 24), torch.zeros(400)), 400, 0, "crop_flip")
    [(found, _)] = list(batches)
    row = found.amax((1, 2))
    rising = (row.argmax(1) > (row == 1).float().argmax(1)).float().mean()
    assert 0.4 < rising < 0.6


def test_augmentation_follows_the_seed() -> None:
    data = labelled(30)
    one, same, other = (torch.cat([pixels for pixels, _ in Batches(data, 8, seed, "crop_flip")]) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# -- torchvision's sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "title", "dataset"),
    [
        ("fashion_mnist", "FashionMNIST", datasets.FashionMNIST),
        ("cifar10", "CIFAR-10", datasets.CIFAR10),
        ("cifar100", "CIFAR-100", datasets.CIFAR100),
        ("svhn", "SVHN", datasets.SVHN),
    ],
)
def test_missing_set_names_the_folder_and_the_way_out(
    name: str, title: str, dataset: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def download(self: Any) -> None:
        tried.append(type(self))
        raise OSError("no network")

    monkeypatch.setattr(dataset, "download", download)
    monkeypatch.setattr(images, "DEBIAN_FASHION_MNIST", tmp_path / "no-such-package")
    with pytest.raises(MissingDataError) as error:
        load_images(name, tmp_path / "data", tmp_path)
    assert tried == [dataset]
    message = str(error.value)
    assert message.startswith(
        f"{title} is not in {(tmp_path / 'data').resolve()} and could not be downloaded (no network)"
    )
    assert "--data_root" in message
    assert ("apt install dataset-fashion-mnist" in message) is (name == "fashion_mnist")


def test_set_is_downloaded_where_it_is_not_there(tmp_path: Path) -> None:
    calls = []

    def make(root: Path, train: bool, download: bool = False) -> SimpleNamespace:
        calls.append((train, download))
        if not download and calls.count((train, True)) == 0:
            raise RuntimeError("Dataset not found")
        return SimpleNamespace(data=np.zeros((3, 2, 2), np.uint8), targets=[0, 1, 0])

    load = images._torchvision("Fake", make, {"train": True}, {"train": False})
    (pixels, labels), _ = load(tmp_path)
    assert calls == [(True, False), (True, True), (False, False), (False, True)]
    assert pixels.shape == (3, 2, 2)
    assert labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("channels", ["first", "last"])
def test_channels_come_out_where_torch_wants_them(
    channels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CIFAR has them last, and targets; SVHN has them first, and labels."""
    picture = np.random.RandomState(0).randint(0, 256, (20, 4, 5, 3)).astype(np.uint8)
    targets = np.arange(20) % 4

    def make(**arguments: Any) -> SimpleNamespace:
        if channels == "first":
            return SimpleNamespace(data=picture.transpose(0, 3, 1, 2), labels=targets)
        return SimpleNamespace(data=picture, targets=targets.tolist())

    monkeypatch.setitem(images.IMAGE_SETS, "fake", images._torchvision("Fake", make, {}, {}))
    found = load_images("fake", tmp_path, tmp_path)
    assert found.shape == (3, 4, 5)
    assert found.classes == 4
    assert same_up_to_lines(found.test[0], picture)
    assert found.test[1].tolist() == targets.tolist()


def same_up_to_lines(found: Tensor, pixels: np.ndarray[Any, Any]) -> bool:
    """Whether these are the images with each channel standardized."""
    pairs = zip(found.numpy().transpose(1, 0, 2, 3), pixels.transpose(3, 0, 1, 2), strict=True)
    return all(np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.999999 for one, other in pairs)


@pytest.mark.skipif(
    not images.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian_is_laid_out_for_torchvision(tmp_path: Path) -> None:
    found = load_images("fashion_mnist", tmp_path, tmp_path, train_images=500)
    assert [len(part[1]) for part in (found.train, found.validation, found.test)] == [500, 5_000, 10_000]
    assert found.shape == (1, 28, 28)
    assert found.classes == 10
    folder = tmp_path / "FashionMNIST" / "raw"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes == {
        "train-images-idx3-ubyte": 16 + 60_000 * 784,
        "train-labels-idx1-ubyte": 8 + 60_000,
        "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
        "t10k-labels-idx1-ubyte": 8 + 10_000,
    }
    assert len(datasets.FashionMNIST(tmp_path, train=False)) == 10_000
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    images._unpack_debian_fashion_mnist(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# -- image folders ---------------------------------------------------------------------------------------------------


def add_image(folder: Path, split: str, label: str, number: int, size: tuple[int, int] = (6, 5)) -> None:
    """Write an image (width, height) of noise that only these arguments decide."""
    path = folder / split / label / f"{number:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = [ord(split[1]), ord(label[0]), number]
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder: three classes, ten of each to train on and four to test on."""
    for label, number in itertools.product("abc", range(10)):
        add_image(tmp_path / "photos", "train", label, number)
        if number < 4:
            add_image(tmp_path / "photos", "test", label, number)
    return tmp_path / "photos"


def pixels_of(folder: Path) -> np.ndarray[Any, Any]:
    """All images below, in the order of their paths."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*/*.png"))])


def load_photos(photos: Path) -> Dataset:
    return load_images("folder:photos", photos.parent, photos.parent / "cache")


def test_image_folder_is_decoded(photos: Path) -> None:
    found = load_photos(photos)
    assert found.shape == (3, 5, 6)
    assert found.classes == 3
    assert [len(part[1]) for part in (found.train, found.validation, found.test)] == [24, 6, 12]
    assert same_up_to_lines(found.test[0], pixels_of(photos / "test"))
    assert found.test[1].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise AssertionError(f"{path} is decoded again")

    monkeypatch.setattr(datasets.folder, "pil_loader", refuse)


def test_decoded_images_are_cached(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_photos(photos)
    assert sorted(path.suffix for path in (photos.parent / "cache").iterdir()) == [".npz", ".npz"]
    forbid_decoding(monkeypatch)
    second = load_photos(photos)
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.test[0], second.test[0])
    assert torch.equal(first.test[1], second.test[1])


@pytest.mark.parametrize("change", ["added", "removed", "moved"])
def test_cache_is_renewed_when_the_folder_changes(photos: Path, change: str) -> None:
    load_photos(photos)
    if change == "added":
        add_image(photos, "test", "b", 9)
    elif change == "removed":
        (photos / "test" / "b" / "002.png").unlink()
    else:
        (photos / "test" / "b" / "002.png").rename(photos / "test" / "c" / "002b.png")
    found = load_photos(photos)
    assert same_up_to_lines(found.test[0], pixels_of(photos / "test"))
    assert found.test[1].bincount().tolist() == {"added": [4, 5, 4], "removed": [4, 3, 4], "moved": [4, 3, 5]}[change]


def test_replaced_image_is_decoded_anew(photos: Path) -> None:
    load_photos(photos)
    add_image(photos, "test", "z", 50)
    (photos / "test" / "z" / "050.png").replace(photos / "test" / "b" / "002.png")
    (photos / "test" / "z").rmdir()
    assert same_up_to_lines(load_photos(photos).test[0], pixels_of(photos / "test"))


def test_folders_of_one_name_do_not_share_a_cache(photos: Path) -> None:
    load_photos(photos)
    other = photos.parent / "elsewhere" / "photos"
    for path in photos.glob("*/*/*.png"):
        target = other / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))[::-1]).save(target)
    found = load_images("folder:photos", other.parent, photos.parent / "cache")
    assert same_up_to_lines(found.test[0], pixels_of(other / "test"))


def test_classes_of_the_test_images_are_those_of_training(photos: Path) -> None:
    """A class without test images must not shift the labels of the others."""
    for path in (photos / "test" / "a").iterdir():
        path.unlink()
    (photos / "test" / "a").rmdir()
    try:
        labels = load_photos(photos).test[1].tolist()
    except (MissingDataError, ValueError):
        return  # to refuse them is as good
    assert labels == [1] * 4 + [2] * 4


def test_images_of_different_sizes_are_refused(photos: Path) -> None:
    add_image(photos, "train", "b", 3, size=(7, 9))
    with pytest.raises(ValueError, match=r"must be of one size, but .*000\.png is 6×5 and .*003\.png is 7×9\. Resize"):
        load_photos(photos)
    assert not list(photos.parent.glob("cache/*train*"))


@pytest.mark.parametrize("folders", [[], ["train"], ["train", "test"], ["train/a", "test/a"]], ids="+".join)
def test_missing_or_empty_image_folder_is_named(folders: list[str], tmp_path: Path) -> None:
    for folder in folders:
        (tmp_path / "photos" / folder).mkdir(parents=True)
    with pytest.raises(MissingDataError, match="photos") as error:
        load_images("folder:photos", tmp_path, tmp_path / "cache")
    assert str(tmp_path) in str(error.value)
    assert "--data_root" in str(error.value)
