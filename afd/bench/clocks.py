"""How kernel-sized work is timed: on the CPU call by call, on CUDA as the device's time and the host's apart.

A launch costs the host more than many a kernel costs the device, so events around one call measure the host. On CUDA,
therefore, many calls are captured in one graph, whose replay is timed and divided by their number. The calls go over
several sets of inputs, together larger than twice the L2 cache, so that each call finds its inputs in memory, as it
would in an attack whose model has passed in between. What the host spends on issuing a call is measured eagerly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median
from typing import Protocol

import torch

from afd.bench.document import Figure
from afd.bench.gpu import Gpu
from afd.bench.program import Say
from afd.bench.timing import CPU, Call, Timing, in_turn, interleaved

ENOUGH_CALLS, MOST_PASSES = 64, 4  # in one graph: so many calls, or so many passes over all sets
HOST_CALLS = 40  # timed on the host, at least
BURST = 4  # of them issued without a wait in between, few enough for the device's queue never to be full
COPY_RATE = "copy_gigabytes_per_second"


@dataclass(frozen=True)
class Calls:
    """One candidate's calls.

    Attributes:
        each: the same work, each on inputs of its own.
        before: what lets all of them do that work again.
    """

    each: Sequence[Call]
    before: Call | None = None

    @property
    def passes(self) -> int:
        """Over all of them in one graph."""
        return min(MOST_PASSES, math.ceil(ENOUGH_CALLS / len(self.each)))

    def once(self) -> list[object]:
        """Makes every call; their results are there together, so that each is written to memory of its own."""
        if self.before is not None:
            self.before()
        return [call() for call in self.each]

    def all_passes(self) -> None:
        """What a graph holds."""
        for _ in range(self.passes):
            self.once()


@dataclass(frozen=True)
class Taken:
    """Seconds of a call, and what else the clock tells of the candidate, for its figures."""

    seconds: Timing
    figures: Mapping[str, Figure] = field(default_factory=dict)


class Clock(Protocol):
    """A way to time candidates, and what it knows of the device."""

    measured: Mapping[str, Figure]

    def sets(self, footprints: Iterable[int]) -> int:
        """How many sets of inputs it wants, of works that touch so many bytes each."""

    def take(self, case: str, candidates: Mapping[str, Calls], rounds: int) -> dict[str, Taken]:
        """Times all candidates of a case in turn."""


def clock(device: torch.device, say: Say, warmup: int) -> Clock:
    """The clock of a device; `say` tells the user of what could not be captured, `warmup` counts calls on the CPU."""
    return GpuClock(Gpu(device), say) if device.type == "cuda" else CpuClock(warmup)


class CpuClock:
    """Seconds of one call after the other, each candidate on one set of inputs.

    Args:
        warmup: untimed calls of each candidate.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.measured: Mapping[str, Figure] = {}

    def sets(self, footprints: Iterable[int]) -> int:
        """One, whatever the size."""
        del footprints
        return 1

    def take(self, case: str, candidates: Mapping[str, Calls], rounds: int) -> dict[str, Taken]:
        """Times calls as they are, with what comes before them."""
        del case
        calls = {name: one.once if one.before else one.each[0] for name, one in candidates.items()}
        return {name: Taken(timing) for name, timing in interleaved(calls, rounds, self.warmup, CPU).items()}


class GpuClock:
    """The device's seconds a call by replays of a graph, and the host's microseconds apart.

    Args:
        gpu: the device.
        say: tells the user what could not be captured.
    """

    def __init__(self, gpu: Gpu, say: Say) -> None:
        self.gpu, self.say = gpu, say
        self.measured: Mapping[str, Figure] = {COPY_RATE: gpu.copy_rate() * 1e-9}

    def sets(self, footprints: Iterable[int]) -> int:
        """So many that all sets together are larger than twice the L2 cache, and two at least."""
        return max(2, 2 * self.gpu.l2_bytes // min(footprints, default=self.gpu.l2_bytes) + 1)

    def take(self, case: str, candidates: Mapping[str, Calls], rounds: int) -> dict[str, Taken]:
        """Times a graph of all candidates' calls, and eager calls for the host's part.

        Where a candidate cannot be captured, its eager calls are timed back to back; its figures and `say` tell.
        """
        host = {name: self._host_seconds(calls) for name, calls in candidates.items()}
        device = self._device_seconds(case, candidates, rounds)
        self.gpu.free()
        return {
            name: Taken(timing, {"device_us": timing.p50 * 1e6, "host_us": host[name] * 1e6, "timed": timed})
            for name, (timing, timed) in device.items()
        }

    def _device_seconds(self, case: str, candidates: Mapping[str, Calls], rounds: int) -> dict[str, tuple[Timing, str]]:
        """Of one call, and whether by graph or by events."""
        runs = {name: self._run(f"{case}, {name}", calls) for name, calls in candidates.items()}
        for run, _ in runs.values():
            run()
        taken = in_turn({name: run for name, (run, _) in runs.items()}, rounds, self.gpu.time)
        return {
            name: (Timing.of([one / (calls.passes * len(calls.each)) for one in taken[name]]), runs[name][1])
            for name, calls in candidates.items()
        }

    def _run(self, name: str, calls: Calls) -> tuple[Call, str]:
        """All calls of a candidate as one thing to be timed, and in which way."""
        try:
            return self.gpu.record(calls.all_passes), "graph"
        except RuntimeError as error:
            reason = str(error).split("\n", 1)[0]
            self.say(f"{name}: timed by events around eager calls, because a CUDA graph cannot record them: {reason}")
            return calls.all_passes, "events"

    def _host_seconds(self, calls: Calls) -> float:
        """Of issuing one call, the middle one of many; warms the candidate up."""
        self.gpu.warm(calls.once)
        taken = []
        for number, call in enumerate(islice(cycle(calls.each), max(HOST_CALLS, calls.passes * len(calls.each)))):
            if number % BURST == 0:
                self.gpu.wait()
            begin = self.gpu.now()
            call()
            taken.append(self.gpu.now() - begin)
        self.gpu.wait()
        return median(taken)


def share_of_copy(bytes_moved: int | None, seconds: float, measured: Mapping[str, Figure]) -> dict[str, Figure]:
    """The rate at which bytes were moved over that of the copy, where the clock has measured one."""
    rate = measured.get(COPY_RATE)
    if not isinstance(rate, float):
        return {}
    return {"share_of_copy": bytes_moved / seconds * 1e-9 / rate if bytes_moved else None}
