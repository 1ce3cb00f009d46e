"""Training methods: settings that build a round, and the rounds themselves."""

from __future__ import annotations

from afd.methods.afd import AFD
from afd.methods.base import Method, Round
from afd.methods.execution import Execution
from afd.methods.natural import Natural

__all__ = ["AFD", "Execution", "Method", "Natural", "Round"]
