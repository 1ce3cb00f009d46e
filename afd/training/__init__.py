"""Training: the loop, what it reports, checkpoints, and the run that a config describes."""

from __future__ import annotations

from afd.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from afd.training.experiment import Result, train
from afd.training.logs import json_lines, tensorboard
from afd.training.reports import Callback, EpochReport, IntervalReport, TrainingError
from afd.training.signals import StoppedError
from afd.training.trainer import Trainer
from afd.training.weights import load_weights, save_weights

__all__ = [
    "Callback",
    "CheckpointError",
    "EpochReport",
    "IntervalReport",
    "Result",
    "StoppedError",
    "Trainer",
    "TrainingError",
    "json_lines",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "save_weights",
    "tensorboard",
    "train",
]
