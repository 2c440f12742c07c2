"""The state of callbacks in checkpoints of sharded weights.

Lightning saves what callbacks give from one process only. So what is sharded goes where the shards of the optimizer's
state go, into the files that ``torch.distributed.checkpoint`` writes from all processes, under keys of its own in the
state of the first optimizer: Lightning asks for the keys it knows and leaves others alone. Where Lightning gathers the
weights for a checkpoint of one file, what belongs to them is gathered too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gcsr._lightning import Trainer
from lightning_gcsr.core.sharded_state import gather_state, join_states, split_state
from lightning_gcsr.core.sharding import is_sharded, local_part, sharded_like

__all__ = ["put_sharded", "take_sharded"]

_OWN = "lightning_gcsr"
"""The key in the state of the first optimizer."""


def put_sharded(trainer: Trainer, checkpoint: dict[str, Any], state_key: str) -> None:
    """Move the sharded tensors of a callback's state to where they are saved; in ``on_save_checkpoint``.

    Args:
        trainer: The Trainer.
        checkpoint: The checkpoint, with the state that the callback's ``state_dict`` gave.
        state_key: The callback's.
    """
    states = checkpoint.get("callbacks", {})
    rest, sharded = split_state(states.get(state_key, {}))
    if not sharded:
        return
    if any(map(is_sharded, checkpoint["state_dict"].values())):
        own = checkpoint["optimizer_states"][0].setdefault(_OWN, {})
        for what, values in sharded.items():
            own |= {f"{state_key}/{what}/{name}": value for name, value in values.items()}
        states[state_key] = rest
    else:
        states[state_key] = gather_state(states[state_key], keeps=trainer.is_global_zero)


def take_sharded(trainer: Trainer, checkpoint: dict[str, Any], state_key: str) -> None:
    """Put back what :func:`put_sharded` moved, spread as the weights are now; in ``on_load_checkpoint``."""
    states = checkpoint.get("callbacks", {})
    if state_key not in states:
        return
    path = Path(str(trainer.strategy.broadcast(trainer.ckpt_path)))
    if path.is_dir():
        own = _loaded(path, f"optimizer_0.{_OWN}.{state_key}/", dict(trainer.lightning_module.named_parameters()))
    else:  # one file into which a distributed checkpoint was consolidated
        first: dict[str, Any] = next(iter(checkpoint.get("optimizer_states", [])), {})
        own = {key.removeprefix(f"{state_key}/"): value for key, value in first.get(_OWN, {}).items()}
    sharded: dict[str, dict[str, Tensor]] = {}
    for key, value in own.items():
        what, name = key.split("/", 1)
        sharded.setdefault(what, {})[name] = value
    states[state_key] = join_states(states[state_key], sharded)


def _loaded(path: Path, prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under keys with this prefix in a distributed checkpoint, placed as the parameters they belong to."""
    # Imported here, because where torch is built without it, nothing is sharded.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = {}
    for key, saved in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        if not key.startswith(prefix) or not isinstance(saved, TensorStorageMetadata):
            continue
        parameter = parameters.get(key.removeprefix(prefix).split("/", 1)[1])
        if parameter is not None and saved.size == parameter.shape:
            part = torch.empty_like(local_part(parameter.detach()), dtype=saved.properties.dtype)
            tensors[key] = sharded_like(part, parameter)
    if tensors:
        load(tensors, checkpoint_id=path)
    return {key.removeprefix(prefix): value for key, value in tensors.items()}
