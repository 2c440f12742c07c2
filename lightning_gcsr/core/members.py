"""The regularized parameters that take part in a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_gcsr.core.sharding import is_sharded, local_part

__all__ = ["Member"]


class Member:
    """One regularized parameter that takes part in a step.

    Args:
        name: Its name in the module.
        parameter: The parameter.
        group: Its parameter group in the optimizer.
        relative: What the strength is multiplied by for this parameter.
    """

    def __init__(self, name: str, parameter: nn.Parameter, group: dict[str, Any], relative: float) -> None:
        self.name, self.parameter, self.group, self.relative = name, parameter, group, relative
        self.sharded = is_sharded(parameter)
        """Whether it is spread over processes."""

    @property
    def weight(self) -> Tensor:
        """What this process holds of the parameter, to be used without autograd."""
        return local_part(self.parameter) if self.sharded else self.parameter

    @property
    def gradient(self) -> Tensor:
        """What this process holds of the gradient; of a sparse one the values of the touched rows."""
        gradient = self.parameter.grad
        assert gradient is not None
        if self.sharded:
            return local_part(gradient)
        return gradient.values() if gradient.is_sparse else gradient

    @property
    def rows(self) -> Tensor | None:
        """The rows that a sparse gradient touches; ``None`` for a dense one."""
        gradient = self.parameter.grad
        return gradient.indices()[0] if gradient is not None and gradient.is_sparse else None

    @property
    def size(self) -> int:
        """The number of weights that take part, over all processes."""
        return self.parameter.numel() if self.rows is None else self.gradient.numel()
