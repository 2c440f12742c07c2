"""The one form of our argument errors, and the checks that several modules share."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

__all__ = [
    "argument_error",
    "call_repr",
    "check_choice",
    "check_finite_number",
    "check_integer",
    "did_you_mean",
    "listed",
    "moved_arguments",
    "near_names",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def argument_error(
    name: str, value: object, rule: str, advice: str = "", kind: type[Exception] = ValueError
) -> Exception:
    """An exception that names the argument, the rule, the value and the way out.

    Example:
        >>> argument_error("delay_steps", -1, "must be at least 0", "Use 0 for no delay.")
        ValueError('`delay_steps` must be at least 0, got delay_steps=-1. Use 0 for no delay.')
    """
    return kind(f"`{name}` {rule}, got {name}={value!r}. {advice}".rstrip())


def call_repr(name: str, function: Callable[..., Any], arguments: Mapping[str, object]) -> str:
    """The call of a function with these arguments, as it could be typed in; without those that are the defaults.

    An argument without a default, such as the module of a regularizer, stands under its name.

    Example:
        >>> call_repr("f", lambda module, rate=1.0, *, up=False, count=0: 0, {"rate": 2.5, "up": False, "count": 3})
        'f(module, 2.5, count=3)'
    """
    parts = []
    by_name = False
    for argument, parameter in inspect.signature(function).parameters.items():
        by_name |= parameter.kind is parameter.KEYWORD_ONLY
        if parameter.default is parameter.empty:
            parts.append(argument)
        elif repr(arguments[argument]) != repr(parameter.default):
            parts.append(f"{argument}={arguments[argument]!r}" if by_name else repr(arguments[argument]))
        else:
            by_name = True
    return f"{name}({', '.join(parts)})"


def near_names(wanted: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like the wanted one, best first; the first few known ones where none is like it.

    Example:
        >>> near_names("layer1.wieght", ["layer1.weight", "layer1.bias", "head.weight"], count=1)
        ['layer1.weight']
    """
    known = list(known)
    return difflib.get_close_matches(wanted, known, n=count, cutoff=0.3) or known[:count]


def did_you_mean(wanted: object, known: Iterable[str]) -> str:
    """A closing sentence with the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(str(wanted), list(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else ""


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_choice(name: str, value: object, choices: Iterable[Any]) -> None:
    """Raise a ``ValueError`` with the near name unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        rule = f"must be one of {', '.join(map(repr, choices))}"
        raise argument_error(name, value, rule, did_you_mean(value, [c for c in choices if isinstance(c, str)]))


def check_finite_number(
    name: str, value: object, minimum: float = -math.inf, maximum: float = math.inf, advice: str = ""
) -> None:
    """Raise unless ``value`` is a finite real number in [minimum, maximum]: TypeError for its type, else ValueError."""
    bounds = {
        (False, False): "a finite number",
        (True, False): f"a finite number of at least {minimum:g}",
        (False, True): f"a finite number of at most {maximum:g}",
        (True, True): f"a number in [{minimum:g}, {maximum:g}]",
    }[minimum > -math.inf, maximum < math.inf]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise argument_error(name, value, f"must be {bounds}", advice, TypeError)
    if not math.isfinite(value) or not minimum <= float(value) <= maximum:
        raise argument_error(name, value, f"must be {bounds}", advice)


def check_integer(name: str, value: object, minimum: int | None = None, advice: str = "") -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``: TypeError for its type, else ValueError."""
    bounds = "an integer" if minimum is None else f"an integer of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise argument_error(name, value, f"must be {bounds}", advice, TypeError)
    if minimum is not None and value < minimum:
        raise argument_error(name, value, f"must be {bounds}", advice)


def moved_arguments(moves: Mapping[str, str]) -> Callable[[Function], Function]:
    """A decorator for functions whose arguments moved: an old name gets a ``TypeError`` that says where it went.

    Args:
        moves: What to write now, by the old name of an argument; ``{}`` in it stands for the value.

    Example:
        >>> @moved_arguments({"delay_steps": "schedule=Schedule(delay={})"})
        ... def train(schedule=None):
        ...     pass
        >>> train(delay_steps=5)
        Traceback (most recent call last):
        ...
        TypeError: `delay_steps` is no longer an argument of train. Write schedule=Schedule(delay=5).
    """

    def decorate(function: Function) -> Function:
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            old = [argument for argument in kwargs if argument in moves]
            if old:
                listed = " and ".join(f"`{argument}`" for argument in old)
                verb = "is no longer an argument" if len(old) == 1 else "are no longer arguments"
                new = " and ".join(moves[argument].format(repr(kwargs[argument])) for argument in old)
                raise TypeError(f"{listed} {verb} of {name}. Write {new}.")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
