"""A CUDA device as benchmarks of kernels need it: its clock, its graphs, and what it copies in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from afd.attacks.capture import Graph
from afd.bench.timing import Call, Reading, between_events

LEAST_COPIED = 256 * 2**20  # bytes of the copy that bandwidth is measured by
TRIES = 15
HEAD_START = 200_000  # cycles that the device is kept busy for, about 0.1 ms, while the host issues what is timed


class Gpu:
    """One CUDA device, the current one.

    Args:
        device: which.

    Attributes:
        l2_bytes: size of its L2 cache.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size

    @staticmethod
    def now() -> float:
        """Seconds by the host's clock."""
        return time.perf_counter()

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

    def record(self, work: Call) -> Callable[[], None]:
        """Captures it in a CUDA graph; what is returned replays it, and holds the graph's memory.

        Raises:
            RuntimeError: it does something that cannot be captured, such as waiting for the device.
        """
        graph = Graph(self.device)
        with graph.capture():
            work()
        return graph.replay

    def time(self, work: Call) -> Reading:
        """Seconds of the device by events, from the first launch to the last, the way to the first not counted."""
        torch.cuda._sleep(HEAD_START)
        return between_events(work)

    def free(self) -> None:
        """Gives back the memory of graphs that nobody holds any more."""
        torch.cuda.empty_cache()

    def copy_rate(self) -> float:
        """Bytes a second, read and written, of a copy within the device that its cache cannot hold."""
        source = torch.zeros(copied_bytes(self.l2_bytes), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)

        self.warm(copy)
        readings = [self.time(copy) for _ in range(TRIES)]
        return 2 * source.numel() / median(read() for read in readings)


def copied_bytes(l2_bytes: int) -> int:
    """Of the source of that copy."""
    return max(4 * l2_bytes, LEAST_COPIED)
