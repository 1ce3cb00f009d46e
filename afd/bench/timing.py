"""Timing that survives a busy machine: candidates side by side, and percentiles."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Candidates = Mapping[str, Callable[[], object]]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float


def interleaved(
    candidates: Candidates, rounds: int, warmup: int = 5, device: torch.device = CPU, seed: int = 0
) -> dict[str, Timing]:
    """Times every candidate once a round, so that a slow spell of the machine meets them all alike.

    Each round has its own order: what a call finds in the caches is left there by the call before it, and no candidate
    should always follow the same one. On CUDA the times are those between events on the current stream.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    order, shuffler = list(candidates), random.Random(seed)
    clock = _on_gpu if device.type == "cuda" else _on_cpu
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            readings[name].append(clock(candidates[name]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: _percentiles([read() for read in taken]) for name, taken in readings.items()}


def _on_cpu(call: Callable[[], object]) -> Callable[[], float]:
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return lambda: seconds


def _on_gpu(call: Callable[[], object]) -> Callable[[], float]:
    """The reading is taken later, when the stream has passed both events: reading now would wait for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    return lambda: begin.elapsed_time(end) * 1e-3


def _percentiles(seconds: list[float]) -> Timing:
    ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Timing(*torch.tensor(seconds, dtype=torch.float64).quantile(ranks).tolist())
