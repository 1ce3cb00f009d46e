"""Metering that survives a busy machine: candidates timed in turn, memory, host reads, and what arithmetic could do.

A kernel's launch costs the host more than many a kernel costs the device, so events around one call measure the host.
On CUDA, therefore, many calls are captured in one graph, whose replay is timed and divided by their number. The calls
go over several sets of inputs, together larger than twice the L2 cache, so that each call finds its inputs in memory,
as it would in an attack whose model has passed in between. What the host spends on issuing a call is measured eagerly.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle, islice
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afd.bench import base
from afd.bench.base import Say
from afd.bench.results import Candidate, Figure, Timing
from afd.graphs import Graph

Call = Callable[[], object]
Reading = Callable[[], float]  # seconds, once they are known
CPU = torch.device("cpu")


# --- Calls that are long beside a kernel's launch --------------------------------------------------------------------


def interleaved(candidates: Mapping[str, Call], repeats: int, warmup: int, device: torch.device) -> dict[str, Timing]:
    """Times calls in turn; on CUDA between events on the current stream."""
    for _ in range(warmup):
        for name, call in candidates.items():
            base.detail(f"warming up, {name}")
            call()
    taken = in_turn(candidates, repeats, between_events if device.type == "cuda" else on_cpu)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def in_turn(candidates: Mapping[str, Call], repeats: int, read: Callable[[Call], Reading]) -> dict[str, list[float]]:
    """Times every candidate once a repeat, so that a slow spell of the machine meets them all alike.

    Each repeat has its own order: what a call finds in the caches is left there by the call before it, and no
    candidate should always follow the same one.
    """
    order, shuffler = list(candidates), random.Random(0)
    readings: dict[str, list[Reading]] = {name: [] for name in candidates}
    for number in range(1, repeats + 1):
        shuffler.shuffle(order)
        for name in order:
            base.detail(f"repeat {number} of {repeats}, {name}")
            readings[name].append(read(candidates[name]))
    return {name: [reading() for reading in taken] for name, taken in readings.items()}


def on_cpu(call: Call) -> Reading:
    """Seconds that a call takes the host."""
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return lambda: seconds


def between_events(call: Call) -> Reading:
    """Seconds that the current stream takes from before a call to after it, read when the stream has passed both."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def read() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return read


# --- Calls as short as a kernel --------------------------------------------------------------------------------------

ENOUGH_CALLS, MOST_PASSES = 64, 4  # in one graph: so many calls, or so many passes over all sets
HOST_CALLS = 40  # timed on the host, at least
BURST = 4  # of them issued without a wait in between, few enough for the device's queue never to be full
COPY_RATE = "copy_gigabytes_per_second"
LEAST_COPIED, COPIES = 256 * 2**20, 15  # bytes of the copy that bandwidth is measured by, and how many of them
HEAD_START = 200_000  # cycles that the device is kept busy for, about 0.1 ms, while the host issues what is timed


@dataclass(frozen=True)
class Calls:
    """One candidate's calls."""

    each: Sequence[Call]  # the same work, each on inputs of its own
    before: Call | None = None  # what lets all of them do that work again

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


