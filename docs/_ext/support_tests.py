"""Shows the support matrix with signs that link to the code of the tests, and puts that code on the page ``tests``.

The source of the matrix names the tests in words, which can be read without this extension, and which a test compares
with the tests that exist.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

MATRIX, PAGE = "support", "tests"
TESTS = Path(__file__).parents[2] / "tests"
SIGNS = {"tested": "✓", "refused": "✗", "by construction": "○"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("source-read", _change_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _change_source(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == MATRIX:
        source[0] = "\n".join(_with_signs(line) for line in source[0].splitlines())
    elif docname == PAGE:
        names = sorted(set(re.findall(r"`(test_\w+)`", (Path(app.srcdir) / f"{MATRIX}.md").read_text())))
        app.env.note_dependency(f"{MATRIX}.md")
        source[0] += "".join(_section(name, Path(app.srcdir)) for name in names)


def _with_signs(line: str) -> str:
    """A line of the matrix: "tested: `test_x`" becomes ✓ with a link, and further names become links."""
    for word, sign in SIGNS.items():
        line = re.sub(rf"\b{word}: `(test_\w+)`", rf'[{sign}]({PAGE}.md#\1 "\1")', line)
        if line.startswith("|"):
            line = re.sub(rf"\| {word}\b", f"| {sign}", line)
    return re.sub(r"`(test_\w+)`", rf'[test]({PAGE}.md#\1 "\1")', line)


def _section(name: str, srcdir: Path) -> str:
    for path in sorted(TESTS.rglob("test_*.py")):
        if re.search(rf"^def {name}\(", path.read_text(), re.M):
            shown = path.relative_to(TESTS.parent).as_posix()
            include = f"```{{literalinclude}} ../{shown}\n:pyobject: {name}\n```"
            return f"\n\n## {name}\n\nIn `{shown}`:\n\n{include}\n"
    raise LookupError(f"docs/{MATRIX}.md names {name}, and there is no test of that name.")
