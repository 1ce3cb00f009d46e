"""Where a run computes: its device, the processes that share it (torchrun's), and the commit it is of.

``torchrun --nproc-per-node=2 script.py`` starts the processes; training and evaluation join them by themselves
(`join`). Gradients are averaged by DistributedDataParallel, in the model and in the discriminator.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from afd import processes
from afd.errors import AfdError, InputError
from afd.processes import LostError

CPU = torch.device("cpu")
STDERR = 2

# DistributedDataParallel's name for exchanging buffers at every pass, in this torch
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class Group:
    """The processes that train or evaluate together, as one of them sees it; without torchrun, this one alone.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, batches: int) -> range:
        """The batches of this process. Every batch belongs to one process, and is the same whatever their number."""
        return range(self.rank, batches, self.size)

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

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; all must ask."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def gather(self, what: Any) -> list[Any]:
        """Every process's `what`, by rank; all must ask."""
        if self.size == 1:
            return [what]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, what)
        return gathered

    def total(self, counts: Tensor) -> Tensor:
        """The sum of a tensor of counts over processes, on the CPU, for each of them; all must ask."""
        if self.size == 1:
            return counts.cpu()
        return self.sum(counts.to(self.device, torch.int64)).to(counts.dtype).cpu()

    def merged(self, counts: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
        """The sums of named counts over processes, for each of them; all must ask."""
        merged: dict[str, Counter[str]] = {}
        for part in self.gather(counts):
            for name, found in part.items():
                merged.setdefault(name, Counter()).update(found)
        return merged

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
        # torch holds it until the processes part; a thread of its own must not outlive that (`afd.processes`)
        self._group = None if self._alone else weakref.ref(dist.new_group(backend="gloo"))
        self._asked: tuple[Any, Tensor] | None = None

    def on(self, number: int) -> int:
        """What all processes said at the last call, the largest of it (at the first: 0); alone: `number`."""
        if self._alone:
            return number
        before, numbers = self._asked, torch.tensor(number, device="cpu")
        assert self._group is not None
        self._asked = (dist.all_reduce(numbers, dist.ReduceOp.MAX, self._group(), async_op=True), numbers)
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def forget(self) -> None:
        """Begins anew: what was said so far counts no more; all must ask."""
        if self._asked is not None:
            self._asked[0].wait()
        self._asked = None


def join(device: torch.device = CPU) -> Group:
    """The group this process belongs to; joins torchrun's processes if need be, and leaves them when it ends.

    Args:
        device: where this process computes.
    """
    return Group(*processes.join(), device)


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """This process's group for as long as the context lasts; a process group that it began ends with it.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: the device is none of these, or is not there.
        LostError: another process has failed.
    """
    chosen = device_named(device)
    joined_before = dist.is_available() and dist.is_initialized()
    group = join(chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        with processes.all_or_none():
            yield group
    finally:
        if not joined_before:
            processes.leave()


@cache
def _say_nothing_of_unused(device: torch.device) -> None:
    """Has torch say now, to nobody, what it says once a process: that all parameters were used, so why look for others.

    They are looked for because of models and steps that do leave some out, which nobody can know beforehand.
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


def number_in_environment(name: str, default: int, least: int = 0) -> int:
    """The whole number in an environment variable, such as torchrun sets.

    Raises:
        InputError: it is none.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.strip().isdecimal() or int(text) < least:
        raise InputError(f"the environment variable {name} is {text!r}; it must be a whole number >= {least}")
    return int(text)


def device_named(name: str) -> torch.device:
    """The torch device of a name, "auto" taking CUDA where there is one; each process of a machine has its own GPU.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}; allowed are auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"device is {name!r}; allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r}, but torch sees no CUDA device; allowed here are auto and cpu")
    if device.type == "cpu":
        return torch.device("cpu")
    index = number_in_environment("LOCAL_RANK", 0) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        told = name if device.index is not None else f"{name} of the process with LOCAL_RANK {index}"
        raise InputError(f"device is {told!r}; torch sees CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", index)


def commit() -> str | None:
    """The commit this package is checked out from, or None for an installed one.

    "-dirty" follows it where sources have local changes; results that were written meanwhile do not count.
    """

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    here = Path(__file__)
    tracked = git("ls-files", "--error-unmatch", here.name)  # a virtual environment may lie in some other repository
    if tracked is None:
        return None
    changed = git("status", "--porcelain", "--", str(here.parent), str(here.parents[1] / "csrc"))
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"
