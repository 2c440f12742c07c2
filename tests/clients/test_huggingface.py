"""The examples for a Hugging Face Trainer and for Accelerate: sparse, and resumed as if never stopped."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_accelerate_loop_reaches_the_target_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra `clients` is not installed")
    main = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))["main"]
    whole = main(str(tmp_path / "whole"))
    main(str(tmp_path / "parts"), epochs=10)
    resumed = main(str(tmp_path / "parts"), done=10)
    zeros = sum(int((p == 0).sum()) for p in whole.parameters() if p.dim() > 1)
    assert zeros / (16 * 64 + 64 * 4) == pytest.approx(0.8, abs=0.02)
    assert sum(int((p == 0).sum()) for p in resumed.parameters() if p.dim() > 1) == pytest.approx(zeros, abs=26)


def test_hugging_face_trainer_reaches_the_target_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `clients` is not installed")
    main = runpy.run_path(str(EXAMPLES / "huggingface_trainer.py"))["main"]
    settings = {"save_strategy": "steps", "save_steps": 96, "use_cpu": True}
    whole = main(str(tmp_path), **settings)
    resumed = main(str(tmp_path), resume=str(tmp_path / "checkpoint-96"), **settings)
    matrices = [p for name, p in whole.named_parameters() if p.dim() > 1 and "ln" not in name]
    zeros = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
    assert zeros == pytest.approx(0.8, abs=0.02)
    assert all((p == q).all() for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_clipping_by_the_hugging_face_trainer_itself_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `clients` is not installed")
    main = runpy.run_path(str(EXAMPLES / "huggingface_trainer.py"))["main"]
    with pytest.raises(ValueError, match=r"`max_grad_norm` must be 0, got 1\.0\. Give it to the callback instead\."):
        main(str(tmp_path), max_grad_norm=1.0, use_cpu=True)
