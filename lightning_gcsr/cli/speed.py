"""``lightning-gcsr speed``: a network against what is left of it without its zero units, measured on this machine."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from argparse import Namespace

import torch
from torch import nn

from lightning_gcsr.cli.console import read, write
from lightning_gcsr.structured.speed_report import speed_report
from lightning_gcsr.structured.tracing import run_module

__all__ = ["run"]


def run(given: Namespace) -> int:
    """Print the report and return the exit code."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that the user's own modules are found
    network = _make(given.network)
    if given.weights is not None:
        _load(network, given)
    before = torch.get_num_threads()
    torch.set_num_threads(given.threads or before)
    try:
        report = speed_report(network, _example(network, given.shape), repeats=given.repeats)
    finally:
        torch.set_num_threads(before)
    write(json.dumps(report.as_dict(), indent=2) + "\n" if given.json else f"{report}\n")
    return 0


def _example(network: nn.Module, shape: list[int]) -> torch.Tensor:
    """Random numbers, or for a network that takes indices, such as tokens, zeros."""
    numbers = torch.randn(*shape)
    try:
        run_module(network, (numbers,))
    except ValueError as error:
        indices = torch.zeros(*shape, dtype=torch.int64)
        with contextlib.suppress(ValueError):
            run_module(network, (indices,))
            return indices
        raise ValueError(
            f"SHAPE must be the shape of an input that the network accepts, got {','.join(map(str, shape))}:"
            f" {error.__cause__}. Write the sizes of all dimensions, the batch first."
        ) from error
    return numbers


def _make(path: str) -> nn.Module:
    """The network that ``MODULE:FUNCTION`` returns."""
    module, _, function = path.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"MODULE:FUNCTION must name a function that can be imported from this folder, got {path}: {error}. Write"
            " `mymodels:make_resnet` for the function make_resnet in mymodels.py."
        ) from error
    try:
        network = make()
    except Exception as error:  # whatever the function of the user raises
        raise ValueError(
            f"MODULE:FUNCTION must name a function that makes a network without arguments, got {path}, which raises"
            f" {type(error).__name__}: {error}. Write a function that calls it with its arguments."
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"MODULE:FUNCTION must return a torch.nn.Module, got {path}, which returns {type(network).__name__}. Name"
            " a function that makes the network."
        )
    return network


def _load(network: nn.Module, given: Namespace) -> None:
    """Give the network the weights of ``--weights`` whose names begin with ``--prefix``, without the prefix."""
    tensors, prefix = read(given.weights, given.max_bytes).tensors, given.prefix
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(chosen)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"--weights must hold the weights of the network that {given.network} makes, got {given.weights} with"
            f" --prefix '{prefix}': {problem}. The file has {', '.join(list(tensors)[:3])}, ...; name with --prefix"
            " what stands before the names of the network."
        ) from error
