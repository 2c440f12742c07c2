"""What a regularization callback refuses before the first step, and the line in which it says what is at work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_gcsr._lightning import (
    Trainer,
    clock,
    misconfiguration,
    rank_zero_info,
    rank_zero_warn,
    trainer_callbacks,
)
from lightning_gcsr.callbacks.step_callback import calls_step_hooks
from lightning_gcsr.core.coupled_penalty import CoupledGroupLasso
from lightning_gcsr.core.optimizers import check_optimizer, rescales_gradients
from lightning_gcsr.core.parameter_selection import beyond_default, check_patterns, left_out_by_default
from lightning_gcsr.core.penalties import Penalty
from lightning_gcsr.core.regularizer import CoherentRegularizer
from lightning_gcsr.core.settings import check_aim, check_rule
from lightning_gcsr.core.strengths import check_strength
from lightning_gcsr.validation import argument_error, check_choice, listed

__all__ = [
    "MOVED",
    "check_arguments",
    "check_hooks",
    "check_length",
    "check_names",
    "check_neighbours",
    "check_optimizers",
    "describe_start",
    "fractions_of",
]


MOVED = {
    "coherence": "gate=Gate(coherence={}), or gate=None for no gate",
    "scope": "gate=Gate(scope={})",
    "threshold": "gate=Gate(threshold={})",
    "tolerance": "gate=Gate(tolerance={})",
    "averaging": "gate=Gate(averaging={})",
    "delay_steps": "schedule=Schedule(delay={})",
    "warmup_steps": "schedule=Schedule(warmup={})",
    "stop_steps": "schedule=Schedule(stop={})",
}
"""Where the arguments of former times are now, see :func:`~lightning_gcsr.validation.moved_arguments`."""
_RESERVED = ("compression", "layers", "sparsity", "weights")
"""Names under which CompressionMonitor logs."""


def check_arguments(given: Mapping[str, Any], penalty: Penalty) -> None:
    """Raise unless the arguments of a regularization callback keep their rules, each alone and beside the others."""
    check_rule(given["gate"], given["schedule"], given["update"])
    check_choice("strength_scale", given["strength_scale"], ["uniform", "fan_in"])
    aim = ("strength", "target_sparsity", "gate", "update", "schedule", "strength_scale")
    check_aim(penalty, **{key: given[key] for key in aim})
    if given["strength"] is not None:
        check_strength(given["strength"])
    check_patterns("include", given["include"])
    check_patterns("exclude", given["exclude"])
    name = given["name"]
    # MLflow would strip other characters from the logged keys, and two names might become one.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise argument_error("name", name, "must consist of letters, digits and '_', '.' or '-'")
    if name in _RESERVED:
        rule = f"must be none of {', '.join(map(repr, _RESERVED))}"
        raise argument_error("name", name, rule, "CompressionMonitor logs under these.")


def fractions_of(callback: Any, left_open: bool) -> dict[str, object]:
    """What is a fraction of the training in a callback, by names for a message; see :func:`check_length`.

    Args:
        callback: The callback.
        left_open: Whether the warm-up is the default.
    """
    named: dict[str, object] = {f"{callback.name}: {key}": v for key, v in callback.schedule.fractions.items()}
    if left_open and callback.schedule.warmup:
        named[f"{callback.name}: warmup"] = f"{callback.schedule.warmup}, the default where the gate has a tolerance,"
    if callback.target_sparsity is not None and callback.schedule.stop is None:
        named[f"{callback.name}: the way to target_sparsity"] = callback.target_sparsity
    return named


def check_names(trainer: Trainer, callback: Any) -> None:
    """Refuse two callbacks of one name: they would share their state and their logged keys."""
    namesakes = [other for other in trainer_callbacks(trainer) if other.state_key == callback.state_key]
    if len(namesakes) > 1:
        raise misconfiguration(
            trainer,
            f"Every `{type(callback).__name__}` must have a name of its own, got {len(namesakes)} with"
            f" name={callback.name!r}. Give each another `name`.",
        )


def check_neighbours(trainer: Trainer, callback: Any) -> None:
    """Refuse a callback before this one, of the same kind, that would disturb what this one measures or shrinks."""
    regularizer: CoherentRegularizer = callback.regularizer
    for other in trainer_callbacks(trainer):
        if other is callback:
            return  # later ones look back at this one
        if not isinstance(other, type(callback)) or other.regularizer is None:
            continue
        if not (shared := [name for name in regularizer.parameters if name in other.regularizer.parameters]):
            continue
        if other.update == "gradient":
            raise misconfiguration(
                trainer,
                f"{callback.name!r} would measure gradients into which {other.name!r} has injected its penalty already,"
                f" on {len(shared)} parameters, {shared[0]!r} first. Give {other.name!r} update='proximal', which"
                " leaves gradients alone, or keep the parameters of the two apart with `include` and `exclude`.",
            )
        if "dual_averaging" in (callback.update, other.update):
            both = "update='proximal'"
            if callback.target_sparsity is not None or other.target_sparsity is not None:
                both = "a strength in place of target_sparsity, and update='proximal'"
            raise misconfiguration(
                trainer,
                f"{callback.name!r} and {other.name!r} regularize {len(shared)} parameters together, {shared[0]!r}"
                " first, and one of them exchanges the weights for latent ones around each step. Give both"
                f" {both}, or keep their parameters apart with `include` and `exclude`.",
            )


def check_length(trainer: Trainer, fractions: Mapping[str, object]) -> None:
    """Refuse fractions of a training whose length is not known; from ``on_train_start`` on.

    Args:
        trainer: The Trainer.
        fractions: What is a fraction of the training, by the name that the user knows it by.
    """
    if fractions and clock(trainer).progress is None:
        named = " and ".join(f"{name}={value}" for name, value in fractions.items())
        raise misconfiguration(
            trainer,
            f"{named} is a fraction of the training, whose length is not known. Give the Trainer max_steps, or"
            " max_epochs and a train dataloader with a length, or say how many steps, as an integer.",
        )


def check_optimizers(trainer: Trainer, callback: Any) -> None:
    """Refuse optimizers with which a regularization callback would silently do something else.

    Raises:
        MisconfigurationException: If one of the Trainer's optimizers is not supported.
    """
    regularizer: CoherentRegularizer = callback.regularizer
    stepping = [optimizer for optimizer in trainer.optimizers if regularizer.stepped_by(optimizer)]
    if callback.target_sparsity is not None and len(stepping) > 1:
        raise misconfiguration(
            trainer,
            f"{callback.name}: target_sparsity={callback.target_sparsity} needs one optimizer that steps all of the"
            f" weights, and {len(stepping)} do. Give each a callback of its own, with `include` and a `name`.",
        )
    if regularizer.penalty.coupled and len(stepping) > 1:
        raise misconfiguration(
            trainer,
            f"{callback.name}: {regularizer.penalty!r} needs one optimizer that steps all of its weights, and"
            f" {len(stepping)} do. Give each a callback of its own, with the groups of its part of the module, as in"
            " CoupledGroupLasso(coupled_groups(module.part, example_input, prefix='part.')), and a `name`.",
        )
    for optimizer in trainer.optimizers:
        try:
            update = regularizer.update if any(optimizer is other for other in stepping) else "gradient"
            check_optimizer(optimizer, update, has_target=callback.target_sparsity is not None)
        except ValueError as error:
            raise misconfiguration(trainer, f"`{type(callback).__name__}`: {error}") from error
        if regularizer.update != "gradient":
            check_hooks(trainer, type(callback).__name__, optimizer)


def check_hooks(trainer: Trainer, callback: str, optimizer: Optimizer) -> None:
    """Refuse an optimizer of which nobody can tell whether it stepped: one without hooks under a loss scaler."""
    if trainer.scaler is not None and not calls_step_hooks(optimizer):
        raise misconfiguration(
            trainer,
            f"`{callback}` does not support {type(optimizer).__name__} with precision='16-mixed': this optimizer calls"
            " none of torch's hooks, so nobody can tell whether the loss scaler skipped its step. Use"
            " precision='bf16-mixed' or another optimizer.",
        )


def describe_start(trainer: Trainer, callback: Any) -> None:
    """Say in one line what is at work; warn where that is nothing, or where weights are shrunk twice."""
    name, regularizer = callback.name, callback.regularizer
    stepped: dict[str, None] = {}
    steps = {}
    for optimizer in trainer.optimizers:
        if names := regularizer.stepped_by(optimizer):
            stepped |= dict.fromkeys(names)
            rescales = any(map(rescales_gradients, optimizer.param_groups))
            steps[type(optimizer).__name__] = ", which rescales gradients" if rescales else ""
        if decayed := regularizer.decayed_by(optimizer):
            rank_zero_warn(
                f"The optimizer {type(optimizer).__name__} has a weight_decay of its own on {len(decayed)} of the"
                f" parameters that {name!r} regularizes with {regularizer.penalty!r}, {decayed[0]!r} first."
                " Both shrink the weights. Set weight_decay=0 unless that is what you want."
            )
    if not stepped:
        rank_zero_warn(
            f"No optimizer holds a parameter that {name!r} regularizes, so nothing will be regularized."
            f" It regularizes {list(regularizer.parameters)[:3]}; see `include` and `exclude`."
        )
    trained = [name for name in regularizer.trained if name in stepped]
    if stepped and not trained:
        rank_zero_warn(
            f"All parameters that {name!r} regularizes are frozen, {next(iter(stepped))!r} first, so nothing will be"
            " regularized until they are trained; see `include` and `exclude`."
        )
    count = f"{len(trained)} tensor{'s' * (len(trained) != 1)}"
    weights = sum(regularizer.parameters[name].numel() for name in trained)
    frozen = [name for name in stepped if name not in trained]
    notes = f" Frozen: {listed(frozen)}." if frozen else ""
    penalty = regularizer.penalty
    groups = f"{len(penalty.groups or ()):,} groups, in tensors of " if isinstance(penalty, CoupledGroupLasso) else ""
    spared = [] if callback.include else left_out_by_default(trainer.lightning_module)
    spared = [name for name in spared if name not in regularizer.parameters]
    notes += f" Dense by default: {listed(spared)}; `include` regularizes them." if spared else ""
    if not penalty.coupled and (more := beyond_default(trainer.lightning_module, trained)):
        notes += f" Regularized by `include` only: {listed(more)}; `exclude` leaves them out."
    everything = sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
    aim = f"with strength {regularizer.strength:g}"
    if callback.target_sparsity is not None:
        counted = "groups" if regularizer.penalty.coupled else "weights"
        aim = f"until {100 * callback.target_sparsity:g} % of the {counted} are zero,"
    gate = "no gate" if regularizer.gate is None else repr(regularizer.gate)
    under = " and ".join(f"{optimizer}{scale}" for optimizer, scale in steps.items()) or "no optimizer"
    rank_zero_info(
        f"{name}: {regularizer.penalty!r} {aim} on {groups}{weights:,} of {everything:,} parameters, in {count};"
        f" update={regularizer.update!r} under {under}; {gate}; {regularizer.schedule!r}.{notes}"
    )
