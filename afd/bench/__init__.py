"""How fast afd is, measured beside what else could do the same work."""

from __future__ import annotations

from afd.bench.timing import Timing, interleaved, record

__all__ = ["Timing", "interleaved", "record"]
