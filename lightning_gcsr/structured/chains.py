"""Chains of layers: between which two weighted layers whole units can go, and what takes their place.

A *unit* is an output of a ``Linear`` or an output channel of a convolution. It can go from between two layers, at the
same outputs in eval mode, in two cases. Its value is known without an input: its weights are zero, so it is its bias,
and what norm, activation and pooling make of that; the next layer's bias takes it up. Or nothing reads it: the next
layer's weights for it are zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional, Union

from torch import Tensor, nn
from torch.nn.modules import conv

__all__ = ["Link", "Obstacles", "Weighted", "is_chain", "links", "members"]

# By the number of dimensions that a unit has positions in.
_WEIGHTED: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
NORMS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_AVERAGES: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
MAXIMA: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
ADAPTIVE: dict[type[nn.Module], int] = {
    getattr(nn, f"Adaptive{kind}Pool{dims}d"): dims for kind in ("Avg", "Max") for dims in (1, 2, 3)
}
POOLS = _AVERAGES | MAXIMA | ADAPTIVE
_NOTHING = {
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
}
ACTIVATIONS = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Threshold),
}
_FOLLOWED = {*_WEIGHTED, *NORMS, *POOLS, *_NOTHING, *ACTIVATIONS, nn.PReLU, nn.Flatten}

Weighted = Union[nn.Linear, conv._ConvNd]
Named = tuple[str, nn.Module]


def is_chain(module: nn.Module) -> bool:
    """Whether the module does nothing but call its children one after the other."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def members(chain: nn.Module, prefix: str = "") -> Iterator[Named]:
    """The layers of a chain with their names, those of chains within it among them."""
    for name, child in chain._modules.items():
        if child is None:
            continue
        if is_chain(child) and not _has_hooks(child):
            yield from members(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class Obstacles:
    """Why a layer of a module cannot be followed; of the whole module, for layers may share their weights."""

    def __init__(self, root: nn.Module) -> None:
        self.uses = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
        self.sharers = Counter(
            address
            for _, parameter in root.named_parameters(remove_duplicate=False)
            if (address := parameter.untyped_storage().data_ptr())
        )

    def of(self, layer: nn.Module) -> Optional[str]:
        """The reason, or ``None``."""
        parameters: list[Tensor] = [*layer.parameters(recurse=False)]
        if hasattr(layer, "parametrizations"):
            return "it is parametrized"
        if _has_hooks(layer):
            return "it has hooks"
        if "forward" in vars(layer) or type(layer) not in _FOLLOWED:
            return f"{type(layer).__name__} is not a layer that is followed"
        if self.uses[id(layer)] > 1 and (parameters or [*layer.buffers(recurse=False)]):
            return "it is used more than once"
        if any(self.sharers[parameter.untyped_storage().data_ptr()] > 1 for parameter in parameters):
            return "its weights are tied to others"
        if any(type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor for parameter in parameters):
            return "its weights are not plain tensors"
        if isinstance(layer, conv._ConvNd) and layer.groups > 1:
            return f"it has {layer.groups} groups"
        if type(layer) in NORMS and layer.running_mean is None:
            return "it has no running statistics"
        if getattr(layer, "return_indices", False):
            return "it returns indices, too"
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
            return "it does not flatten all dimensions but the first"
        return None


def links(chain: Sequence[Named], obstacles: Obstacles, left_alone: dict[str, str]) -> list[Link]:
    """The pairs of weighted layers between which units can go; what stands in between is named in ``left_alone``."""
    found: list[Link] = []
    weighted = [i for i, (_, layer) in enumerate(chain) if any(True for _ in layer.parameters())]
    producer: Optional[Named] = None
    between: list[Named] = []
    for i, (name, layer) in enumerate(chain):
        if reason := obstacles.of(layer):
            if weighted and (i in weighted or weighted[0] < i < weighted[-1]):
                left_alone[name] = reason
            producer, between = None, []
        elif type(layer) not in _WEIGHTED:
            between.append((name, layer))
        else:
            if producer is not None:
                link = Link(*producer, between, name, layer)  # type: ignore[arg-type]  # both are weighted
                if problem := link.problem():
                    left_alone[problem[0]] = problem[1]
                else:
                    found.append(link)
            producer, between = (name, layer), []
    return found


@dataclass
class Link:
    """Two weighted layers and what lies between; the units of the first are what the second reads."""

    producer_name: str
    producer: Weighted
    between: list[Named]
    consumer_name: str
    consumer: Weighted

    @property
    def features(self) -> int:
        """How many inputs of the consumer come from one unit: more than one where channels were flattened."""
        return self.consumer.weight.shape[1] // self.producer.weight.shape[0]

    def problem(self) -> Optional[tuple[str, str]]:
        """The layer at which the units are lost sight of, and why."""
        units, inputs = self.producer.weight.shape[0], self.consumer.weight.shape[1]
        dims = _WEIGHTED[type(self.producer)]
        flat = dims == 0
        whose = f"the units of {self.producer_name!r}"
        for name, layer in self.between:
            kind = type(layer)
            width = inputs if flat else units
            if kind is nn.Flatten:
                flat = True
            elif kind in POOLS and (flat or POOLS[kind] != dims):
                return name, f"it does not pool over positions of {whose}"
            elif kind in NORMS and (layer.num_features != width or NORMS[kind] != (1 if flat else dims)):
                return name, f"it does not normalize {whose} one by one"
            elif kind is nn.PReLU and layer.num_parameters not in (1, width):
                return name, f"its slopes are not those of {whose}"
        if _WEIGHTED[type(self.consumer)] != (0 if flat else dims):
            return self.consumer_name, f"it reads along another dimension than that of {whose}"
        if not units or inputs % units or (inputs != units and not (flat and dims)):
            return self.consumer_name, f"it does not read {whose} one by one"
        return None
