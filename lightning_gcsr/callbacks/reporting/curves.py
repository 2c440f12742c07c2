"""Sparsity and validation metrics over the steps of a training, kept in bounded memory and drawn on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from lightning_gcsr.callbacks.reporting.drawing import new_figure
from lightning_gcsr.callbacks.reporting.history import History
from lightning_gcsr.validation import argument_error, near_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curves"]


class Curves:
    """The sparsity at the steps that were logged, and the metrics at the validations; 256 of each at most."""

    def __init__(self) -> None:
        self.sparsity, self.metrics = History(), History()

    def plot(self, metric: Optional[str], what: str) -> Figure:
        """The metric above, the sparsity below, both over the optimizer steps.

        Args:
            metric: The metric; by default one with "acc" in its name, else one that begins with "val", else none.
            what: The method that messages name.
        """
        if not self.sparsity.steps:
            raise ValueError(f"`{what}` has nothing to draw: no step was logged yet. Call it after `fit`.")
        known = sorted(self.metrics.names)
        if metric is not None and metric not in known:
            rule = f"must be one of the metrics at validations, {', '.join(map(repr, known)) or 'which are none'}"
            advice = f"Did you mean {near_names(metric, known, 1)[0]!r}?" if known else "Log one in `validation_step`."
            raise argument_error("metric", metric, rule, advice)
        usual = sorted(known, key=lambda name: "acc" not in name.lower())
        metric = metric or next((name for name in usual if "acc" in name.lower() or name.startswith("val")), None)
        figure = new_figure(what, 7, 5.5 if metric else 3.2)
        panels = figure.subplots(2 if metric else 1, 1, sharex=True, squeeze=False).flat
        if metric:
            values = self.metrics.table()[self.metrics.names.index(metric)].tolist()
            panels[0].plot(self.metrics.steps, values, color="tab:blue", marker=".")
            panels[0].set(ylabel=metric)
        zeros = 100 * self.sparsity.table()[0]
        panels[-1].plot(self.sparsity.steps, zeros.tolist(), color="tab:red")
        panels[-1].set(xlabel="optimizer step", ylabel="sparsity in %", ylim=(-3, 103))
        return figure

    def state_dict(self) -> dict[str, Any]:
        """The histories."""
        return {"plot/sparsity": self.sparsity.state_dict(), "plot/metrics": self.metrics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken; a state without these histories leaves none."""
        self.sparsity, self.metrics = History(), History()
        for key, history in (("plot/sparsity", self.sparsity), ("plot/metrics", self.metrics)):
            if key in state:
                history.load_state_dict(state[key])
