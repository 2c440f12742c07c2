"""The data sets of the study by name: image sets, image folders, and text."""

from __future__ import annotations

from pathlib import Path

import torch
from batches import Dataset
from images import IMAGE_SETS, load_images
from text import load_text

from lightning_gcsr.validation import check_choice


def check_data(name: object) -> None:
    """Raise a ``ValueError`` that lists the known names, unless this is one."""
    if not isinstance(name, str) or not name.startswith(("folder:", "text:")):
        check_choice("data", name, [*IMAGE_SETS, "folder:NAME", "text", "text:FILE"])


def is_text(name: str) -> bool:
    """Whether the data set of this name is text."""
    return name == "text" or name.startswith("text:")


def load_data(
    name: str, root: Path, cache: Path, train_images: int | None = None, device: torch.device | str = "cpu"
) -> Dataset:
    """A data set by name: an image set, ``folder:NAME``, ``text``, or ``text:FILE``; see the modules of both."""
    check_data(name)
    if is_text(name):
        file = name.removeprefix("text").removeprefix(":")
        return load_text(Path(file) if file else None, train_images, device)
    return load_images(name, root, cache, train_images, device)
