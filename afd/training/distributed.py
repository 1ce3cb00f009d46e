"""One process or several: who takes part, how gradients and figures are averaged, who writes files.

``torchrun --nproc-per-node=2 script.py`` starts the processes; the trainer joins them by itself. Gradients are averaged
by DistributedDataParallel, in the model and in the discriminator.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from afd import processes
from afd.errors import AfdError
from afd.processes import LostError, launched, leave

__all__ = ["SYNC_BUFFERS", "Agreement", "Group", "LostError", "join", "launched", "leave"]

STDERR = 2

# DistributedDataParallel's name for exchanging buffers at every pass, in this torch
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class Group:
    """The processes that train one model together; without torchrun, this one alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over the processes, which start from rank 0's weights.

        Buffers are not exchanged at every pass: the game passes twice before it goes backward, and would trip over it.
        """
        if self.size == 1:
            return module
        # a feature split may leave layers without a gradient, and so may the user's own model
        settings: dict[str, Any] = {SYNC_BUFFERS: False}
        _say_nothing_of_unused(next(module.parameters(), torch.empty(0)).device)
        return DistributedDataParallel(module, find_unused_parameters=True, **settings)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, a new tensor; all must ask."""
        total = self.sum(values)
        return total / self.size if self.size > 1 else total

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, a new tensor; all must ask."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers; all must ask."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def gather(self, what: Any) -> list[Any]:
        """Every process's `what`, by rank; all must ask."""
        if self.size == 1:
            return [what]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, what)
        return gathered

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one process fails in this context, all raise; all must enter it, and none waits for others in it.

        Raises:
            AfdError: this process's own.
            LostError: another's, with its number.
        """
        failure: AfdError | None = None
        try:
            yield
        except AfdError as error:
            failure = error
        if self.size > 1:
            for rank, reason in enumerate(self.gather(None if failure is None else str(failure))):
                if reason is not None and failure is None:
                    failure = LostError(f"process {rank} failed: {reason}")
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every process rank 0's buffers: BatchNorm's running statistics, which each gathers by itself."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


class Agreement:
    """The largest of the processes' numbers, as it was at the call before: nobody waits, neither for others nor a GPU.

    All processes must make one, and ask equally often.

    Args:
        group: of the processes.
    """

    def __init__(self, group: Group) -> None:
        self._alone = group.size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo")
        self._asked: tuple[Any, Tensor] | None = None

    def on(self, number: int) -> int:
        """What all processes said at the last call, the largest of it (at the first: 0); alone: `number`."""
        if self._alone:
            return number
        before, numbers = self._asked, torch.tensor(number, device="cpu")
        self._asked = (dist.all_reduce(numbers, dist.ReduceOp.MAX, self._group, async_op=True), numbers)
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def forget(self) -> None:
        """Begins anew: what was said so far counts no more; all must ask."""
        if self._asked is not None:
            self._asked[0].wait()
        self._asked = None


def join() -> Group:
    """The group this process belongs to; joins torchrun's processes if need be, and leaves them when it ends."""
    return Group(*processes.join())


@cache
def _say_nothing_of_unused(device: torch.device) -> None:
    """Has torch say now, to nobody, what it says once a process: that all parameters were used, so why look for others.

    They are looked for because of models and rounds that do leave some out, which nobody can know beforehand.
    """
    small = DistributedDataParallel(nn.PReLU(device=device), find_unused_parameters=True)
    with _unheard():
        small(torch.zeros(1, 1, device=device))


@contextmanager
def _unheard() -> Iterator[None]:
    """What is written to standard error by C++, past Python, is lost in this context."""
    sys.stderr.flush()
    kept, nowhere = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STDERR)
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nowhere)
