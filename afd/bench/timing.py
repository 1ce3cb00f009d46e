"""Timing that survives a busy machine: candidates side by side, and percentiles."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from afd.bench import at_work

Call = Callable[[], object]
Candidates = Mapping[str, Call]
Reading = Callable[[], float]  # seconds, once they are known
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of what was read in the rounds."""
        ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(seconds, dtype=torch.float64).quantile(ranks).tolist())


def interleaved(
    candidates: Candidates, rounds: int, warmup: int = 5, device: torch.device = CPU, seed: int = 0
) -> dict[str, Timing]:
    """Times calls that are long beside a kernel's launch; `afd.bench.clocks` has those that are not.

    On CUDA the times are those between events on the current stream.
    """
    for _ in range(warmup):
        for name, call in candidates.items():
            at_work.now(f"warming up, {name}")
            call()
    taken = in_turn(candidates, rounds, between_events if device.type == "cuda" else _on_cpu, seed)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def in_turn(
    candidates: Candidates, rounds: int, clock: Callable[[Call], Reading], seed: int = 0
) -> dict[str, list[float]]:
    """Times every candidate once a round, so that a slow spell of the machine meets them all alike.

    Each round has its own order: what a call finds in the caches is left there by the call before it, and no candidate
    should always follow the same one.
    """
    order, shuffler = list(candidates), random.Random(seed)
    readings: dict[str, list[Reading]] = {name: [] for name in candidates}
    for number in range(1, rounds + 1):
        shuffler.shuffle(order)
        for name in order:
            at_work.now(f"round {number} of {rounds}, {name}")
            readings[name].append(clock(candidates[name]))
    return {name: [read() for read in taken] for name, taken in readings.items()}


def _on_cpu(call: Call) -> Reading:
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return lambda: seconds


def between_events(call: Call) -> Reading:
    """Seconds that the current stream takes from before a call to after it.

    The reading is taken later, when the stream has passed both events: reading now would wait for it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def read() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return read
