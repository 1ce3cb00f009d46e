"""Recording CUDA graphs, for attacks and for whole training rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class CaptureWarning(UserWarning):
    """An attack or a round cannot be recorded in a CUDA graph and runs step by step instead."""


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """`torch.cuda.graph`, and torch as it was before if the capture fails.

    Where a capture ends in an error, `torch.cuda.graph` leaves its own stream current, and the allocator in a state in
    which memory that other streams have used is never free again.
    """
    pool, here = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool=pool):
            yield
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # torch has ended it: the capture failed before or after
            torch._C._cuda_endAllocateToPool(here.device_index, pool)
            torch._C._cuda_releasePool(here.device_index, pool)
        raise


def under_way() -> bool:
    """Whether a graph is being recorded on the current stream: graphs do not nest."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
