from .callbacks import CompressedCheckpoint, CompressionMonitor, GradientCoherentRegularization, KeepZeros
from .core.coherence import CoherenceMeasure
from .core.coupled_penalty import CoupledGroupLasso
from .core.gate import Gate
from .core.gate_report import GateReport
from .core.group_slices import CoupledGroup, GroupSlice
from .core.penalties import L1, L2, ElasticNet, GroupLasso, Penalty
from .core.regularizer import CoherentRegularizer
from .core.schedule import Clock, Schedule
from .core.sparsity_controller import SparsityController
from .sparsity.counting import TensorCount, count_tensors, module_bytes
from .sparsity.magnitude_pruning import prune_small
from .sparsity.metrics import CompressionRatio, Sparsity
from .storage.compressed_file import load_compressed, save_compressed
from .storage.encodings import StoredBytes, stored_bytes
from .structured.coupled_groups import coupled_groups
from .structured.optimizer_state import carry_optimizer_state
from .structured.shrink import ShrinkReport, UnitCount, shrink_units
from .structured.speed_report import SpeedReport, speed_report
from .tuning.strength_finder import find_strength
from .tuning.strength_result import StrengthFinderResult, Suggestion, ToleranceLevel
from .tuning.threshold_curve import ThresholdCurve, ThresholdPoint, threshold_curve
from .tuning.trade_off import Trial

__version__: str

__all__ = [
    "L1",
    "L2",
    "Clock",
    "CoherenceMeasure",
    "CoherentRegularizer",
    "CompressedCheckpoint",
    "CompressionMonitor",
    "CompressionRatio",
    "CoupledGroup",
    "CoupledGroupLasso",
    "ElasticNet",
    "Gate",
    "GateReport",
    "GradientCoherentRegularization",
    "GroupLasso",
    "GroupSlice",
    "KeepZeros",
    "Penalty",
    "Schedule",
    "ShrinkReport",
    "Sparsity",
    "SparsityController",
    "SpeedReport",
    "StoredBytes",
    "StrengthFinderResult",
    "Suggestion",
    "TensorCount",
    "ThresholdCurve",
    "ThresholdPoint",
    "ToleranceLevel",
    "Trial",
    "UnitCount",
    "carry_optimizer_state",
    "count_tensors",
    "coupled_groups",
    "find_strength",
    "load_compressed",
    "module_bytes",
    "prune_small",
    "save_compressed",
    "shrink_units",
    "speed_report",
    "stored_bytes",
    "threshold_curve",
]
