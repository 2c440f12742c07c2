"""Few cases that still cover every pair of values: most faults show in the interplay of two settings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairwise_cases(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Cases in which every two values of two factors that are allowed together meet at least once.

    A greedy search with a fixed seed: each case is the one of many random candidates that covers the most new pairs.

    Example:
        >>> cases = pairwise_cases({"a": [1, 2, 3], "b": [1, 2], "c": [1, 2]})
        >>> len(cases) < 3 * 2 * 2, {(case["b"], case["c"]) for case in cases} == {(1, 1), (1, 2), (2, 1), (2, 2)}
        (True, True)
    """
    rng = random.Random(0)
    names = list(factors)
    candidates = []
    for indices in itertools.product(*(range(len(values)) for values in factors.values())):
        case = {name: factors[name][index] for name, index in zip(names, indices, strict=True)}
        if allowed(case):
            candidates.append((indices, case))
    pairs = [set(itertools.combinations(enumerate(indices), 2)) for indices, _ in candidates]
    missing = set().union(*pairs)
    cases = []
    while missing:
        wanted = min(missing)
        trials = [i for i in rng.sample(range(len(candidates)), min(300, len(candidates))) if wanted in pairs[i]]
        trials = trials or [i for i in range(len(candidates)) if wanted in pairs[i]]
        best = max(trials, key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        cases.append(candidates[best][1])
    return cases
