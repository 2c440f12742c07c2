"""The regularized weights of a module, and what can be measured of them at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gcsr.core.coupled_penalty import CoupledGroupLasso
from lightning_gcsr.core.numerics import inner, wide
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.sharding import local_part, sharded_dims, sum_over_weights

__all__ = ["RegularizedWeights"]


class RegularizedWeights:
    """The parameters that a penalty is imposed on. Where they are sharded, every measure is one that adds up.

    Args:
        parameters: The parameters by name.
        penalty: The penalty.
        relative: What the strength is multiplied by for each of them.

    Raises:
        ValueError: If the penalty does not fit the shape of a parameter, or how it is sharded.
    """

    _call: str = "RegularizedWeights(parameters, penalty, relative)"
    """As which this could be typed in."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], penalty: Penalty, relative: Mapping[str, float]) -> None:
        self.penalty = penalty
        self.parameters: dict[str, nn.Parameter] = dict(parameters)
        """The regularized parameters by name."""
        # Measured and injected is λ·relative·r with one λ, so that a ramp or a strength of 0 leaves cos(g, r) alone.
        self._relative = dict(relative)
        self._check_parameters()
        self._initial_norms = self.weight_norms()

    def __repr__(self) -> str:
        return self._call

    def _check_parameters(self) -> None:
        if self.penalty.coupled:
            self._laid_out()
            return
        if self.penalty.elementwise:  # which fits every shape, however it is sharded
            return
        for name, parameter in self.parameters.items():
            self.penalty.value(local_part(parameter.detach()))  # a penalty that does not fit the shape says so
            if cut_ := [dim for dim in sharded_dims(parameter) if not self.penalty.splits_along(dim, parameter.dim())]:
                raise ValueError(
                    f"{self.penalty!r} does not fit {name!r}, which is sharded along dimension {cut_[0]}: what belongs"
                    " together lies on several processes. Shard along another dimension, use another penalty, or"
                    " `exclude` it."
                )

    def _laid_out(self) -> tuple[Penalty, Tensor]:
        """The penalty over coupled groups as one of a single tensor, and this tensor."""
        assert isinstance(self.penalty, CoupledGroupLasso)
        flat = torch.cat([wide(parameter.detach()).reshape(-1) for parameter in self.parameters.values()])
        return self.penalty.laid_out(self.parameters), flat

    def _apart(self, values: Tensor) -> Sequence[Tensor]:
        """Numbers for the weights that lie end to end, a tensor for each parameter."""
        return torch.split(values, [parameter.numel() for parameter in self.parameters.values()])

    def zero_groups(self) -> dict[str, Tensor]:
        """Of coupled groups, by name of a parameter the mask of its entries that belong to groups that are zero."""
        penalty, weight = self._laid_out()
        masks = self._apart(penalty.whole_units(weight == 0))
        return {name: mask.view_as(self.parameters[name]) for name, mask in zip(self.parameters, masks, strict=True)}

    def penalty_value(self) -> Tensor:
        """The penalty Σ Ω(w) over all regularized parameters that are trained, as they are now; a 0-dim tensor.

        Where parameters are sharded, all processes must call this: it adds up.
        """
        if self.penalty.coupled:
            penalty, weight = self._laid_out()
            return penalty.value(weight)
        return sum_over_weights(self.trained, self.penalty.value).sum()

    def sparsity(self) -> float:
        """The fraction of exact zeros in the regularized weights that are trained; of coupled groups, of zero groups.

        Frozen weights never become zero, so they do not count. Synchronizes with the host. Where parameters are
        sharded, all processes must call this: it adds up.
        """
        if self.penalty.coupled:
            penalty, weight = self._laid_out()
            return float(penalty.units(weight == 0).float().mean())
        trained = self.trained
        zeros = sum_over_weights(trained, lambda weight: (weight == 0).sum())
        return float(zeros.sum()) / max(1, sum(parameter.numel() for parameter in trained.values()))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The regularized parameters that are not frozen, by name."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def weight_norms(self) -> dict[str, float]:
        """The Euclidean norm of each regularized parameter by name. Synchronizes with the host once.

        Where parameters are sharded, all processes must call this: it adds up.
        """
        squares = sum_over_weights(self.parameters, lambda weight: inner(weight, weight))
        return dict(zip(self.parameters, squares.sqrt().tolist(), strict=True))

    def spans(self) -> dict[str, float]:
        """How far the penalty must carry each parameter to zero: ⟨w,w⟩/⟨w,r⟩ by name. Synchronizes with the host once.

        It is the proximal step size at which a straight line along the penalty's gradient has used up the norm of the
        weights; infinite where the penalty does not pull, 0 for weights that are zero. For L1 it is about the largest
        of the usual magnitudes. Where parameters are sharded, all processes must call this: it adds up.
        """
        squares = sum_over_weights(self.parameters, lambda weight: inner(weight, weight))
        if self.penalty.coupled:
            penalty, weight = self._laid_out()
            parts = self._apart(weight * penalty.gradient(weight))
            pulls = torch.stack([part.sum(dtype=squares.dtype) for part in parts])
        else:
            pulls = sum_over_weights(self.parameters, lambda weight: inner(weight, self.penalty.gradient(weight)))
        spans = torch.where(squares > 0, squares / (pulls * pulls.new_tensor(list(self._relative.values()))), 0)
        return dict(zip(self.parameters, spans.tolist(), strict=True))

    def collapsed(self, fraction: float = 1e-6) -> dict[str, tuple[float, float]]:
        """The parameters that have collapsed, each with its norm now and at the start.

        A parameter has collapsed when its norm is below this fraction of the norm with which the regularizer met it.
        Norms are those of :meth:`weight_norms`.
        """
        return {
            name: (norm, self._initial_norms[name])
            for name, norm in self.weight_norms().items()
            if norm < fraction * self._initial_norms.get(name, 0.0)
        }
