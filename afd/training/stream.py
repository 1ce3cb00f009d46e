"""The training batches from any position on, exactly as an uninterrupted run would have seen them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from afd.attacks.inputs import outside_inference
from afd.data import Batches
from afd.data.items import images_and_labels
from afd.errors import InputError
from afd.training import rng
from afd.training.loaders import Loader, checked

Batch = tuple[Tensor, Tensor]


@runtime_checkable
class _KnowsEpochs(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class Stream:
    """One process's training batches, epoch after epoch, on one device.

    A loader that draws from the global generators (a shuffling DataLoader) is replayed from their state at the start of
    the epoch, which is why that state is kept; batches that were played already are served again and thrown away.

    Args:
        loader: of the batches.
        device: where to put them.
        num_classes: labels are below it.
        rounds: batches of an epoch; what the loader has beyond is not asked for.
    """

    def __init__(self, loader: Loader, device: torch.device, num_classes: int, rounds: int) -> None:
        self.loader, self.device, self.num_classes, self.rounds = loader, device, num_classes, rounds
        self.at_start: dict[str, Any] | None = None  # the generators at the start of the epoch

    def epoch(self, epoch: int, played: int, now: dict[str, Any] | None) -> Iterator[Batch]:
        """The batches of an epoch after the first `played` ones.

        Args:
            epoch: counted from 1.
            played: batches played already; if there are any, `at_start` is set.
            now: the generators after these, where a run is resumed.

        Raises:
            InputError, InputTypeError: the loader has fewer batches than it said; in the first epoch, images are not
                finite floats in [0, 1] or labels not int64 classes of the model.
        """
        for knows in (self.loader, getattr(self.loader, "sampler", None)):
            if isinstance(knows, _KnowsEpochs):
                knows.set_epoch(epoch)
        if played == self.rounds:  # the epoch was played to its end
            if now is not None:
                rng.restore(now)
            return
        if played:
            assert self.at_start is not None
            rng.restore(self.at_start)
            batches = _from(self.loader, played)
        if now is not None:
            rng.restore(now)
        if not played:
            self.at_start = rng.capture()
            batches = _from(self.loader, 0)
        served = played
        for item in islice(batches, self.rounds - played):
            served += 1
            # the first epoch shows every batch once
            x, y = checked("train", item, self.num_classes, self.loader) if epoch == 1 else images_and_labels(item)
            yield self._here(x), self._here(y)
        if served < self.rounds:
            raise InputError(
                f"train has a length of {self.rounds} batches, but had no more than {served} in epoch {epoch}; an "
                "epoch is as long as the loader's __len__ says"
            )

    def _here(self, tensor: Tensor) -> Tensor:
        return outside_inference(tensor.to(self.device, non_blocking=True))


def _from(loader: Loader, played: int) -> Iterator[Any]:
    if isinstance(loader, Batches):
        return loader.starting_at(played)
    batches = iter(loader)
    for _ in islice(batches, played):
        pass
    return batches
