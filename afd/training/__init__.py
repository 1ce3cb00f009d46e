"""Training: the loop, what it reports, checkpoints, and the run that a config describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afd.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from afd.training.logs import json_lines, tensorboard
from afd.training.reports import Callback, EpochReport, IntervalReport, TrainingError
from afd.training.signals import StoppedError
from afd.training.trainer import Trainer
from afd.training.weights import load_weights, save_weights

if TYPE_CHECKING:
    from afd.training.experiment import Result, train

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


def __getattr__(name: str) -> Any:
    """What a config describes, imported where it is asked for: it needs the packages of the command line."""
    if name not in {"Result", "train"}:
        raise AttributeError(f"module 'afd.training' has no attribute {name!r}")
    from afd.training import experiment

    return getattr(experiment, name)
