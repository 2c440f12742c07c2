"""Gradient-coherent strong regularization for PyTorch Lightning."""

from lightning_gcsr.callbacks import CompressedCheckpoint, CompressionMonitor, GradientCoherentRegularization, KeepZeros
from lightning_gcsr.coherence import CoherenceMeasure
from lightning_gcsr.compression import load_compressed, save_compressed
from lightning_gcsr.control import SparsityController
from lightning_gcsr.finder import find_strength
from lightning_gcsr.finder_result import StrengthFinderResult, Suggestion, ToleranceLevel, Trial
from lightning_gcsr.metrics import CompressionRatio, Sparsity
from lightning_gcsr.penalties import L1, L2, ElasticNet, GroupLasso, Penalty
from lightning_gcsr.pruning import prune_small
from lightning_gcsr.regularizer import CoherentRegularizer
from lightning_gcsr.report import GateReport
from lightning_gcsr.shrink import ShrinkReport, UnitCount, shrink_units
from lightning_gcsr.sparsity import StoredBytes, TensorCount, count_tensors, module_bytes, stored_bytes
from lightning_gcsr.thresholds import ThresholdCurve, ThresholdPoint, threshold_curve

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "CoherenceMeasure",
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
    "ShrinkReport",
    "Sparsity",
    "SparsityController",
    "StoredBytes",
    "StrengthFinderResult",
    "Suggestion",
    "TensorCount",
    "ThresholdCurve",
    "ThresholdPoint",
    "ToleranceLevel",
    "Trial",
    "UnitCount",
    "count_tensors",
    "find_strength",
    "load_compressed",
    "module_bytes",
    "prune_small",
    "save_compressed",
    "shrink_units",
    "stored_bytes",
    "threshold_curve",
]
