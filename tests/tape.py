"""What a CUDA graph is, on the CPU: the ops of one run, to be run again with the numbers and on the memory they had.

Whatever Python did between them is not done again. What is read back to the host cannot be captured. As on a GPU, a
capture computes nothing: it runs the ops, then undoes what they wrote, and leaves NaN in what they made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afd.ops import native
from afd.ops.spectral import native as spectral_native

# what reads a value back, or copies a number of the host's to the device
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::lift_fresh"}


class Tape(TorchDispatchMode):
    """In the place of `afd.graphs.Graph`."""

    recording = False  # whether any is

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Any] = []
        self.kept: list[Any] = []  # alive, as the memory of a graph is
        self.made: list[Tensor] = []
        self.before: dict[int, tuple[Any, Any]] = {}
        self.born: set[int] = set()
        self.inside = False
        self.replays = 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        """See `Graph`."""
        generator, launch = torch.get_rng_state(), native.launch

        def noted(*arguments: Any) -> None:
            if not self.inside:
                self.kept.append(arguments)
                self.runs.append(lambda: launch(*arguments))
            launch(*arguments)

        native.launch = spectral_native.launch = noted
        Tape.recording = True
        try:
            with self:
                yield
        finally:
            Tape.recording = False
            native.launch = spectral_native.launch = launch
            for tensor in self.made:
                if tensor.is_floating_point() and not tensor.is_inference():
                    with torch.no_grad():
                        tensor.detach().fill_(float("nan"))
            for storage, content in self.before.values():
                storage.copy_(content)
            torch.set_rng_state(generator)

    def turn(self) -> AbstractContextManager[None]:
        """See `Graph`; the CPU does one thing after the other anyway."""
        return nullcontext()

    def replay(self) -> None:
        """Runs it all again."""
        self.replays += 1
        with torch.no_grad():
            for run in self.runs:
                run()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.name() in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.born and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        self.inside = True
        try:
            out = function(*args, **kwargs)
        finally:
            self.inside = False
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        fresh = [tensor.untyped_storage().data_ptr() not in known for tensor in results]
        self.born |= {t.untyped_storage().data_ptr() for t, new in zip(results, fresh, strict=True) if new}
        self.kept.append((args, kwargs, out))
        self.made += [tensor for tensor, new in zip(results, fresh, strict=True) if new]
        if any(fresh) or function._schema.is_mutable:
            self.runs.append(lambda: self._again(function, args, kwargs, results, fresh))
        return out

    @staticmethod
    def _again(function: Any, args: Any, kwargs: Any, results: list[Tensor], fresh: list[bool]) -> None:
        again = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for target, source, new in zip(results, again, fresh, strict=True):
            if new:
                target.detach().copy_(source)
