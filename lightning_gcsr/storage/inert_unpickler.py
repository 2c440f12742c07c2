"""Reading the tensors of a pickle that also holds objects, without executing anything for these objects.

``torch.load(weights_only=True)`` refuses a whole checkpoint for one object among its hyperparameters. Here tensors,
numbers, strings and containers are read as usual, and an :class:`Inert` stands where anything else would be.
"""

from __future__ import annotations

import collections
import os
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from typing_extensions import override

__all__ = ["Inert", "load_inert"]

_CALLABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): torch._utils._rebuild_tensor_v3,
}
"""All that a pickle can have called: what torch rebuilds a plain tensor with."""
_NAMED: dict[tuple[str, str], Any] = {
    **_CALLABLE,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
}
"""All that a pickle can name."""


class Inert:
    """Stands for an object, a class or a function that was not loaded. It takes everything and does nothing."""

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Ignore it; so do the next ones."""

    def extend(self, values: object) -> None:
        """See :meth:`append`."""

    def add(self, value: object) -> None:
        """See :meth:`append`."""


class _InertUnpickler(pickle._Unpickler):  # the one in Python, whose steps can change
    """An unpickler that knows and calls nothing else, and sets no attributes."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    @override
    def find_class(self, module: str, name: str) -> Any:
        return _NAMED.get((module, name), Inert)

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        known = any(function is callable_ for callable_ in _CALLABLE.values())
        self.stack[-1] = function(*arguments) if known else Inert()

    def _make(self) -> None:
        self.stack.pop()
        self.stack[-1] = Inert()

    def _make_with_keywords(self) -> None:
        self.stack.pop()
        self._make()

    def _make_from_mark(self) -> None:
        self.pop_mark()
        self.stack.append(Inert())

    def _make_by_name(self) -> None:
        self.readline(), self.readline()
        self._make_from_mark()

    def _set_state(self) -> None:
        self.stack.pop()  # which could otherwise go into a class or a function

    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _make
    dispatch[pickle.NEWOBJ_EX[0]] = _make_with_keywords
    dispatch[pickle.OBJ[0]] = _make_from_mark
    dispatch[pickle.INST[0]] = _make_by_name
    dispatch[pickle.BUILD[0]] = _set_state


def load_inert(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote into a zip file, with an :class:`Inert` for each object; tensors are on the CPU.

    Raises:
        Exception: Of any type, if the file is damaged.
    """
    module = types.SimpleNamespace(Unpickler=_InertUnpickler, load=pickle.load, __name__="inert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch on its own types
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=module)
