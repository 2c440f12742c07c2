"""Publishing: a report goes to the documentation, and its answer to the README."""

from pathlib import Path

import pytest
from publish import main

PAGE = """# Title

**This study is not finished**: 1 of 2.

## The answer

Ahead.

**Cost**

| a | b |

**Lead**

| c | d |

![Figure](figure.png)

*Caption,
in two lines.*

## More
"""
COMMENTS = "<!-- the answer of {0} -->", "<!-- end of the answer of {0} -->"


def test_report_and_answer_replace_what_was_there(tmp_path: Path) -> None:
    report, docs, readme = tmp_path / "runs" / "tiny", tmp_path / "docs", tmp_path / "README.md"
    report.mkdir(parents=True)
    (report / "index.md").write_text(PAGE)
    (report / "figure.png").write_bytes(b"new")
    (docs / "tiny").mkdir(parents=True)
    (docs / "tiny" / "old.png").write_bytes(b"old")
    begin, end = (comment.format((docs / "tiny" / "index.md").as_posix()) for comment in COMMENTS)
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    main(report, docs, readme)
    assert {path.name for path in (docs / "tiny").iterdir()} == {"index.md", "figure.png"}
    folder = (docs / "tiny").as_posix()
    assert readme.read_text() == (
        f"before\n{begin}\n\n**This study is not finished**: 1 of 2.\n\n"
        "**Cost**\n\n| a | b |\n\n**Lead**\n\n| c | d |\n\n"
        f"![Figure]({folder}/figure.png)\n\n*Caption,\nin two lines.*\n\n{end}\nafter\n"
    )


def test_readme_without_the_comments_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "index.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(ValueError, match="`readme` must hold <!-- the answer of"):
        main(tmp_path / "tiny", tmp_path / "docs", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "text"
