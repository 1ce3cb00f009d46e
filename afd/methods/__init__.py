"""Training methods: one module each, settings that build a round and the round itself."""

from __future__ import annotations

from afd.methods.afd import AFD
from afd.methods.base import Method, Round
from afd.methods.natural import Natural

__all__ = ["AFD", "Method", "Natural", "Round"]
