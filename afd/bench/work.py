"""A piece of work for ``afd bench kernels``: one op at one size, and the ways to do it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd.bench.timing import Call


@dataclass(frozen=True)
class Work:
    """One op at one size.

    Attributes:
        name: op, norm, size and dtype.
        native: through `afd.ops`.
        eager: the same in plain PyTorch, and what torch.compile is given.
        floor: torch's own way to do the least that must be done: a copy, or a layer without its spectral norm.
        footprint: bytes that it finds in memory when it begins, whether to read or to write in place.
        bytes_moved: read and written, where the floor is a copy; else None.
        compiles: whether torch.compile takes seconds with it, not minutes.
        reference: the exact formulation, where it is not the eager one.
        written: the tensors it works on in place.
        zeroed: those of them that must be zero before it does the same again.
    """

    name: str
    native: Call
    eager: Call
    floor: Call
    footprint: int
    bytes_moved: int | None = None
    compiles: bool = True
    reference: Call | None = None
    written: tuple[Tensor, ...] = ()
    zeroed: tuple[Tensor, ...] = ()


def copying(bytes_moved: int, device: torch.device) -> Call:
    """The floor of a work that is bound by memory: torch's copy of as many bytes, half of them read, half written."""
    source = torch.rand(bytes_moved // 8, device=device)  # float32: half of the bytes
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def held(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)
