"""Recording CUDA graphs, for attacks and for whole training rounds: what torch leaves to its users to get right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class CaptureWarning(UserWarning):
    """An attack or a round cannot be recorded in a CUDA graph and runs step by step instead."""


class Graph:
    """A CUDA graph on one device, recorded on a stream of that device and replayed in order from any stream.

    Args:
        device: whose work is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._graph = device, torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Records what the body launches; torch is as it was before if that fails.

        Other threads may use CUDA meanwhile (a DataLoader's pins memory), which the default mode of a capture answers
        by ending both. Where a capture fails, `torch.cuda.graph` leaves its own stream current, the allocator in a
        state in which memory that other streams have used is never free again, and the random generator believing that
        it is still recorded.

        Raises:
            RuntimeError: something that was done cannot be recorded.
        """
        with guard(self.device):
            pool, here = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
            stream = capture_stream(here.device_index)
            recording = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
            try:
                with torch.cuda.stream(here), recording:
                    yield
            except RuntimeError:
                _release(here.device_index, pool)
                _heal(self.device)
                raise

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside: inputs are copied in, `replay`, and outputs copied out, on the device after the turn before.

        The tensors that a graph reads and writes are the same at every replay, and all graphs of a device share what
        libraries keep for the stream that they were recorded on; but calls may come from two streams.
        """
        here = torch.cuda.current_stream(self.device)
        done = _last_turn.setdefault(here.device_index, torch.cuda.Event())
        here.wait_event(done)
        yield
        done.record(here)

    def replay(self) -> None:
        """Runs what was recorded, on the current stream."""
        with guard(self.device):
            self._graph.replay()


class Later:
    """A truth that is found on the device, to be read by the host once it is there, without a wait in between."""

    def __init__(self, truth: Tensor) -> None:
        self._host, self._event = truth, None
        if truth.is_cuda:
            self._host = torch.empty(truth.shape, dtype=truth.dtype, device="cpu", pin_memory=True)
            self._host.copy_(truth, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(truth.device))

    @property
    def there(self) -> bool:
        """Whether `read` would not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> bool:
        """The truth; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a CUDA device is the current one: streams, events and captures are those of the current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def recordable(tensor: Tensor) -> bool:
    """Whether work on a tensor can be recorded now: on CUDA, and not where a graph is recorded already."""
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


_streams: dict[int, torch.cuda.Stream] = {}
_last_turn: dict[int, torch.cuda.Event] = {}


def capture_stream(index: int) -> torch.cuda.Stream:
    """The stream that graphs are recorded on: one a device (torch's own default belongs to whichever came first)."""
    if index not in _streams:
        _streams[index] = torch.cuda.Stream(index)
    return _streams[index]


def _release(index: int, pool: Any) -> None:
    """Ends an allocation to a graph's memory that a failed capture has left open."""
    ends = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # its name, by torch's version
    end = next(getattr(torch._C, name) for name in ends if hasattr(torch._C, name))
    with contextlib.suppress(RuntimeError):  # torch has ended it: the capture failed before or after
        end(index, pool)
        torch._C._cuda_releasePool(index, pool)


def _heal(device: torch.device) -> None:
    """One capture that goes well: only its end tells the random generator that nothing is recorded any more."""
    with contextlib.suppress(RuntimeError):  # nothing works on this device any more; the first error says why
        number = torch.zeros((), device=device)
        stream, graph = capture_stream(number.get_device()), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            number.add_(1)
