"""Copy a study's report into the documentation, and its answer into the README.

    python examples/study/publish.py runs/study/comparison --readme README.md

The README has the lead over the best rival and the figure between two comments that name the page.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Optional

from jsonargparse import auto_cli

FILES = ("*.md", "*.csv", "*.png")


def publish(report: Path, docs: Path) -> Path:
    """Replace the report of this name in the documentation. Returns its folder there."""
    if not (report / "index.md").is_file():
        raise FileNotFoundError(f"`report` must be a folder with index.md, got report={str(report)!r}. Run the study.")
    folder = docs / report.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for pattern in FILES:
        for path in sorted(report.glob(pattern)):
            shutil.copy(path, folder / path.name)
    return folder


def answer_of(page: str, folder: str) -> str:
    """The tables of the answer and its figure with the caption, for a file that the folder is relative to."""
    lines = page.splitlines()
    start = lines.index("## The answer")
    unfinished = [line for line in lines[1:start] if line]
    table = next(number for number in range(start, len(lines)) if lines[number].startswith(("**", "|")))
    figure = next(number for number, line in enumerate(lines) if line.startswith("!["))
    caption_end = next(number for number in range(figure + 2, len(lines)) if not lines[number])
    told = [line.replace("](", f"]({folder}/") if line.startswith("![") else line for line in lines[table:caption_end]]
    return "\n".join([*unfinished, ""] * bool(unfinished) + told)


def replace_between(text: str, name: str, block: str) -> str:
    """The text with another block between the comments that name the page."""
    begin, end = f"<!-- the answer of {name} -->", f"<!-- end of the answer of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"`readme` must hold {begin} and {end} once each. Add them where the answer belongs.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"


def main(report: Path, docs: Path = Path("docs/results"), readme: Optional[Path] = None) -> None:
    """Copy a report, and put its answer into a README.

    Args:
        report: The folder that `run.py` wrote.
        docs: Where the reports of the documentation are.
        readme: The README whose answer is replaced, if any.
    """
    folder = publish(report, docs)
    print(f"Report: {folder}")
    if readme is not None:
        name = (folder / "index.md").as_posix()
        block = answer_of((folder / "index.md").read_text(), folder.as_posix())
        readme.write_text(replace_between(readme.read_text(), name, block))
        print(f"Answer: {readme}")


if __name__ == "__main__":
    auto_cli(main)
