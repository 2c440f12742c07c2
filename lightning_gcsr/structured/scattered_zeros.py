"""What scattered zeros are worth to a runtime: a network is timed with its zeros, and with all weights filled."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_gcsr.structured.network_cost import Milliseconds, take_turns
from lightning_gcsr.structured.tracing import layer_by_layer

__all__ = ["NOT_MEASURED", "RuntimeZeros", "runtime_zeros"]

NOT_MEASURED = (
    "Not measured, but said by their makers: TensorRT and cuSPARSELt use zeros in the 2:4 pattern only, on NVIDIA GPUs"
    " since Ampere; XNNPACK, on phones, has kernels for scattered zeros in 1×1 convolutions."
)


_NOTABLE = 0.1  # the difference of times that is more than chance


@dataclass(frozen=True)
class RuntimeZeros:
    """The times of one runtime, with the zeros and without."""

    runtime: str
    with_zeros: Optional[Milliseconds] = None
    without: Optional[Milliseconds] = None
    """With all weights filled by random numbers; for a sparse layout, with the zeros in dense kernels."""
    compared_with: str = "without zeros"
    note: str = ""
    """Why it was not measured."""

    def __str__(self) -> str:
        if self.with_zeros is None or self.without is None:
            return f"{self.runtime}: {self.note}"
        ratio = self.without.median / self.with_zeros.median
        verdict = "makes no use of the zeros"
        if ratio > 1 + _NOTABLE and self.with_zeros.high < self.without.low:
            verdict = "uses the zeros"
        elif ratio < 1 - _NOTABLE and self.with_zeros.low > self.without.high:
            verdict = "is slower with the zeros"
        times = f"{self.with_zeros.median:.3g} ms with the zeros, {self.without.median:.3g} ms {self.compared_with}"
        return f"{self.runtime}: {times} ({ratio:.2f}×), {verdict}"


def runtime_zeros(
    module: nn.Module, arguments: tuple[Any, ...], device: torch.device, repeats: int
) -> list[RuntimeZeros]:
    """What each runtime that is installed makes of the zeros of a network, which is in eval mode."""
    filled = copy.deepcopy(module)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in filled.parameters():
            if parameter.is_floating_point():
                noise = torch.randn_like(parameter) * parameter.std(correction=0).clamp_min(1e-3)
                parameter.copy_(torch.where(parameter == 0, noise, parameter))
    results = []
    for name, prepare in _RUNTIMES.items():
        sparse = prepare is _csr
        try:
            reference = _pytorch(module, arguments, device) if sparse else prepare(filled, arguments, device)
            runs = [prepare(module, arguments, device), reference]
            with_zeros, without = take_turns(runs, device, repeats)
        except _NotMeasuredError as error:
            results.append(RuntimeZeros(name, note=f"not measured, since {error}"))
        except Exception as error:  # exporters and sparse kernels refuse in many ways
            reason = str(error).partition("\n")[0][:120]
            results.append(RuntimeZeros(name, note=f"not measured, since {type(error).__name__}: {reason}"))
        else:
            compared = "in dense kernels" if sparse else "without zeros"
            results.append(RuntimeZeros(name, with_zeros, without, compared))
    return results


class _NotMeasuredError(Exception):
    """Why a runtime is not measured."""


def _pytorch(module: nn.Module, arguments: tuple[Any, ...], device: torch.device) -> Callable[[], Any]:
    return lambda: module(*arguments)


class _CsrLinear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse CSR is in beta
            self.weight = layer.weight.detach().to_sparse_csr()

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(0, -2)
        out: Tensor = (self.weight @ rows.T).T.unflatten(0, inputs.shape[:-1])
        return out if self.bias is None else out + self.bias


def _csr(module: nn.Module, arguments: tuple[Any, ...], device: torch.device) -> Callable[[], Any]:
    changed = copy.deepcopy(module)
    if not any(type(child) is nn.Linear for child in changed.modules()):
        raise _NotMeasuredError("there are no linear layers")
    if type(changed) is nn.Linear:
        changed = nn.Sequential(changed)
    for part in changed.modules():
        for name, child in part.named_children():
            if type(child) is nn.Linear:
                setattr(part, name, _CsrLinear(child))

    def run() -> Any:
        with layer_by_layer():  # kernels for whole layers take their weights out of them
            return changed(*arguments)

    return run


def _onnx_runtime(module: nn.Module, arguments: tuple[Any, ...], device: torch.device) -> Callable[[], Any]:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise _NotMeasuredError("it is not installed; pip install onnx onnxscript onnxruntime")
    if device.type != "cpu":
        raise _NotMeasuredError("the network is not on the CPU")
    import onnxruntime

    silence = contextlib.redirect_stdout(io.StringIO())
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), silence, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            program: Any = torch.onnx.export(module, arguments, dynamo=True, verbose=False)
        finally:
            logger.setLevel(level)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    tensors = [part for part in arguments if isinstance(part, Tensor)]
    names = [part.name for part in session.get_inputs()]
    feed = {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
    return lambda: session.run(None, feed)


_RUNTIMES: dict[str, Callable[[nn.Module, tuple[Any, ...], torch.device], Callable[[], Any]]] = {
    "PyTorch, dense kernels": _pytorch,
    "PyTorch, linear layers as sparse CSR": _csr,
    "ONNX Runtime": _onnx_runtime,
}
