"""Training methods: settings that build a step, and the steps themselves."""

from __future__ import annotations

from afd.deprecated import METHOD_SETTINGS, understand
from afd.execution import Execution
from afd.methods.adversarial import ALP, AT, FGSMRS, MART, TRADES, Natural, NormPenalty
from afd.methods.afd import AFD
from afd.methods.base import Batch, Method, Run, Step
from afd.methods.jarn import JARN
from afd.methods.ramps import Ramp
from afd.methods.registry import METHODS, WRAPPERS
from afd.methods.regularized import GAT, LLR, NuAT
from afd.methods.stepping import AWP, Free
from afd.methods.supervised import Supervised, SupervisedStep, TrainedModel, Wrapper

__all__ = [
    "AFD",
    "ALP",
    "AT",
    "AWP",
    "FGSMRS",
    "GAT",
    "JARN",
    "LLR",
    "MART",
    "METHODS",
    "TRADES",
    "WRAPPERS",
    "Batch",
    "Execution",
    "Free",
    "Method",
    "Natural",
    "NormPenalty",
    "NuAT",
    "Ramp",
    "Run",
    "Step",
    "Supervised",
    "SupervisedStep",
    "TrainedModel",
    "Wrapper",
]

understand(AFD, METHOD_SETTINGS)
