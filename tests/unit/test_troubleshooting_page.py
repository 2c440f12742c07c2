"""The troubleshooting page knows every warning and error of the package, and no other."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import lightning_gcsr

PACKAGE = Path(lightning_gcsr.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"

# Those that check a named argument by a rule of their own, and are told apart by the name of the argument.
CHECKS = {"check_finite_number", "check_integer", "check_choice", "check_patterns", "check_moment"}
# A message with fewer words of its own hands on another one, and a shorter quotation would fit too many.
FEWEST_WORDS = 2
FEWEST_LETTERS = 8


def name_of(call: ast.Call) -> str:
    """The last name in what is called: ``check`` of ``self.helpers.check(...)``."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def texts(node: ast.expr, scope: ast.AST) -> Iterator[str]:
    """What a string expression may say, with ``…`` in place of what is known at run time only."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for parts in itertools.product(texts(node.left, scope), texts(node.right, scope)):
            yield "".join(parts)
    elif isinstance(node, ast.Name) and (value := value_of(node, scope)) is not None:
        yield from texts(value, scope)
    else:
        yield "…"


def value_of(name: ast.Name, scope: ast.AST) -> ast.expr | None:
    """What was assigned to a name last before it is used."""
    assigned = [
        node
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and node.lineno < name.lineno
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id == name.id
    ]
    return max(assigned, key=lambda node: node.lineno).value if assigned else None


def messages_in(scope: ast.AST) -> Iterator[str]:
    """Every message that a function may raise or warn with."""
    raised = {id(node.exc) for node in ast.walk(scope) if isinstance(node, ast.Raise)}
    for node in ast.walk(scope):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        if name_of(node) == "argument_error":
            for name, rule in itertools.product(texts(node.args[0], scope), texts(node.args[2], scope)):
                yield f"`{name}` {rule}"
        elif name_of(node) == "misconfiguration":
            yield from texts(node.args[1], scope)
        elif name_of(node) in ("rank_zero_warn", "rank_zero_deprecation", "warn") or (
            id(node) in raised and re.search(r"(Error|Exception)$", name_of(node))
        ):
            yield from texts(node.args[0], scope)
        elif name_of(node) == "_warn_once":
            yield from texts(node.args[1], scope)


def functions() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def collect_messages() -> list[str]:
    found = dict.fromkeys(" ".join(message.split()) for _, scope in functions() for message in messages_in(scope))
    return [message for message in found if len(re.findall(r"\b[a-z]+\b", message)) >= FEWEST_WORDS]


def collect_checked_arguments() -> list[str]:
    """The arguments that are checked by a shared rule."""
    found = [
        call.args[0].value
        for _, scope in functions()
        for call in ast.walk(scope)
        if isinstance(call, ast.Call) and name_of(call) in CHECKS and isinstance(call.args[0], ast.Constant)
    ]
    return sorted(set(found))


def cells() -> list[str]:
    """The first cell of every row of the page's tables."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", row)[1].strip().replace("\\|", "|") for row in rows]


def quoted() -> list[str]:
    """The messages that the page quotes, which are in double backticks or in single ones if they hold none."""
    return [
        (double or single).strip() for cell in cells() for double, single in re.findall(r"``(.+?)``|`([^`]+)`", cell)
    ]


MESSAGES = collect_messages()


def test_the_search_finds_messages_of_each_kind() -> None:
    assert any("have collapsed" in message for message in MESSAGES)
    assert any("needs one optimizer that steps all" in message for message in MESSAGES)
    assert "`schedule` must be a Schedule" in MESSAGES
    assert {"l1_ratio", "zero_threshold", "mode"} <= set(collect_checked_arguments())


def test_every_message_is_explained() -> None:
    quotes = [quote for quote in quoted() if len(quote) >= FEWEST_LETTERS]
    assert [message for message in MESSAGES if not any(quote in message for quote in quotes)] == []


def test_every_checked_argument_is_explained() -> None:
    assert set(collect_checked_arguments()) <= set(quoted())


def test_no_message_is_explained_that_nobody_gives() -> None:
    said = [*MESSAGES, *collect_checked_arguments()]
    assert [quote for quote in quoted() if not any(quote in message for message in said)] == []
