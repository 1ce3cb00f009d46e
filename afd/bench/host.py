"""How often an attack makes the host wait for the device, counted the same way on a CPU, where nobody waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",  # item(), float(), bool(): an if on a tensor
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",  # the values decide the shape
    "equal",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host needs values from the device.

    They are: reading a scalar, operations whose output's shape hangs on values (nonzero, masked_select, unique,
    indexing with a mask, repeat_interleave of unknown length), torch.equal, and copies from another device to the
    host. Seen is what passes torch's dispatcher while the mode is on, backward passes included.

    Not seen: what a CUDA graph replays (it holds no such operation, or it could not have been recorded);
    synchronisation asked for by other means (torch.cuda.synchronize, streams, a blocking copy to the device); and on
    a CPU a move to NumPy, which copies nothing there. A model under torch.compile runs uncompiled while the mode is
    on, and is counted as such.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Counts, and lets the operation pass."""
        kwargs = kwargs or {}
        self.count += _reads(func, args, kwargs)
        return func(*args, **kwargs)


def _reads(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if func.namespace != "aten":
        return False
    name = func.overloadpacket.__name__
    if name in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "_to_copy":
        return bool(args[0].device.type != "cpu" and str(kwargs.get("device", args[0].device)).startswith("cpu"))
    if name == "copy_":
        return isinstance(args[1], Tensor) and args[0].device.type == "cpu" != args[1].device.type
    return name in READS
