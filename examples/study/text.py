"""Text as sequences of characters: any file in UTF-8, or the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

import torch
from batches import Dataset
from images import MissingDataError
from torch import Tensor

LENGTH = 64
"""Characters in a sequence."""
KNOWN = 95
"""How many characters have a number of their own: the most frequent ones. All others share one."""


def load_text(path: Path | None, train_sequences: int | None = None, device: torch.device | str = "cpu") -> Dataset:
    """Sequences of characters, of which the network predicts the next one.

    The first 80 % of the sequences are for training, the next 10 % for validation, the last 10 % for testing; of the
    last two parts at most 1,000 sequences, which lie at even distances.

    Args:
        path: The text; ``None`` for the sources of Python's standard library, which are everywhere and differ between
            versions of Python.
        train_sequences: How many training sequences, chosen once for all runs; all of them where not given.
        device: Where the sequences are kept.

    Raises:
        MissingDataError: If the file cannot be read.
        ValueError: If the text is shorter than a batch needs, or has fewer training sequences than asked for.
    """
    text = _standard_library() if path is None else _read(path)
    sequences = len(text) // LENGTH - 1
    if sequences < 30:
        raise ValueError(
            f"The text must have at least {31 * LENGTH:,} characters, got {len(text):,}. Use a longer one."
        )
    frequent = [character for character, _ in Counter(text).most_common(KNOWN)]
    numbers = {character: number for number, character in enumerate(frequent)}
    tokens = torch.tensor([numbers.get(character, len(frequent)) for character in text], device=device)
    inputs = tokens[: sequences * LENGTH].view(-1, LENGTH)
    labels = tokens[1 : sequences * LENGTH + 1].view(-1, LENGTH)
    first, second = int(0.8 * sequences), int(0.9 * sequences)
    chosen = torch.randperm(first, generator=torch.Generator().manual_seed(0)).to(tokens.device)
    if train_sequences is not None and train_sequences > first:
        raise ValueError(
            f"`train_images` must be at most {first:,} for this text, got train_images={train_sequences}. It is a"
            f" number of sequences of {LENGTH} characters."
        )

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        return inputs[rows], labels[rows]

    return Dataset(
        train=part(chosen[:train_sequences]),
        validation=part(_evenly(first, second).to(tokens.device)),
        test=part(_evenly(second, sequences).to(tokens.device)),
        classes=len(frequent) + 1,
    )


def _evenly(start: int, end: int, at_most: int = 1_000) -> Tensor:
    count = min(at_most, end - start)
    return start + torch.arange(count) * (end - start) // count


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingDataError(f"The text {path} cannot be read: {error}. Name a file in UTF-8 with --text.") from error


def _standard_library() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    if not texts:
        raise MissingDataError(
            f"The sources of Python's standard library are not in {folder}. Name a text in UTF-8 with --text."
        )
    return "".join(texts)
