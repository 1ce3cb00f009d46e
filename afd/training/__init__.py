"""Training: the loop, its listeners, checkpoints, and the run that a config describes."""

from __future__ import annotations

from afd.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from afd.training.experiment import Result, train
from afd.training.trainer import EpochReport, Listener, Trainer, TrainingError

__all__ = [
    "CheckpointError",
    "EpochReport",
    "Listener",
    "Result",
    "Trainer",
    "TrainingError",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]