class CpuClock:
    """Seconds of one call after the other, each candidate on one set of inputs, after some untimed calls."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.measured = warmup, dict[str, Figure]()

    def sets(self, _footprint: int) -> int:
        """One, whatever the size."""
        return 1

    def take(self, _case: str, candidates: Mapping[str, Calls], repeats: int) -> dict[str, Candidate]:
        """Times calls as they are, with what comes before them."""
        calls = {name: one.once if one.before else one.each[0] for name, one in candidates.items()}
        return {name: Candidate(timing) for name, timing in interleaved(calls, repeats, self.warmup, CPU).items()}


class GpuClock:
    """The device's seconds a call by replays of a graph, and the host's microseconds apart.

    On the current CUDA device; `say` tells the user what could not be captured.
    """

    now = staticmethod(time.perf_counter)
    free = staticmethod(torch.cuda.empty_cache)  # the memory of graphs that nobody holds any more

    def __init__(self, device: torch.device, say: Say) -> None:
        self.device, self.say = device, say
        self.l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        self.measured: Mapping[str, Figure] = {COPY_RATE: self.copy_rate() * 1e-9}

    def sets(self, footprint: int) -> int:
        """So many sets of inputs, of that many bytes each, that together exceed twice the L2 cache; two at least."""
        return max(2, 2 * self.l2_bytes // footprint + 1)

    def take(self, case: str, candidates: Mapping[str, Calls], repeats: int) -> dict[str, Candidate]:
        """Times a graph of all candidates' calls in turn, and eager calls for the host's part.

        Where a candidate cannot be captured, its eager calls are timed back to back; its figures and `say` tell.
        """
        host = {name: self.host_seconds(calls) for name, calls in candidates.items()}
        runs: dict[str, Call] = {name: calls.all_passes for name, calls in candidates.items()}
        timed = dict.fromkeys(candidates, "events")
        for name, calls in candidates.items():
            try:
                runs[name], timed[name] = self.record(calls.all_passes), "graph"
            except RuntimeError as error:
                why = f"because a CUDA graph cannot record them: {str(error).splitlines()[0]}"
                self.say(f"{case}, {name}: timed by events around eager calls, {why}")
        for run in runs.values():
            run()
        taken = in_turn(runs, repeats, self.seconds)
        del run
        runs.clear()
        self.free()
        found = {}
        for name, calls in candidates.items():
            timing = Timing.of([one / (calls.passes * len(calls.each)) for one in taken[name]])
            apart = {"device_us": timing.p50 * 1e6, "host_us": host[name] * 1e6}
            found[name] = Candidate(timing, {**apart, "timed": timed[name]})
        return found

    def host_seconds(self, calls: Calls) -> float:
        """Of issuing one call, the middle one of many; warms the candidate up."""
        self.warm(calls.once)
        taken = []
        for number, call in enumerate(islice(cycle(calls.each), max(HOST_CALLS, calls.passes * len(calls.each)))):
            if number % BURST == 0:
                self.wait()
            begin = self.now()
            call()
            taken.append(self.now() - begin)
        self.wait()
        return median(taken)

    def wait(self) -> None:
        """Until everything that was issued is done."""
        torch.cuda.synchronize(self.device)

    def warm(self, work: Call) -> None:
        """Runs it on a stream beside, as a capture does: libraries choose their algorithms, and state is made."""
        here, beside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            work()
        here.wait_stream(beside)
        self.wait()

    def record(self, work: Call) -> Call:
        """A replay of it as a CUDA graph, whose memory it holds; a RuntimeError if it waits for the device, say."""
        graph = Graph(self.device)
        with graph.capture():
            work()
        return graph.replay

    def seconds(self, work: Call) -> Reading:
        """Seconds of the device by events, from the first launch to the last, the way to the first not counted."""
        torch.cuda._sleep(HEAD_START)
        return between_events(work)

    def copy_rate(self) -> float:
        """Bytes a second, read and written, of a copy that the device's cache cannot hold."""
        source = torch.zeros(max(4 * self.l2_bytes, LEAST_COPIED), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.warm(copy := partial(target.copy_, source))
        readings = [self.seconds(copy) for _ in range(COPIES)]
        return 2 * source.numel() / median(read() for read in readings)


Clock = CpuClock | GpuClock


def clock(device: torch.device, say: Say, warmup: int) -> Clock:
    """The clock of a device; `say` tells what could not be captured, `warmup` counts calls on the CPU."""
    return GpuClock(device, say) if device.type == "cuda" else CpuClock(warmup)


# --- Memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes allocated at the worst moment of a call, beyond those before it; what it returns counts while it runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profile: Any = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
    with _silent_stderr(), profile:  # the profiler says there when it starts and stops, and what it did not see begin
        call()
    events = profile.profiler.kineto_results.events()
    found: list[tuple[int, int]] = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((change for _, change in found), initial=0))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Nothing reaches the process's standard error, not even what C++ writes."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# --- Host reads ------------------------------------------------------------------------------------------------------

