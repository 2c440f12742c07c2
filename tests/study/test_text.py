"""Text: sequences whose labels are the next characters, from the standard library or a file."""

from pathlib import Path

import pytest
import torch
from data import is_text, load_data
from images import MissingDataError
from methods import Method
from problems import Problem
from text import KNOWN, LENGTH, load_text
from training import train


def test_standard_library_is_the_default_and_labels_are_the_next_characters() -> None:
    found = load_data("text", Path("nowhere"), Path("nowhere"), 50)
    assert found.shape == (LENGTH,)
    assert found.classes == KNOWN + 1
    assert found.train[0].shape == (50, LENGTH)
    for inputs, labels in (found.train, found.validation, found.test):
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert len(found.validation[0]) == len(found.test[0]) == 1_000
    again = load_data("text", Path("nowhere"), Path("nowhere"), 50)
    assert torch.equal(again.train[0], found.train[0])


def test_parts_of_a_text_do_not_overlap(tmp_path: Path) -> None:
    lines = "".join(f"{number:063d}\n" for number in range(201))
    (tmp_path / "numbers.txt").write_text(lines)
    found = load_data(f"text:{tmp_path / 'numbers.txt'}", Path("nowhere"), Path("nowhere"))
    parts = [{tuple(row.tolist()) for row in part[0]} for part in (found.train, found.validation, found.test)]
    assert [len(part) for part in parts] == [160, 20, 20]
    assert len(set.union(*parts)) == 200


def test_bad_texts_are_named(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match="must have at least 1,984 characters, got 9"):
        load_text(short)
    with pytest.raises(MissingDataError, match=r"gone\.txt cannot be read: .*--text"):
        load_text(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"`train_images` must be at most .* for this text, got train_images=10000000"):
        load_text(None, 10_000_000)
    assert [is_text(name) for name in ("text", "text:a.txt", "texture")] == [True, True, False]


def test_transformer_learns_which_character_comes_next() -> None:
    data = load_text(None, 640)
    problem = Problem(
        "text", "character_transformer", epochs=1, lr=0.003, batch_size=16, optimizer="adamw", lr_warmup=5
    )
    outcome = train(problem, Method(), 0, data)
    assert outcome.test_loss < 3.2 < torch.tensor(data.classes).log()
    assert outcome.test_accuracy > 0.2
    assert outcome.nonzeros == outcome.weights == 2 * 96 * 64 + 2 * (4 + 8) * 64**2


def test_transformer_does_not_look_ahead() -> None:
    from networks import make_network

    network = make_network("character_transformer", (LENGTH,), 96).eval()
    text = torch.randint(96, (1, LENGTH))
    changed = text.clone()
    changed[0, 40:] = (changed[0, 40:] + 1) % 96
    with torch.no_grad():
        before, after = network(text), network(changed)
    torch.testing.assert_close(before[0, :40], after[0, :40])
    assert not torch.allclose(before[0, 40:], after[0, 40:])
