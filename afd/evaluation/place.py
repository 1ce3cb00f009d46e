"""Where an evaluation runs: one process, or several under torchrun that share the batches."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from afd import processes
from afd.errors import InputError


@dataclass(frozen=True)
class Place:
    """One process of an evaluation.

    Attributes:
        device: where models and images live.
        rank: number of this process.
        processes: how many there are.
    """

    device: torch.device
    rank: int = 0
    processes: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes the report."""
        return self.rank == 0

    def share(self, batches: int) -> range:
        """The batches of this process. Every batch belongs to one process, and is the same whatever their number."""
        return range(self.rank, batches, self.processes)

    def total(self, counts: Tensor) -> Tensor:
        """The sum of a tensor of counts over all processes, on the CPU, for each of them."""
        if self.processes == 1:
            return counts.cpu()
        summed = counts.to(self.device, torch.int64)
        dist.all_reduce(summed)
        return summed.to(counts.dtype).cpu()

    def merged(self, counts: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
        """The sums of named counts over all processes, for each of them."""
        if self.processes == 1:
            return counts
        gathered: list[dict[str, Counter[str]]] = [{} for _ in range(self.processes)]
        dist.all_gather_object(gathered, counts)
        merged: dict[str, Counter[str]] = {}
        for part in gathered:
            for name, found in part.items():
                merged.setdefault(name, Counter()).update(found)
        return merged

    def wait(self) -> None:
        """Until every process is here."""
        if self.processes > 1:
            dist.barrier()


@contextmanager
def placed(device: str) -> Iterator[Place]:
    """This process's place: alone, or as torchrun says, with its process group for as long as the context lasts.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: the device is none of these, or is not there.
    """
    chosen = device_named(device)
    joined = dist.is_available() and dist.is_initialized()
    rank, count = processes.join()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        with processes.all_or_none():
            yield Place(chosen, rank, count)
    finally:
        if not joined:
            processes.leave()


def counted(name: str, default: int, least: int = 0) -> int:
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
    index = counted("LOCAL_RANK", 0) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        told = name if device.index is not None else f"{name} of the process with LOCAL_RANK {index}"
        raise InputError(f"device is {told!r}; torch sees CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", index)
