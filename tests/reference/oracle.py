"""The method spelled out in float64 with plain loops: penalties, proximal maps, coherence, and one regularized step.

A penalty is written as a tuple: ``("l1",)``, ``("l2",)``, ``("elastic_net", a)`` or ``("group_lasso", dim)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Spec = tuple


def _groups(weight: Tensor, dim: int) -> list[Tensor]:
    return [weight.select(dim, i).reshape(-1) for i in range(weight.shape[dim])]


def penalty_value(spec: Spec, weight: Tensor) -> Tensor:
    """Ω(w), differentiable; groups that are zero are left out, since their norm has no gradient."""
    weight = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    l1, l2 = weight.abs().sum(), (weight.abs() ** 2).sum() / 2
    if spec[0] == "l1":
        return l1
    if spec[0] == "l2":
        return l2
    if spec[0] == "elastic_net":
        return spec[1] * l1 + (1 - spec[1]) * l2
    total = torch.zeros((), dtype=torch.float64)
    for group in _groups(weight, spec[1]):
        if bool((group.detach() != 0).any()):
            total = total + math.sqrt(group.numel()) * (group.abs() ** 2).sum().sqrt()
    return total


def penalty_gradient(spec: Spec, weight: Tensor) -> Tensor:
    """The gradient of the value, by autograd, in float64."""
    leaf = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64).clone().requires_grad_()
    value = penalty_value(spec, leaf)
    if not value.requires_grad:  # nothing but zero groups
        return torch.zeros_like(leaf.detach())
    [gradient] = torch.autograd.grad(value, leaf)
    return gradient


def golden_section(function: Callable[[float], float], low: float, high: float, steps: int = 100) -> float:
    """Where a convex function of one number is least."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(steps):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) <= function(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def group_mean(spec: Spec, values: Tensor) -> Tensor:
    """Each number replaced by the mean over its group; as it is for penalties of single weights."""
    if spec[0] != "group_lasso":
        return values
    result = values.clone()
    for i, group in enumerate(_groups(values, spec[1])):
        result.select(spec[1], i).fill_(math.fsum(group.tolist()) / group.numel())
    return result


def numeric_prox(spec: Spec, weight: Tensor, step: float) -> Tensor:
    """Arg min ½‖v − w‖² + step·Ω(v), found by search: weight by weight, for groups along the line through w and 0."""
    weight = weight.to(torch.float64)
    if spec[0] == "group_lasso":
        result = torch.zeros_like(weight)
        for i, group in enumerate(_groups(weight, spec[1])):
            root, norm = math.sqrt(group.numel()), float((group**2).sum().sqrt())

            def along(t: float, root: float = root, norm: float = norm) -> float:
                return (t - 1) ** 2 * norm**2 / 2 + step * root * abs(t) * norm

            result.select(spec[1], i).copy_(weight.select(spec[1], i) * golden_section(along, -0.5, 1.5))
        return result

    flat = []
    for w in weight.reshape(-1).tolist():

        def alone(v: float, w: float = w) -> float:
            a = {"l1": 1.0, "l2": 0.0}[spec[0]] if len(spec) == 1 else spec[1]
            return (v - w) ** 2 / 2 + step * (a * abs(v) + (1 - a) * v * v / 2)

        flat.append(golden_section(alone, -abs(w) - 1, abs(w) + 1))
    return torch.tensor(flat, dtype=torch.float64).reshape(weight.shape)


def prox(spec: Spec, weight: Tensor, step: float | Tensor) -> Tensor:
    """The same by its formula, number by number, exact to float64 (``numeric_prox`` is exact to about 1e-7).

    With a step for each weight, a weight is what it would be if all of the tensor had its step.
    """
    weight = weight.to(torch.float64)
    steps = torch.as_tensor(step, dtype=torch.float64).expand(weight.shape)
    if spec[0] == "group_lasso":
        result = torch.zeros_like(weight)
        for i, group in enumerate(_groups(weight, spec[1])):
            norm = math.sqrt(math.fsum(w * w for w in group.tolist()))
            flat = []
            for w, s in zip(group.tolist(), steps.select(spec[1], i).reshape(-1).tolist(), strict=True):
                limit = s * math.sqrt(group.numel())
                flat.append(w * (1 - limit / norm) if norm > limit else 0.0)
            target = result.select(spec[1], i)
            target.copy_(torch.tensor(flat, dtype=torch.float64).reshape(target.shape))
        return result
    a = {"l1": 1.0, "l2": 0.0}[spec[0]] if len(spec) == 1 else spec[1]
    flat = []
    for w, s in zip(weight.reshape(-1).tolist(), steps.reshape(-1).tolist(), strict=True):
        size = abs(w) - s * a
        flat.append(math.copysign(size, w) / (1 + s * (1 - a)) if size > 0 else 0.0)
    return torch.tensor(flat, dtype=torch.float64).reshape(weight.shape)


def flatten(tensors: Sequence[Tensor]) -> np.ndarray:
    """All numbers of all tensors as one float64 vector; complex ones as pairs."""
    parts = []
    for tensor in tensors:
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        parts.append(tensor.detach().to(torch.float64).reshape(-1).numpy())
    return np.concatenate(parts)


