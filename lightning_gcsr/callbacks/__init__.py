"""The callbacks: what a Lightning user attaches to a Trainer."""

from lightning_gcsr.callbacks.compressed_checkpoint import CompressedCheckpoint
from lightning_gcsr.callbacks.keep_zeros import KeepZeros
from lightning_gcsr.callbacks.monitor import CompressionMonitor
from lightning_gcsr.callbacks.regularization import GradientCoherentRegularization

__all__ = ["CompressedCheckpoint", "CompressionMonitor", "GradientCoherentRegularization", "KeepZeros"]
