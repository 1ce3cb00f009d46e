"""Adversarial Feature Desensitization (Bashivan et al., NeurIPS 2021): fused attacks and the three-player game."""

from __future__ import annotations

from afd import attacks, methods, nn, ops
from afd._version import __version__
from afd.training import Trainer

__all__ = ["Trainer", "__version__", "attacks", "methods", "nn", "ops"]
