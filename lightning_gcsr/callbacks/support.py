"""What CompressedCheckpoint takes from here."""

from lightning_gcsr._lightning import check_trainer

__all__ = ["check_trainer"]
