"""CUDA graphs, of attacks and of whole training steps: capture, replay, and a cache of them by key."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from afd.errors import warn_caller

KEPT, REMEMBERED = 4, 64  # graphs of one cache, each with memory of its own; and keys that were met
Captured = TypeVar("Captured")


class CaptureWarning(UserWarning):
    """An attack or a training step cannot be captured in a CUDA graph and runs eagerly instead."""


class NotCapturableError(RuntimeError):
    """A capture went well, but replays of it would not do what the call does; the message says why."""


@dataclass
class Entry(Generic[Captured]):
    """What is known of one key.

    Attributes:
        captured: its graph, with all that a replay needs; None before its capture.
        note: what the cache's user has to remember of the eager runs.
        used_in: the work (`GraphCache.begin`) that it was captured or replayed in last.
    """

    captured: Captured | None = None
    note: Any = None
    used_in: int = -1


class GraphCache(Generic[Captured]):
    """Captured CUDA graphs by key, those used last kept.

    A key stands for all that a replay does not look at again. It is captured when it is met for the second time: the
    first, eager run lets libraries choose their algorithms and state be made, and what is met once only costs nothing.

    Args:
        user: of the graphs, for messages: "the attack runs", say.

    Attributes:
        refused: whether nothing is captured or replayed any more.
    """

    def __init__(self, user: str) -> None:
        self.user, self.refused = user, False
        self._entries: OrderedDict[Hashable, Entry[Captured]] = OrderedDict()
        self._work = 0

    def begin(self) -> None:
        """Work begins that may replay several graphs, of which none is to drive out another."""
        self._work += 1

    def get(self, key: Hashable) -> Entry[Captured] | None:
        """What is known of a key, which counts as used; None if it was not met before."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def met(self, key: Hashable, note: Any = None) -> None:
        """An eager run is done; `key` is as it stands after the run, which may make state that is part of it."""
        self._entries.setdefault(key, Entry()).note = note
        self._entries.move_to_end(key)
        self._drop_oldest()

    def captured(self, entry: Entry[Captured], capture: Callable[[], Captured]) -> Captured | None:
        """The graph of a key that was met, captured now if it was not yet; None where the call has to run eagerly.

        Args:
            entry: what `get` has found for the key.
            capture: makes the graph.

        Warns:
            CaptureWarning: a capture failed; there are no more.
        """
        if entry.captured is None:
            if sum(one.captured is not None and one.used_in == self._work for one in self._entries.values()) >= KEPT:
                return None  # one more would drive out what this very work has replayed, and so on in the next
            try:
                entry.captured = capture()
            except NotCapturableError as error:
                self.refuse(str(error))
                return None
            except RuntimeError as error:  # raised inside the capture: the eager run before it went well
                self.refuse(f"its capture failed: {error}")
                return None
            self._drop_oldest()
        entry.used_in = self._work
        return entry.captured

    def drop(self, key: Hashable) -> None:
        """Forgets a key and its graph."""
        self._entries.pop(key, None)

    def refuse(self, reason: str) -> None:
        """Captures and replays nothing any more, and says why."""
        self.refused = True
        self._entries.clear()
        warn_caller(f"{self.user} without a CUDA graph, because {reason}", CaptureWarning)

    def _drop_oldest(self) -> None:
        with_memory = [key for key, entry in self._entries.items() if entry.captured is not None]
        for key in with_memory[: max(0, len(with_memory) - KEPT)]:
            del self._entries[key]
        while len(self._entries) > REMEMBERED:
            self._entries.popitem(last=False)


class Graph:
    """A CUDA graph on one device, captured on a stream of that device and replayed in order from any stream.

    Args:
        device: whose work is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._graph = device, torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Captures what the body launches; torch is as it was before if that fails.

        Other threads may use CUDA meanwhile (a DataLoader's pins memory), which the default mode of a capture answers
        by ending both. Where a capture fails, `torch.cuda.graph` leaves its own stream current, the allocator in a
        state in which memory that other streams have used is never free again, and the random generator believing that
        it is still captured.

        Raises:
            RuntimeError: something that was done cannot be captured.
        """
        with guard(self.device):
            pool, here = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
            stream = capture_stream(here.device_index)
            capture = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
            try:
                with torch.cuda.stream(here), capture:
                    yield
            except RuntimeError:
                _release(here.device_index, pool)
                _heal(self.device)
                raise

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside: inputs are copied in, `replay`, and outputs copied out, on the device after the turn before.

        The tensors that a graph reads and writes are the same at every replay, and all graphs of a device share what
        libraries keep for the stream that they were captured on; but calls may come from two streams.
        """
        here = torch.cuda.current_stream(self.device)
        done = _last_turn.setdefault(here.device_index, torch.cuda.Event())
        here.wait_event(done)
        yield
        done.record(here)

    def replay(self) -> None:
        """Runs what was captured, on the current stream."""
        with guard(self.device):
            self._graph.replay()


_streams: dict[int, torch.cuda.Stream] = {}
_last_turn: dict[int, torch.cuda.Event] = {}


def capture_stream(index: int) -> torch.cuda.Stream:
    """The stream that graphs are captured on: one a device (torch's own default belongs to whichever came first)."""
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
    """One capture that goes well: only its end tells the random generator that nothing is captured any more."""
    with contextlib.suppress(RuntimeError):  # nothing works on this device any more; the first error says why
        number = torch.zeros((), device=device)
        stream, graph = capture_stream(number.get_device()), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            number.add_(1)


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a CUDA device is the current one: streams, events and captures are those of the current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturable(tensor: Tensor) -> bool:
    """Whether work on a tensor can be captured now: on CUDA, and not inside of another capture."""
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


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
