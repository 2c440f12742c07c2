"""Gradient-coherent strong regularization for PyTorch Lightning."""

from lightning_gcsr.callbacks import CompressedCheckpoint, CompressionMonitor, GradientCoherentRegularization, KeepZeros
from lightning_gcsr.compression import load_compressed, save_compressed
from lightning_gcsr.control import SparsityController
from lightning_gcsr.finder import find_strength
from lightning_gcsr.finder_result import StrengthFinderResult, Suggestion, ToleranceLevel, Trial
from lightning_gcsr.metrics import CompressionRatio, Sparsity
from lightning_gcsr.penalties import L1, L2, ElasticNet, GroupLasso, Penalty
from lightning_gcsr.regularizer import CoherentRegularizer
from lightning_gcsr.report import GateReport
from lightning_gcsr.sparsity import StoredBytes, TensorCount, count_tensors, module_bytes, stored_bytes

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "CoherentRegularizer",
    "CompressedCheckpoint",
    "CompressionMonitor",
    "CompressionRatio",
    "ElasticNet",
    "GateReport",
    "GradientCoherentRegularization",
    "GroupLasso",
    "KeepZeros",
    "Penalty",
    "Sparsity",
    "SparsityController",
    "StoredBytes",
    "StrengthFinderResult",
    "Suggestion",
    "TensorCount",
    "ToleranceLevel",
    "Trial",
    "count_tensors",
    "find_strength",
    "load_compressed",
    "module_bytes",
    "save_compressed",
    "stored_bytes",
]
