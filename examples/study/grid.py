"""A study file: which problems, methods and seeds, as the list of runs that it asks for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from data import is_text
from methods import Method
from problems import OPTIMIZERS, Problem
from sklearn.model_selection import ParameterGrid

from lightning_gcsr.validation import argument_error, check_choice, check_integer, did_you_mean

T = TypeVar("T")


class StudyFileError(ValueError):
    """A study file that says something the study does not know."""


@dataclass(frozen=True)
class Run:
    """One training: a problem, a method, a seed."""

    problem: Problem
    method: Method
    seed: int

    @property
    def key(self) -> str:
        """All that decides the run, as JSON; without what is left at its default, so that settings can be added."""
        return json.dumps(
            {"problem": _given(self.problem), "method": _given(self.method), "seed": self.seed}, sort_keys=True
        )

    @classmethod
    def from_key(cls, key: str) -> Run:
        """The run that has this key."""
        values = json.loads(key)
        return cls(Problem(**values["problem"]), Method(**values["method"]), values["seed"])

    @property
    def title(self) -> str:
        """For people."""
        extent = f", {self.method.extent}" if self.method.extent else ""
        return f"{self.problem.title}: {self.method.title}{extent}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """What a study file asks for."""

    name: str
    runs: list[Run]
    headline: list[str]
    """Titles of the methods that the report begins with; the first is compared with the others."""
    title: str = ""
    """The title of the report."""


def read_study(path: Path, text: Path | None = None) -> Study:
    """Read and check a study file.

    ``name`` names the study; ``problems`` is a list of :class:`~training.Problem` settings, ``seeds`` a list of
    integers, ``methods`` a list of :class:`~methods.Method` settings, where each value may be a list: the grid of all
    combinations. A method may have ``networks`` and ``optimizers``, lists, to be tried with those alone, and ``seeds``
    of its own. With ``text``, a file, all problems on text are on this one.
    ``headline`` is a list of titles of methods that the report begins with: the first of them is compared with the
    others. ``title`` is that of the report.

    Raises:
        StudyFileError: With the file, the place in it, and the known names.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyFileError(f"The study file {path} cannot be read: {error}") from error
    needed = ("name", "problems", "seeds", "methods")
    known = (*needed, "headline", "title")
    if not isinstance(content, Mapping):
        raise StudyFileError(
            f"The study file {path} must hold {', '.join(known)}; see examples/study/digits_smoke.yaml."
        )
    try:
        _check_names(content, known, "a study")
        for name in needed:
            if content.get(name) in (None, "", []):
                raise ValueError(f"`{name}` must be given. See examples/study/digits_smoke.yaml.")
        for name in ("problems", "methods"):
            if not isinstance(content[name], list):
                raise argument_error(name, content[name], "must be a list", kind=TypeError)
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", str(content["name"])):
            rule = "must consist of letters, digits and '_', '.' or '-', since it names a folder"
            raise argument_error("name", content["name"], rule)
        seeds = content["seeds"] if isinstance(content["seeds"], list) else [content["seeds"]]
        problems = [_construct(Problem, values, "problems", i) for i, values in enumerate(content["problems"], 1)]
        if text is not None:
            problems = [replace(p, data=f"text:{text}") if is_text(p.data) else p for p in problems]
        asked = [run for i, block in enumerate(content["methods"], 1) for run in _block(block, problems, seeds, i)]
        headline = list(content.get("headline", []))
        for title in headline:
            check_choice("headline", title, dict.fromkeys(run.method.title for run in asked))
    except (TypeError, ValueError) as error:
        raise StudyFileError(f"The study file {path}: {error}") from error
    # A seed after the other: a study that is stopped early has some seeds of everything. Repeats are one run.
    order = list(dict.fromkeys(run.seed for run in asked))
    runs = {run.key: run for run in sorted(asked, key=lambda run: order.index(run.seed))}
    return Study(str(content["name"]), list(runs.values()), headline, str(content.get("title", content["name"])))


def _block(block: object, problems: list[Problem], seeds: list[int], place: int) -> list[Run]:
    """What one entry of `methods` asks for: the grid over its lists, on its networks, from its seeds."""
    if not isinstance(block, Mapping):
        raise TypeError(f"entry {place} of `methods` must be settings such as `method: plain`, got {block!r}.")
    known = ["networks", "optimizers", "seeds", *(field.name for field in dataclasses.fields(Method))]
    _check_names(block, known, f"methods, entry {place}")
    lists = {name: value if isinstance(value, list) else [value] for name, value in block.items()}
    networks = lists.pop("networks", [problem.network for problem in problems])
    optimizers = lists.pop("optimizers", OPTIMIZERS)
    seeds = lists.pop("seeds", seeds)
    for seed in seeds:
        check_integer("seeds", seed, 0)
    for network in networks:
        check_choice(f"networks (methods, entry {place})", network, {problem.network for problem in problems})
    for optimizer in optimizers:
        check_choice(f"optimizers (methods, entry {place})", optimizer, OPTIMIZERS)
    problems = [problem for problem in problems if problem.network in networks and problem.optimizer in optimizers]
    if empty := [name for name, values in lists.items() if not values]:
        raise ValueError(f"`{empty[0]}` must not be an empty list in methods, entry {place}.")
    methods = [_construct(Method, values, "methods", place) for values in ParameterGrid(lists)]
    for problem, method in itertools.product(problems, methods):
        method.check_optimizer(problem)
    return [Run(problem, method, seed) for method in methods for problem in problems for seed in seeds]


def _construct(kind: type[T], values: object, where: str, place: int) -> T:
    if not isinstance(values, Mapping):
        raise TypeError(f"entry {place} of `{where}` must be settings by name, got {values!r}.")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    _check_names(values, [field.name for field in fields], f"{where}, entry {place}")
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"`{missing[0]}` must be given in {where}, entry {place}.")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}, entry {place}: {error}") from error


def _check_names(values: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for name in values:
        if name not in known:
            advice = f"Known are {', '.join(known)}. {did_you_mean(name, known)}".rstrip()
            raise ValueError(f"unknown name {name!r} in {where}. {advice}")


def _given(settings: Any) -> dict[str, Any]:
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    }
