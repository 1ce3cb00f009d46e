"""The training batches from any position on, exactly as an uninterrupted run would have seen them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from afd.attacks.inputs import outside_inference
from afd.data import Batches
from afd.data.images import images_and_labels, index_in
from afd.errors import InputError, warn_caller
from afd.training import loader_state, rng
from afd.training.loaders import Loader, checked

Item = tuple[Tensor, Tensor | None, Tensor | None]  # images, labels, index


@runtime_checkable
class _KnowsEpochs(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class Stream:
    """One process's training batches, epoch after epoch, on one device.

    A loader that draws at random (a shuffling DataLoader) is replayed from the state of the generators at the start of
    the epoch, which is why that is kept: of the global ones and of all that `loader_state` finds in loaders. Batches
    that were played already are served again and thrown away. Workers that a DataLoader keeps from pass to pass
    (``persistent_workers``) are begun anew at every epoch, as only that makes an epoch repeatable.

    Args:
        loader: of the batches.
        device: where to put them.
        num_classes: labels are below it.
        rounds: batches of an epoch; what the loader has beyond is not asked for.
        validation: the other loader of the run, whose state is kept with this one's.
        earlier: the stream of an earlier part of this run in the same process, if there was one.
        labels: whether batches must have labels.
    """

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        num_classes: int,
        rounds: int,
        validation: Loader | None = None,
        earlier: Stream | None = None,
        labels: bool = True,
    ) -> None:
        self.loader, self.device, self.num_classes, self.rounds = loader, device, num_classes, rounds
        self.labels = labels
        self.at_start: dict[str, Any] | None = None if earlier is None else earlier.at_start
        self.loaders = {"train": loader, "validation": validation}
        # as a new process finds them
        self.before: dict[str, Any] = loader_state.numbers(self.loaders) if earlier is None else earlier.before

    def capture(self) -> dict[str, Any]:
        """The generators as they are now, those of the loaders included: plain content of a checkpoint."""
        return {**rng.capture(), loader_state.LOADERS: loader_state.capture(self.loaders, self.before)}

    def restore(self, state: dict[str, Any], own: bool = True) -> None:
        """Puts the generators where `capture` found them; `own`: also what loaders said by ``state_dict()``."""
        if loader_state.LOADERS in state:  # not in checkpoints of earlier days
            missing = loader_state.restore(self.loaders, state[loader_state.LOADERS], own)
            if missing:
                warn_caller(
                    f"the loaders of the run that goes on drew from {', '.join(missing)}, which these have not; they "
                    "serve other batches",
                    UserWarning,
                )
        rng.restore(state)

    def epoch(self, epoch: int, played: int, now: dict[str, Any] | None) -> Iterator[Item]:
        """The batches of an epoch after the first `played` ones.

        Args:
            epoch: counted from 1.
            played: batches played already; if there are any, `at_start` is set.
            now: the generators after these, where a run is resumed.

        Raises:
            InputError, InputTypeError: the loader has fewer batches than it said; in the first epoch, images are not
                finite floats in [0, 1] or labels not int64 classes of the model.
        """
        for knows in _told_of_epochs(self.loader):
            knows.set_epoch(epoch)
        loader_state.begin_anew(self.loaders)
        if played == self.rounds:  # the epoch was played to its end
            if now is not None:
                self.restore(now)
            return
        if played:
            assert self.at_start is not None
            now = now or self.capture()  # an epoch that was left in this process
            self.restore(self.at_start)
            batches = _from(self.loader, played)
            self.restore(now, own=False)
        else:
            if now is not None:
                self.restore(now)
            self.at_start = self.capture()
            batches = _from(self.loader, 0)
        served = played
        for item in islice(batches, self.rounds - played):
            served += 1
            # the first epoch shows every batch once
            if epoch == 1:
                x, y = checked("train", item, self.num_classes, self.loader, self.labels)
            else:
                x, y = images_and_labels(item, self.labels)
            index = index_in(item, len(x))
            yield self._here(x), None if y is None else self._here(y), None if index is None else self._here(index)
        if served < self.rounds:
            raise InputError(
                f"train has a length of {self.rounds} batches, but had no more than {served} in epoch {epoch}; an "
                "epoch is as long as the loader's __len__ says"
            )

    def _here(self, tensor: Tensor) -> Tensor:
        return outside_inference(tensor.to(self.device, non_blocking=True))


def _told_of_epochs(loader: Any) -> Iterator[_KnowsEpochs]:
    """Whatever of a loader draws by the number of the epoch: itself, its samplers, its data set."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    different = {id(part): part for part in (*parts, getattr(loader, "dataset", None))}
    yield from (part for part in different.values() if isinstance(part, _KnowsEpochs))


def _from(loader: Loader, played: int) -> Iterator[Any]:
    if isinstance(loader, Batches):
        return loader.with_index(played)
    batches = iter(loader)
    for _ in islice(batches, played):
        pass
    return batches
