"""Few cases that still cover every pair of values: most faults show in the interplay of two settings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairwise_cases(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Cases in which every two values of two factors that are allowed together meet at least once.

    A greedy search with a fixed seed: each case has a pair that is missing, and covers the most of 30 random ones.

    Example:
        >>> cases = pairwise_cases({"a": [1, 2, 3], "b": [1, 2], "c": [1, 2]})
        >>> len(cases) < 3 * 2 * 2, {(case["b"], case["c"]) for case in cases} == {(1, 1), (1, 2), (2, 1), (2, 2)}
        (True, True)
    """
    rng = random.Random(0)
    names = list(factors)
    ranges = [range(len(values)) for values in factors.values()]
    missing = {
        ((i, a), (j, b))
        for (i, one), (j, other) in itertools.combinations(enumerate(ranges), 2)
        for a, b in itertools.product(one, other)
    }
    cases = []
    while missing:
        wanted = min(missing)
        best: tuple[int, Case, set[Any]] = (0, {}, set())
        for _ in range(30):
            indices = [rng.choice(values) for values in ranges]
            for i, index in wanted:
                indices[i] = index
            case = {name: factors[name][index] for name, index in zip(names, indices, strict=True)}
            covered = missing.intersection(itertools.combinations(enumerate(indices), 2))
            if len(covered) > best[0] and allowed(case):
                best = (len(covered), case, covered)
        cases += [best[1]] if best[0] else []
        missing -= best[2] or {wanted}  # a pair that no case may have
    return cases
