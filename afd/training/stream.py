"""The training batches from any position on, exactly as an uninterrupted run would have seen them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from afd.attacks.inputs import check_batch
from afd.data import Batches
from afd.errors import InputError
from afd.training import rng

Batch = tuple[Tensor, Tensor]
BOUNDS = (0.0, 1.0)  # of an image
Loader = Iterable[Batch]
"""Any re-iterable of (images [N, ...] in [0, 1], labels [N] int64): a DataLoader, `Batches`, a list.

Where it has a ``set_epoch(epoch)``, or its ``sampler`` has, that is called before each pass.
"""


@runtime_checkable
class _KnowsEpochs(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


def rounds_in(loader: Loader) -> int:
    """Batches of one pass.

    Raises:
        InputError: the loader has none, or does not say.
    """
    try:
        rounds = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"train is a {type(loader).__name__} without a length; give it a __len__ in batches") from None
    if not rounds:
        raise InputError("train holds no images")
    return rounds


class Stream:
    """One process's training batches, epoch after epoch, on one device.

    A loader that draws from the global generators (a shuffling DataLoader) is replayed from their state at the start of
    the epoch, which is why that state is kept; batches that were played already are served again and thrown away.
    """

    def __init__(self, loader: Loader, device: torch.device, num_classes: int) -> None:
        self.loader, self.device, self.num_classes = loader, device, num_classes
        self.at_start: dict[str, Any] | None = None  # the generators at the start of the epoch

    def epoch(self, epoch: int, played: int, now: dict[str, Any] | None) -> Iterator[Batch]:
        """The batches of an epoch after the first `played` ones.

        Args:
            epoch: counted from 1.
            played: batches played already; if there are any, `at_start` is set.
            now: the generators after these, where a run is resumed.

        Raises:
            InputError, InputTypeError: in the first epoch, images are not finite floats in [0, 1] or labels not int64
                classes of the model.
        """
        for knows in (self.loader, getattr(self.loader, "sampler", None)):
            if isinstance(knows, _KnowsEpochs):
                knows.set_epoch(epoch)
        if played:
            assert self.at_start is not None
            rng.restore(self.at_start)
            batches = _from(self.loader, played)
        if now is not None:
            rng.restore(now)
        if not played:
            self.at_start = rng.capture()
            batches = _from(self.loader, 0)
        for x, y in batches:
            if epoch == 1:
                self._check(x, y)
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _check(self, x: Tensor, y: Tensor) -> None:
        """Looks at the values of a batch; the first epoch shows every batch once. `Batches` were looked at before."""
        largest = self.loader.images.num_classes - 1 if isinstance(self.loader, Batches) else check_batch(x, y, BOUNDS)
        if largest >= self.num_classes:
            raise InputError(f"y holds the label {largest}; the model has classes 0 ... {self.num_classes - 1}")


def _from(loader: Loader, played: int) -> Iterator[Batch]:
    if isinstance(loader, Batches):
        return loader.starting_at(played)
    batches = iter(loader)
    for _ in islice(batches, played):
        pass
    return batches