def coherence(left: np.ndarray, right: np.ndarray) -> float:
    """The cosine of two flat vectors; 0 if one of them is zero."""
    with np.errstate(invalid="ignore"):  # of gradients that are not finite
        return _cosine(left, right)


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    norms = math.sqrt(math.fsum(left * left)) * math.sqrt(math.fsum(right * right))
    if norms == 0:
        return 0.0
    return min(1.0, max(-1.0, math.fsum(left * right) / norms))


def same_sign(a: float, b: float) -> bool:
    """Whether two numbers do not pull in opposite directions."""
    return not ((a > 0 and b < 0) or (a < 0 and b > 0))


def average(gradients: Sequence[Tensor], decay: float) -> Tensor:
    """The average of all gradients so far, oldest first; one of age k has the weight decayᵏ over the sum of these."""
    weights = [decay ** (len(gradients) - 1 - i) for i in range(len(gradients))]
    total = torch.zeros_like(gradients[0], dtype=torch.float64)
    for weight, gradient in zip(weights, gradients, strict=True):
        total = total + weight / math.fsum(weights) * gradient.to(torch.float64)
    return total


def root_mean_square(gradients: Sequence[Tensor], decay: float | None) -> float:
    """The root of the running mean of a tensor's mean squared gradients, oldest first; of their sum without a decay.

    It is what Adam (β₂), RMSprop (α) and Adagrad (no decay) divide a gradient by, as one number for a tensor.
    """
    squares = [math.fsum(g * g for g in gradient.reshape(-1).tolist()) / gradient.numel() for gradient in gradients]
    weights = [1.0 if decay is None else decay ** (len(squares) - 1 - i) for i in range(len(squares))]
    total = math.fsum(weight * square for weight, square in zip(weights, squares, strict=True))
    return math.sqrt(total if decay is None else total / math.fsum(weights))


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.to(torch.float64)


@dataclass
class Step:
    """What a step decided: everything per tensor, and the coherence of all of them."""

    gates: list[Tensor]
    penalty_gradients: list[Tensor]
    gradients: list[Tensor]
    coherence: float
    coherence_by_parameter: list[float]

    @property
    def injected(self) -> float:
        """The share of all weights whose gate is open."""
        return sum(int(gate.sum()) for gate in self.gates) / sum(gate.numel() for gate in self.gates)


def regularized_step(
    spec: Spec,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    previous: Sequence[Tensor | None],
    strengths: Sequence[float],
    measure: str | None,
    scope: str,
    threshold: float,
    tolerance: float = 0.0,
    averages: Sequence[Tensor] | None = None,
    factor: float = 1.0,
) -> Step:
    """Measure and decide: the gates, and the gradients with the penalty where the gates are open.

    The strengths are multiplied by the factor of the schedule; agreement with the penalty is measured without it.
    With ``averages``, coherence is that of these; whether a step is finite is told from its own gradients. A tensor
    without predecessor has ``None`` among the previous gradients.
    """
    gradients = [gradient.detach().to(torch.float64) for gradient in gradients]
    measured = gradients if averages is None else [average.detach().to(torch.float64) for average in averages]
    penalties = [penalty_gradient(spec, weight) for weight in weights]
    companions = []
    for i, (gradient, penalty, strength) in enumerate(zip(measured, penalties, strengths, strict=True)):
        if measure == "direction":
            companions.append(gradient + factor * strength * penalty)
        elif measure == "temporal":
            companions.append(_or_zeros(previous[i], gradient))
        else:
            companions.append(strength * penalty)
    together = coherence(flatten(measured), flatten(companions))
    apart = [coherence(flatten([g]), flatten([c])) for g, c in zip(measured, companions, strict=True)]

    all_finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    gates = []
    for i, (gradient, companion, penalty, strength, cosine) in enumerate(
        zip(measured, companions, penalties, strengths, apart, strict=True)
    ):
        known = previous if scope == "model" else [previous[i]]
        first = measure == "temporal" and all(gradient is None for gradient in known)
        if not all_finite or first or factor * max(strengths) == 0:
            gate = torch.zeros(gradient.shape, dtype=torch.bool)
        elif measure is None:
            gate = torch.ones(gradient.shape, dtype=torch.bool)
        elif scope == "model":
            gate = torch.full(gradient.shape, together >= threshold)
        elif scope == "parameter":
            gate = torch.full(gradient.shape, cosine >= threshold)
        else:
            eased = gradient + tolerance * factor * strength * penalty
            pairs = zip(eased.reshape(-1).tolist(), companion.reshape(-1).tolist(), strict=True)
            gate = torch.tensor([same_sign(a, b) for a, b in pairs]).reshape(gradient.shape)
        gates.append(gate)
    regularized = [
        torch.where(gate, gradient + factor * strength * penalty, gradient)
        for gate, gradient, strength, penalty in zip(gates, gradients, strengths, penalties, strict=True)
    ]
    return Step(gates, penalties, regularized, together, apart)
