"""The image sets of the study by name, each as tensors that lie on the device: fixed splits, standardized inputs."""

from __future__ import annotations

import gzip
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import Dataset
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

from lightning_gcsr.validation import check_choice

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Images, shape (n, height, width) or (n, height, width, channels), and labels, shape (n,)."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


class MissingDataError(Exception):
    """An image set is not where it was looked for, and could not be downloaded."""


def load_images(
    name: str, root: Path, cache: Path, train_images: int | None = None, device: torch.device | str = "cpu"
) -> Dataset:
    """An image set by name, or ``folder:NAME``: the image folder root/NAME with train/CLASS/ and test/CLASS/.

    The split does not depend on a run's seed. A tenth of the training images, at most 5,000, or of a small set 300 but
    no more than a fifth, is for validation; ``train_images`` takes only so many of the others. Decoded image folders
    are kept as one array in ``cache``.
    """
    if name.startswith("folder:"):
        training, test = _image_folder(root / name.removeprefix("folder:"), cache)
    else:
        check_choice("data", name, [*IMAGE_SETS, "folder:NAME"])
        training, test = IMAGE_SETS[name](root)
    order = torch.randperm(len(training[1]), generator=torch.Generator().manual_seed(0))
    held_out = max(min(len(order) // 10, 5_000), min(len(order) // 5, 300))
    chosen = order[held_out:] if train_images is None else order[held_out:][:train_images]
    if train_images is not None and len(chosen) < train_images:
        raise ValueError(
            f"`train_images` must be at most {len(chosen):,} for {name!r}, whose other {held_out:,} training images are"
            f" for validation, got train_images={train_images}."
        )
    train = _tensors(training, chosen, device)
    mean, deviation = train[0].mean((0, 2, 3), keepdim=True), train[0].std((0, 2, 3), keepdim=True)

    def standardized(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images - mean) / deviation, labels

    return Dataset(
        train=standardized(*train),
        validation=standardized(*_tensors(training, order[:held_out], device)),
        test=standardized(*_tensors(test, torch.arange(len(test[1])), device)),
        classes=int(training[1].max()) + 1,
    )


def _tensors(arrays: Arrays, chosen: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """These images and labels, on the device; whole sets are kept as bytes for as long as possible."""
    images = torch.from_numpy(np.ascontiguousarray(arrays[0][chosen.numpy()])).to(device)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images.float().contiguous(), torch.from_numpy(arrays[1][chosen.numpy()].astype(np.int64)).to(device)


def _digits(root: Path) -> tuple[Arrays, Arrays]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    arrays = images[order].reshape(-1, 8, 8).astype(np.uint8), labels[order]
    return (arrays[0][:1_397], arrays[1][:1_397]), (arrays[0][1_397:], arrays[1][1_397:])


def _torchvision(
    title: str, make: Callable[..., Any], train: dict[str, Any], test: dict[str, Any]
) -> Callable[[Path], tuple[Arrays, Arrays]]:
    def load(root: Path) -> tuple[Arrays, Arrays]:
        if title == "FashionMNIST":
            _unpack_debian_fashion_mnist(root)
        return _arrays(_found(title, make, root, train)), _arrays(_found(title, make, root, test))

    return load


def _found(title: str, make: Callable[..., Any], root: Path, arguments: dict[str, Any]) -> Any:
    try:
        return make(root=root, **arguments)
    except RuntimeError:
        try:
            return make(root=root, download=True, **arguments)
        except Exception as error:
            raise MissingDataError(
                f"{title} is not in {root.resolve()} and could not be downloaded ({error}). Put torchvision's files of"
                f" it there, or name the folder that holds them with --data_root; where there is a network it is"
                " downloaded." + _advice(title)
            ) from error


def _advice(title: str) -> str:
    return " On Debian, `apt install dataset-fashion-mnist` provides it." if title == "FashionMNIST" else ""


def _unpack_debian_fashion_mnist(root: Path) -> None:
    """Lay Debian's copy out as torchvision wants it, where there is one and torchvision has none."""
    folder = root / "FashionMNIST" / "raw"
    for packed in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):
        target = folder / packed.stem
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_name(f"{target.name}.{os.getpid()}")
            with gzip.open(packed) as source, unfinished.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            unfinished.rename(target)


def _arrays(dataset: Any) -> Arrays:
    images = np.asarray(dataset.data)
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    if images.ndim == 4 and images.shape[1] == 3:  # SVHN keeps its channels first
        images = images.transpose(0, 2, 3, 1)
    return images, labels


def _image_folder(folder: Path, cache: Path) -> tuple[Arrays, Arrays]:
    parts = []
    for split in ("train", "test"):
        try:
            parts.append(datasets.ImageFolder(str(folder / split)))
        except FileNotFoundError as error:
            raise MissingDataError(
                f"There is no image folder {(folder / split).resolve()}: {error} It must hold a folder of images for"
                " each class; name the folder above with --data_root."
            ) from error
    if parts[0].classes != parts[1].classes:
        odd = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(
            f"{folder} must have the same classes in train and test, but {odd[0]!r} is in one of them only."
        )
    return _decoded(parts[0], cache), _decoded(parts[1], cache)


def _decoded(found: datasets.ImageFolder, cache: Path) -> Arrays:
    root = Path(found.root).resolve()
    cached = cache / f"{root.parent.name}-{root.name}-{zlib.crc32(str(root).encode()):08x}.npz"
    # A folder that was changed since is decoded anew.
    states = [(path, Path(path).stat()) for path, _ in found.samples]
    contents = np.array([f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states])
    if cached.exists():
        with np.load(cached) as arrays:
            if np.array_equal(arrays["contents"], contents):
                return arrays["images"], arrays["labels"]
    decoded = [np.asarray(found.loader(path)) for path, _ in found.samples]
    if odd := [number for number, image in enumerate(decoded) if image.shape != decoded[0].shape]:
        sizes = [f"{found.samples[i][0]} is {decoded[i].shape[1]}×{decoded[i].shape[0]}" for i in (0, odd[0])]
        raise ValueError(f"The images of a folder must be of one size, but {sizes[0]} and {sizes[1]}. Resize them.")
    images = np.stack(decoded)
    labels = np.asarray(found.targets)
    cached.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_name(f"{cached.stem}.{os.getpid()}.npz")
    np.savez(unfinished, images=images, labels=labels, contents=contents)
    unfinished.rename(cached)
    return images, labels


IMAGE_SETS: dict[str, Callable[[Path], tuple[Arrays, Arrays]]] = {
    "digits": _digits,
    "fashion_mnist": _torchvision("FashionMNIST", datasets.FashionMNIST, {"train": True}, {"train": False}),
    "cifar10": _torchvision("CIFAR-10", datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": _torchvision("CIFAR-100", datasets.CIFAR100, {"train": True}, {"train": False}),
    "svhn": _torchvision("SVHN", datasets.SVHN, {"split": "train"}, {"split": "test"}),
}
