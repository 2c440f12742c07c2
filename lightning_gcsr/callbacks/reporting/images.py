"""What the monitor shows as images: heat maps of the layers over the steps, and histograms of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Protocol, runtime_checkable

from torch import Tensor

from lightning_gcsr._lightning import Trainer, trainer_callbacks
from lightning_gcsr.callbacks.reporting.history import History
from lightning_gcsr.callbacks.reporting.loggers import log_image, takes_images

__all__ = ["Injecting", "LayerImages"]

LARGEST_MAP, LARGEST_HISTOGRAMS = 40, 12


@runtime_checkable
class Injecting(Protocol):
    """A callback that says how much of each parameter got its penalty."""

    name: str
    injected_by_parameter: Optional[tuple[int, dict[str, float]]]
    """The last step that was logged, and the shares."""


class LayerImages:
    """Keeps the sparsity and the injected share of each layer over the logged steps, and draws them on demand."""

    def __init__(self) -> None:
        self._histories: dict[str, History] = {}
        self._drawn: object = None

    def record(self, trainer: Trainer, step: int, sparsity: Mapping[str, float]) -> None:
        """Add what was measured at a step that is logged."""
        self._histories.setdefault("sparsity", History()).record(step, sparsity)
        self._record_injected(trainer)

    def _record_injected(self, trainer: Trainer) -> None:
        """The shares carry their own step: a callback after the monitor has those of the last logged step only."""
        for callback in trainer_callbacks(trainer):
            if isinstance(callback, Injecting) and callback.injected_by_parameter is not None:
                history = self._histories.setdefault(f"{callback.name}/injected", History())
                step, shares = callback.injected_by_parameter
                if step not in history.steps[-1:]:
                    history.record(step, shares)

    def draw(self, trainer: Trainer, step: int, weights: Mapping[str, Tensor]) -> None:
        """Send the images to the loggers that take any, once for the same state of things.

        Where weights are sharded over processes, all of them must call this.
        """
        self._record_injected(trainer)
        state = (step, [history.steps[-1:] for history in self._histories.values()])
        if state == self._drawn or not any(map(takes_images, trainer.loggers)):
            return
        self._drawn = state
        from lightning_gcsr.callbacks.reporting.figures import heat_map, magnitudes, pixels, weight_histograms

        counts = magnitudes({name: weights[name] for name in _largest(weights, list(weights), LARGEST_HISTOGRAMS)})
        if not trainer.is_global_zero:
            return
        for key, history in self._histories.items():
            table = history.table()
            names = _largest(weights, history.names, LARGEST_MAP)
            rows = [i for i, name in enumerate(history.names) if name in names]
            zeros = key == "sparsity"
            title = "Sparsity" if zeros else f"Share of weights that got the penalty, {callback_of(key)}"
            figure = heat_map(names, history.steps, table[rows], title + _of(names, history.names), mark_full=zeros)
            log_image(trainer, f"layers/{key}", pixels(figure), step)
        figure = weight_histograms(counts, f"Weights after step {step}" + _of(list(counts), list(weights)))
        log_image(trainer, "layers/weights", pixels(figure), step)

    def state_dict(self) -> dict[str, Any]:
        """The histories."""
        return {key: history.state_dict() for key, history in self._histories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self._histories = {key: History() for key in state}
        for key, history in self._histories.items():
            history.load_state_dict(state[key])


def callback_of(key: str) -> str:
    """The name of the callback in the key of its history."""
    return key.rpartition("/")[0]


def _largest(weights: Mapping[str, Tensor], names: Sequence[str], count: int) -> list[str]:
    """The names of the largest tensors, in their order."""
    sizes = {name: weights[name].numel() if name in weights else 0 for name in names}
    kept = set(sorted(names, key=lambda name: -sizes[name])[:count])
    return [name for name in names if name in kept]


def _of(shown: Sequence[str], names: Sequence[str]) -> str:
    return f" (the largest {len(shown)} of {len(names)} layers)" if len(shown) < len(names) else ""
