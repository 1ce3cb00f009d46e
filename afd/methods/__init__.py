"""Training methods: settings that build a step, and the steps themselves."""

from __future__ import annotations

from afd.deprecated import METHOD_SETTINGS, understand
from afd.execution import Execution
from afd.methods.afd import AFD
from afd.methods.base import Batch, Method, Step
from afd.methods.ramps import Ramp
from afd.methods.registry import METHODS, WRAPPERS
from afd.methods.supervised import AT, Natural, Supervised, SupervisedStep, TrainedModel, Wrapper

__all__ = [
    "AFD",
    "AT",
    "METHODS",
    "WRAPPERS",
    "Batch",
    "Execution",
    "Method",
    "Natural",
    "Ramp",
    "Step",
    "Supervised",
    "SupervisedStep",
    "TrainedModel",
    "Wrapper",
]

understand(AFD, METHOD_SETTINGS)
