"""TensorBoard's Custom Scalars dashboard: our callbacks' numbers in one layout, grouped by the question they answer."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_gcsr._lightning import LightningModule, Trainer, trainer_callbacks, trainer_loggers

__all__ = ["QUESTIONS", "Charted", "Charts", "layout_of", "run_holds", "write_layout"]

Charts = Mapping[str, Mapping[str, Sequence[str]]]
"""For each question, by its short name, the charts: their titles, and regular expressions on the keys they show."""

QUESTIONS = {
    "sparsity": "How sparse is the model, and how good?",
    "gate": "Is the gate open?",
    "layers": "Which layers collapse?",
    "strength": "Should the strength be raised?",
}
"""The groups of the layout in their order."""
_OF_THE_MODULE = "(?!.*/(parameter|injected|coherence)/).*([Aa]cc|[Ll]oss).*"
"""What the module logs of its accuracy and its loss, by the names; not ours, which end with names of layers.

The expression is the same in all runs: TensorBoard draws a chart for each layout that differs."""


@runtime_checkable
class Charted(Protocol):
    """A callback that says which of its keys belong together."""

    def tensorboard_charts(self, module: LightningModule) -> Charts:
        """Its part of the layout."""


def layout_of(callbacks: Sequence[Any], module: LightningModule, prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """What ``SummaryWriter.add_custom_scalars`` takes, of all callbacks that have charts.

    Args:
        callbacks: Callbacks of any kind; those without charts are passed over.
        module: The module that is trained.
        prefix: What the logger puts before every key.

    Raises:
        KeyError: If a callback has charts under a question that is not one of ``QUESTIONS``.
    """
    parts = [callback.tensorboard_charts(module) for callback in callbacks if isinstance(callback, Charted)]
    parts.insert(0, {"sparsity": {"accuracy and loss": [_OF_THE_MODULE]} | _monitored(callbacks, parts)})
    layout: dict[str, dict[str, list[Any]]] = {title: {} for title in QUESTIONS.values()}
    for part in parts:
        for question, charts in part.items():
            layout[QUESTIONS[question]] |= {
                # TensorBoard looks for the expression at the start of the keys only, so the end has to be tied down.
                chart: ["Multiline", [f"{re.escape(prefix)}{key}$" for key in keys]]
                for chart, keys in charts.items()
            }
    return {title: charts for title, charts in layout.items() if charts}


def _monitored(callbacks: Sequence[Any], parts: Sequence[Charts]) -> dict[str, Sequence[str]]:
    """What checkpoints and early stopping go by; not what is shown anyway."""
    ours = [key for part in parts for charts in part.values() for keys in charts.values() for key in keys]
    ours.append(_OF_THE_MODULE)
    monitors = dict.fromkeys(getattr(callback, "monitor", None) for callback in callbacks)
    return {
        f"what callbacks monitor: {monitor}": [re.escape(monitor)]
        for monitor in monitors
        if isinstance(monitor, str) and not any(re.fullmatch(key, monitor) for key in ours)
    }


def write_layout(trainer: Trainer) -> None:
    """Write the layout of all our callbacks, unless the run has one: each of them calls this in ``on_fit_start``.

    The one that comes first writes for all. A layout that the user wrote before stays, in ``setup`` of the module too,
    and one that is written later takes the place of ours.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer_loggers(trainer, "TensorBoardLogger"):
        if not run_holds(logger, "custom_scalars__config__"):
            prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
            logger.experiment.add_custom_scalars(
                layout_of(trainer_callbacks(trainer), trainer.lightning_module, prefix)
            )


def run_holds(logger: Any, tag: str) -> bool:
    """Whether the event files of the logger's run have something of this tag, whoever wrote it.

    The tag stands in them as it is, and to look for it takes a second for several GB. Of a run on a remote file system
    nothing is known.
    """
    logger.experiment.flush()
    for path in Path(logger.log_dir).glob("*tfevents*"):
        with path.open("rb") as file:
            if path.stat().st_size and mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(tag.encode()) >= 0:
                return True
    return False