READS = {
    "_local_scalar_dense",  # item(), float(), bool(): an if on a tensor
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",  # the values decide the shape
    "equal",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host needs values from the device, the same way on a CPU, where none waits.

    They are: reading a scalar, operations whose output's shape hangs on values (nonzero, masked_select, unique,
    indexing with a mask, repeat_interleave of unknown length), torch.equal, and copies from another device to the
    host, in backward passes too. Not seen: what a CUDA graph replays (it holds no such operation), synchronisation by
    other means, and on a CPU a move to NumPy. A compiled model runs uncompiled meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts, and lets the operation pass."""
        kwargs = kwargs or {}
        self.count += func.namespace == "aten" and _reads(func.overloadpacket.__name__, args, kwargs)
        return func(*args, **kwargs)


def _reads(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "_to_copy":
        return bool(args[0].device.type != "cpu" and str(kwargs.get("device", args[0].device)).startswith("cpu"))
    if name == "copy_":
        return isinstance(args[1], Tensor) and args[0].device.type == "cpu" != args[1].device.type
    return name in READS


# --- Arithmetic ------------------------------------------------------------------------------------------------------

SMALLEST, SIZES = 256, {"cpu": 2048, "cuda": 8192}  # of products, powers of two
PRODUCTS, LONGEST = 3, 0.5  # times that one is tried; and seconds that it may take


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may multiply float32 with ten bits of mantissa; by default torch does so in convolutions alone."""
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    flags = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with cudnn.flags(**flags, allow_tf32=allowed):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Product:
    """A matrix product to time."""

    call: Call
    flops: int  # a multiplication and an addition each


def products(kind: str, device: torch.device) -> dict[str, Product]:
    """Matrix products in fp32, tf32 or bf16, of which the fastest tells a device's rate.

    Square ones, and on a CPU those that 3x3 convolutions are, since each library has kernels of its own: MKL's products
    take AVX2 on AMD's CPUs, oneDNN's convolutions the widest registers that there are. Of each form the two largest up
    to `SIZES`, or as far as can be waited for: some builds of torch emulate bfloat16 on a CPU.
    """
    found: dict[str, Product] = {}
    for form in (square, convolution) if device.type == "cpu" else (square,):
        size = SMALLEST
        made = {size: form(size, kind, device)}
        while size < SIZES[device.type] and 8 * _seconds(made[size].call, device) <= LONGEST:
            size *= 2
            made[size] = form(size, kind, device)
        found |= {f"{form.__name__} {kind} {size}": made[size] for size in sorted(made)[-2:]}
    return found


def _seconds(call: Call, device: torch.device) -> float:
    return interleaved({"a matrix product": call}, PRODUCTS, 1, device)["a matrix product"].p20


def square(size: int, kind: str, device: torch.device) -> Product:
    """Of two matrices of that size."""
    a, b = _random(kind, device, size, size), _random(kind, device, size, size)
    return Product(tf32(kind == "tf32")(partial(torch.mm, a, b)), 2 * size**3)


def convolution(size: int, kind: str, device: torch.device) -> Product:
    """About half as many operations, by a 3x3 convolution; without padding, so that all of them are done."""
    images, channels, side = size // 64, size // 8, 16
    shapes = (images, channels, side + 2, side + 2), (channels, channels, 3, 3)
    x, weight = (_random(kind, device, *shape).contiguous(memory_format=torch.channels_last) for shape in shapes)
    return Product(tf32(kind == "tf32")(partial(F.conv2d, x, weight)), 2 * images * side**2 * 9 * channels**2)


def _random(kind: str, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16 if kind == "bf16" else torch.float32)
