"""One process or several: who takes part, how gradients and figures are averaged, who writes files.

``torchrun --nproc-per-node=2 script.py`` starts the processes; the trainer joins them by itself. Gradients are averaged
by DistributedDataParallel, in the model and in the discriminator.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from afd.errors import AfdError

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
            AfdError: this process's own, or another's, with its number.
        """
        failure: AfdError | None = None
        try:
            yield
        except AfdError as error:
            failure = error
        if self.size > 1:
            for rank, reason in enumerate(self.gather(None if failure is None else str(failure))):
                if reason is not None and failure is None:
                    failure = AfdError(f"process {rank} failed: {reason}")
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


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join() -> Group:
    """The group this process belongs to; joins torchrun's processes if need be."""
    if launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # torchrun's store outlives the workers; restarted ones must not find the addresses of those that died
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    if not (dist.is_available() and dist.is_initialized()):
        return Group()
    return Group(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
