"""The methods that the study compares, each as the callbacks and the optimizer it needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import torch
from lightning.pytorch import Callback
from optimizers import base_optimizer, cautious_sgd, linearized_bregman
from pat import pat_lasso, pat_top_k
from problems import Problem
from pruning import PRUNED_AFTER, gradual_pruning
from spred import Factors, spred_optimizer
from torch import nn

from lightning_gcsr import Gate, GradientCoherentRegularization, KeepZeros, Schedule
from lightning_gcsr.validation import argument_error, check_choice, check_finite_number, check_integer

_PENALTY = {"penalty", "update"}
_OVER_TIME = {"strength_scale", "warmup", "polish"}
_ADAPTED = {"strength", "target_sparsity"}
_PRUNED = {"compression", "target_sparsity"}
SETTINGS: dict[str, tuple[set[str], set[str], set[str]]] = {
    "none": (set(), set(), set()),
    "plain": (_PENALTY, _OVER_TIME, _ADAPTED),
    "delayed": (_PENALTY | {"delay"}, _OVER_TIME, _ADAPTED),
    "coherent": (
        _PENALTY | {"coherence", "scope"},
        _OVER_TIME | {"delay", "threshold", "tolerance", "averaging"},
        _ADAPTED,
    ),
    "cautious_weight_decay": (set(), set(), {"strength"}),
    "magnitude_pruning": (set(), {"prunings"}, _PRUNED),
    "pat_top_k": (set(), set(), _PRUNED),
    "pat_lasso": (set(), {"polish"}, {"strength"}),
    "spred": ({"cut"}, set(), {"strength"}),
    "linearized_bregman": ({"initial_density"}, set(), {"strength"}),
}
"""The settings that each method needs, those that it may have, and those of which it needs exactly one."""
TITLES = {
    "none": "no penalty",
    "cautious_weight_decay": "L2 cautious weight decay",
    "pat_top_k": "PAT, top-k",
    "pat_lasso": "PAT, lasso",
    "spred": "spred",
    "linearized_bregman": "linearized Bregman",
}
PENALTY_TITLES = {"l1": "L1", "l2": "L2", "elastic_net": "elastic net", "group_lasso": "group lasso"}


@dataclass(frozen=True)
class Method:
    """One method and its settings. What a method does not use must be left out.

    How far the method goes is said by one of three settings. ``strength`` is that of the penalty. ``compression`` is
    what a network is pruned down to, weights over nonzeros. ``target_sparsity`` is the sparsity to end with.

    ``delay``, ``warmup`` and ``polish`` are shares of the training: without penalty at the start, with a rising one
    after that, and without penalty but with zeros kept at the end. ``prunings`` is in how many steps magnitude pruning
    prunes; left out, at the end of each epoch as Lightning's callback does. ``cut`` is below what spred sets weights to
    zero at the end, ``initial_density`` the share of weights that linearized Bregman iterations start with.
    """

    method: str = "none"
    penalty: Optional[str] = None
    strength: Optional[float] = None
    coherence: Optional[str] = None
    scope: Optional[str] = None
    threshold: Optional[float] = None
    tolerance: float = 0.0
    averaging: float = 0.0
    update: Optional[str] = None
    strength_scale: str = "uniform"
    delay: float = 0.0
    warmup: float = 0.0
    polish: float = 0.0
    compression: Optional[float] = None
    prunings: Optional[int] = None
    target_sparsity: Optional[float] = None
    cut: Optional[float] = None
    initial_density: Optional[float] = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, SETTINGS)
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(field.default, float) or "float" in str(field.type):
                value = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
                object.__setattr__(self, field.name, value)  # 10 and 10.0 are one run
        self._check_names()
        for name in ("delay", "warmup", "polish", "target_sparsity", "initial_density"):
            if getattr(self, name) is not None:
                check_finite_number(name, getattr(self, name), 0, 1, "It is a share.")
        for name, least in (("compression", 1), ("strength", 0), ("cut", 0)):
            if getattr(self, name) is not None:
                check_finite_number(name, getattr(self, name), least)
        if self.prunings is not None:
            check_integer("prunings", self.prunings, 1)
        if self.initial_density == 0 or self.target_sparsity == 1:
            name = "initial_density" if self.initial_density == 0 else "target_sparsity"
            raise argument_error(name, getattr(self, name), "must leave some weights")
        if self.penalty is not None:
            # The callback knows its own rules; a bad setting must not wait for its turn in a long study.
            self._regularization()

    def _check_names(self) -> None:
        """Raise unless what is given is what the method needs and may have."""
        needed, optional, one_of = SETTINGS[self.method]
        chosen = []
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            given = value != field.default
            if given and field.name in one_of:
                chosen.append(field.name)
            elif given and field.name not in needed | optional:
                raise argument_error(field.name, value, f"must be left out with method={self.method!r}")
            elif not given and field.name in needed:
                raise argument_error(field.name, value, f"must be given with method={self.method!r}")
        if one_of and len(chosen) != 1:
            name, other = (*sorted(one_of), "")[:2]
            rule = f"must be given with method={self.method!r}" + (f", or else {other}" if other else "")
            if chosen:
                rule = f"must be left out beside {chosen[1]} with method={self.method!r}"
            raise argument_error(name, getattr(self, name), rule)

    @property
    def title(self) -> str:
        """What the study calls it: all settings but how far it goes."""
        if self.method in TITLES:
            numbers = {"cut": self.cut, "start": self.initial_density, "polish": self.polish}
            return ", ".join([TITLES[self.method], *(f"{name} {value:g}" for name, value in numbers.items() if value)])
        if self.method == "magnitude_pruning":
            return f"ModelPruning, {f'in {self.prunings} steps' if self.prunings else 'at epoch ends'}"
        words = [PENALTY_TITLES[self.penalty or ""]]
        if self.method == "coherent":
            words.append(f"{self.coherence}/{self.scope}")
            words += [f"≥ {self.threshold:g}"] if self.threshold is not None else []
        else:
            words.append(self.method)
        words.append((self.update or "").replace("_", " "))
        words += [self.strength_scale] if self.strength_scale != "uniform" else []
        numbers = {"averaging": self.averaging, "tolerance": self.tolerance}
        shares = {"delay": self.delay, "warm-up": self.warmup, "polish": self.polish}
        extras = [f"{name} {number:g}" for name, number in numbers.items() if number]
        extras += [f"{name} {100 * share:g}%" for name, share in shares.items() if share]
        extras += ["by target"] if self.target_sparsity is not None else []
        return ", ".join([" ".join(words), *extras])

    @property
    def extent(self) -> str:
        """How far it goes, for people; empty where a method has no such setting."""
        if self.strength is not None:
            return f"strength {self.strength:g}"
        if self.target_sparsity is not None:
            return f"to {100 * self.target_sparsity:g}% zeros"
        return f"to {self.compression:g}×" if self.compression is not None else ""

    @property
    def sparsity(self) -> float:
        """The sparsity that a pruning method goes to."""
        if self.target_sparsity is not None:
            return self.target_sparsity
        return 1 - 1 / (self.compression or 1.0)

    def check_optimizer(self, problem: Problem) -> None:
        """Raise unless the method works under the optimizer of the problem."""
        if self.method == "cautious_weight_decay" and problem.optimizer != "sgd":
            rule = f"must be 'sgd' with method={self.method!r}"
            raise argument_error("optimizer", problem.optimizer, rule, "Give this method `optimizers: sgd`.")

    def callbacks(self, module: nn.Module, epochs: int) -> list[Callback]:
        """Fresh callbacks for one training of so many epochs."""
        if self.method == "magnitude_pruning":
            return [gradual_pruning(module, self.sparsity, epochs, self.prunings)]
        if self.method == "spred":
            assert self.cut is not None
            return [Factors(module, self.cut)]
        if self.penalty is None:
            return []
        return [self._regularization(), KeepZeros()] if self.polish else [self._regularization()]

    def optimizer(self, module: nn.Module, problem: Problem, steps: int) -> torch.optim.Optimizer:
        """The optimizer of the problem, changed where the method is one of the optimizer."""
        self.check_optimizer(problem)
        strength = self.strength or 0.0
        if self.method == "cautious_weight_decay":
            return cautious_sgd(module, problem, strength)
        if self.method == "pat_top_k":
            return pat_top_k(module, problem, self.sparsity, healing_start=int(PRUNED_AFTER * steps))
        if self.method == "pat_lasso":
            return pat_lasso(module, problem, strength, int((1 - self.polish) * steps) if self.polish else None)
        if self.method == "spred":
            return spred_optimizer(module, problem, strength)
        if self.method == "linearized_bregman":
            return linearized_bregman(module, problem, strength, self.initial_density or 1.0)
        return base_optimizer(module.parameters(), problem)

    def _regularization(self) -> GradientCoherentRegularization:
        gate = None
        if self.method == "coherent":
            arguments = {name: getattr(self, name) for name in ("scope", "threshold", "tolerance", "averaging")}
            gate = Gate(self.coherence, **arguments)  # type: ignore[arg-type]
        schedule = Schedule(self.delay, self.warmup, 1.0 - self.polish if self.polish else None)
        names = ("strength", "target_sparsity", "update", "strength_scale")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        return GradientCoherentRegularization(self.penalty, gate=gate, schedule=schedule, **given)  # type: ignore[arg-type]
