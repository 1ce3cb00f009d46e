"""What training achieved, measured."""

from __future__ import annotations

from afd.evaluation.robustness import accuracy, accuracy_curve

__all__ = ["accuracy", "accuracy_curve"]
