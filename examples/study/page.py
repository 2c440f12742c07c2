"""The prose of a report that is the same for every study: what was run, and how it was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import pandas as pd
from data import is_text
from grid import Study
from methods import Method
from names import method_names, problem_names


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, its cells as they are."""
    return str(table.to_markdown(index=False, disable_numparse=True))


def wrapped(lines: Iterable[str], width: int = 120) -> str:
    """The page as text; lines of prose are broken, tables, headings and figures are not."""
    broken = []
    for line in lines:
        prose = not line.startswith(("|", "#", "!"))
        indent = "  " if line.startswith("- ") else ""
        options = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
        broken.append(textwrap.fill(line, width, **options) if prose else line)  # type: ignore[arg-type]
    return "\n".join(broken)


def how_it_was_measured(study: Study, runs: pd.DataFrame) -> list[str]:
    """The problems, the methods and their settings, and the words of the tables."""
    seeds = sorted({run.seed for run in study.runs})
    from_seeds = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"one seed, {seeds[0]}"
    return [
        f"{len(runs):,} of {len(study.runs):,} runs are done, from {from_seeds}.",
        "",
        *_problems(study, runs),
        "",
        "Methods and the settings that were tried:",
        "",
        *_methods(study, [run.method for run in study.runs]),
        "",
        "Accuracies are in %, on test data that no choice was made on; of text, accuracy is the share of the next"
        " characters that are predicted. ± is the standard error over the seeds; a method with one seed has none."
        " Compression is weights over nonzeros. Only exact zeros count, as `sparsity/model` shows them, among the"
        " weights that a penalty may reach: those with two or more dimensions outside norm layers.",
        "",
        "Numbers at equal compression are interpolated linearly in the logarithm of the compression between"
        " neighbouring points of one method in one seed, and never extrapolated: a method has no number beyond its own"
        " weakest and strongest setting, within 2 %. Accuracy falls ever faster as compression grows, and a straight"
        " line between distant points lies below such a curve. So methods with few strengths may be better than shown,"
        " while those that are given a sparsity were trained at the compressions themselves.",
        "",
        "Leads are differences seed by seed, over the seeds that both methods have. *Ahead* and *behind* mean p < 0.05"
        " in a paired t-test over the seeds, without correction for the number of cells; with three seeds this takes a"
        " lead of 4.3 standard errors. *Level* is anything between. With one seed there is no standard error: *better*"
        " and *worse* only compare two numbers.",
        "",
    ]


def _problems(study: Study, runs: pd.DataFrame) -> Iterable[str]:
    for problem, name in problem_names(run.problem for run in study.runs).items():
        done = runs[runs["problem"] == name]
        images = f"{done['train_images'].iloc[0]:,}" if len(done) else "no run is done; its"
        inputs = "sequences" if is_text(problem.data) else "images"
        epochs = "1 epoch" if problem.epochs == 1 else f"{problem.epochs} epochs"
        rising = f" after a rise over {problem.lr_warmup} steps" if problem.lr_warmup else ""
        yield (
            f"- {name}: {images} training {inputs}, {epochs}, batches of {problem.batch_size},"
            f" {problem.optimizer_title}, learning rate {problem.lr:g} falling to zero as a cosine{rising},"
            f" {'augmented by ' + problem.augment if problem.augment else 'no augmentation'}."
        )


def _methods(study: Study, methods: list[Method]) -> Iterable[str]:
    """Each method by its name, with its settings as the study file has them, and how far it was taken."""
    names = method_names(methods, study.headline)
    for title, name in names.items():
        if title == name == "no penalty":
            continue
        extents = dict.fromkeys(method.extent for method in methods if method.title == title)
        settings = "" if title == name else f" ({title})"
        yield f"- *{name}*{settings}: {'; '.join(extent for extent in extents if extent) or 'one setting'}"
