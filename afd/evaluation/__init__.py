"""Evaluation: what training achieved, measured."""

from __future__ import annotations

from afd.metrics import accuracy, accuracy_curve

__all__ = ["accuracy", "accuracy_curve"]
