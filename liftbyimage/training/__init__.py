"""Training: what a run is asked to do, the stages, the loop that runs them, and what it keeps."""

from __future__ import annotations

from liftbyimage.training.config import TrainingConfig
from liftbyimage.training.trainer import Trained, train

__all__ = ["Trained", "TrainingConfig", "train"]
