"""Training: the loop, what it reports, and the weights that come of it."""

from __future__ import annotations

from typing import Any

from afd.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from afd.deprecated import moved
from afd.training.alarms import Alarm, RollbackReport
from afd.training.callbacks import Callback, EpochReport, IntervalReport, TrainingError, json_lines, tensorboard
from afd.training.mixing import Mixing
from afd.training.signals import StoppedError
from afd.training.trainer import Trainer
from afd.training.weights import load_weights, save_weights

__all__ = [
    "Alarm",
    "Callback",
    "CheckpointError",
    "EpochReport",
    "IntervalReport",
    "Mixing",
    "RollbackReport",
    "StoppedError",
    "Trainer",
    "TrainingError",
    "json_lines",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "save_weights",
    "tensorboard",
]


def __getattr__(name: str) -> Any:
    return moved(__name__, name)
