"""Evaluation: what training achieved, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afd.metrics import accuracy, accuracy_curve

if TYPE_CHECKING:
    from afd.evaluation.measure import Result, evaluate

__all__ = ["Result", "accuracy", "accuracy_curve", "evaluate"]


if not TYPE_CHECKING:  # which would take it for an answer to every name

    def __getattr__(name):
        """What is imported when it is asked for: who only wants an accuracy needs none of it."""
        if name not in ("Result", "evaluate"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from afd.evaluation import measure

        return getattr(measure, name)
