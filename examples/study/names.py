"""What a report calls methods and problems: names for people in place of configuration strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from data import is_text
from methods import PENALTY_TITLES, Method
from problems import Problem

METHODS = {
    "none": "no penalty",
    "coherent": "this package",
    "cautious_weight_decay": "cautious weight decay",
    "magnitude_pruning": "gradual pruning",
    "pat_top_k": "PAT, top-k",
    "pat_lasso": "PAT, lasso",
    "spred": "spred",
    "linearized_bregman": "linearized Bregman",
}
NETWORKS = {
    "deep_mlp": "deep MLP",
    "lenet_300_100": "LeNet-300-100",
    "lenet_300_100_dropout": "LeNet-300-100 with dropout",
    "lenet_5": "LeNet-5",
    "alexnet": "AlexNet",
    "alexnet_slim": "slim AlexNet",
    "vgg_16": "VGG-16",
    "vgg_16_bn": "VGG-16 with batch norm",
    "vgg_16_slim": "slim VGG-16",
    "vgg_16_bn_slim": "slim VGG-16 with batch norm",
    "resnet_20": "ResNet-20",
    "vision_transformer": "small vision transformer",
    "character_transformer": "small transformer",
}
DATA = {
    "digits": "digits",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "text": "source code",
}
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
SCOPES = {"element": "at each weight", "parameter": "for each tensor", "model": "for the whole model"}
EXTENTS = ("strength", "compression", "target_sparsity")
"""How far a method goes, which is no part of its name."""


def method_names(methods: Iterable[Method], headline: Iterable[str] = ()) -> dict[str, str]:
    """A name for each title of the methods: what the method is, and how it differs from the first of its kind.

    The first of a kind is one that the headline names, if there is one.
    """
    by_title = {method.title: method for method in methods}
    ordered = [title for title in headline if title in by_title]
    ordered += [title for title in by_title if title not in ordered]
    first: dict[str, Method] = {}
    names = {}
    for title in ordered:
        method = by_title[title]
        kind = _kind(method)
        differences = _differences(method, first.setdefault(kind, method))
        names[title] = ", ".join([kind, *differences])
    return names


def _kind(method: Method) -> str:
    if method.method in ("plain", "delayed"):
        return f"{method.method} {PENALTY_TITLES[method.penalty or '']}"
    return METHODS[method.method]


def _differences(method: Method, first: Method) -> list[str]:
    """What the settings of a method are where they differ from the first's, in words."""
    settings, of_first = (dataclasses.asdict(each) for each in (method, first))
    different = [name for name in settings if settings[name] != of_first[name] and name not in EXTENTS]
    if {"coherence", "scope"} & set(different):
        different = ["coherence", *(name for name in different if name not in ("coherence", "scope"))]
    words = [_words(name, settings[name], method) for name in different]
    if (method.target_sparsity is None) is not (first.target_sparsity is None):
        words.append("by target" if method.target_sparsity is not None else f"by {_extent(method)}")
    return words


def _extent(method: Method) -> str:
    return "strength" if method.strength is not None else "compression"


def _words(name: str, value: object, method: Method) -> str:
    spoken = {"warmup": "warm-up", "initial_density": "initial density"}.get(name, name)
    if name == "penalty":
        return PENALTY_TITLES[str(value)]
    if name == "coherence":
        return f"{value} {SCOPES[method.scope or 'element']}"
    if name == "update":
        return f"{value} update".replace("_", " ")
    if name == "strength_scale":
        return f"{value} strengths".replace("_", "-")
    if name == "prunings":
        return f"in {value} steps" if value else "at epoch ends"
    if not value:
        return f"no {spoken}"
    return f"{spoken} {100 * float(str(value)):g} %" if name in ("delay", "warmup", "polish") else f"{spoken} {value:g}"


def problem_names(problems: Iterable[Problem]) -> dict[Problem, str]:
    """A name for each problem: network, data and optimizer, and where these are alike, what tells problems apart."""
    problems = list(dict.fromkeys(problems))
    names = {}
    for problem in problems:
        alike = [other for other in problems if _problem_name(other) == _problem_name(problem)]
        fields = [field.name for field in dataclasses.fields(Problem)]
        different = [name for name in fields if len({getattr(other, name) for other in alike}) > 1]
        details = (f"{name.replace('_', ' ')} {getattr(problem, name)}" for name in different)
        names[problem] = ", ".join([_problem_name(problem), *details])
    return names


def _problem_name(problem: Problem) -> str:
    source = problem.data.removeprefix("folder:")
    data = "text" if is_text(source) and source != "text" else DATA.get(source, source)
    return f"{NETWORKS[problem.network]} on {data}, {OPTIMIZERS[problem.optimizer]}"
