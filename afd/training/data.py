"""The loaders of a run: checked before its first step, and read from any batch on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from afd.attacks.inputs import outside_inference
from afd.data import Batches
from afd.data.items import images_and_labels, index_in
from afd.errors import AfdError, InputError, InputTypeError, warn_caller
from afd.methods.inputs import check_form, check_labels, check_values
from afd.processes import LostError
from afd.runtime import Group
from afd.training import loader_state

Loader = Iterable[Any]
"""Any re-iterable of batches: a DataLoader, `Batches`, a list.

A batch is what `afd.data.items.images_and_labels` reads: (images [N, ...] in [0, 1], labels [N] int64, ...), a dict or
an object; a training batch may have soft labels [N, K], which sum to 1 in each row, or, for a method that asks for
none, none. Where the loader has a ``set_epoch(epoch)``, or a sampler or data set of it has, that is called before each
pass. What a loader draws at random is drawn again when a run is resumed, as far as `loader_state` finds its generators.
"""

Taken = Callable[[Tensor, Tensor | None], None]  # (images, labels): raises where a run does not take such a batch


def steps_in(loader: Loader) -> int:
    """Batches of one pass over the training images.

    Raises:
        InputError: the loader has none, or does not say.
    """
    try:
        steps = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"train is a {type(loader).__name__} without a length; give it a __len__ in batches") from None
    if not steps:
        raise InputError("train holds no images")
    return steps


def check_loaders(
    train: Loader,
    validation: Loader,
    epochs: int,
    classes: Callable[[Tensor], int],
    group: Group,
    warn: Callable[[str], None] | None = None,
    labels: bool = True,
    taken: Taken | None = None,
) -> int:
    """Looks at both loaders, which are as if nobody had; returns the steps in an epoch.

    Several processes raise together, so that none waits for one that has given up.

    Args:
        train: this process's training batches.
        validation: the validation batches.
        epochs: passes over each of them.
        classes: the number of the model's classes, asked with the first images of each loader, validation's first.
        group: of the processes.
        warn: told, where the run may be resumed, if the batches would then be others; None to not look for that, which
            takes a second reading of the first training batch.
        labels: whether training batches must have labels.
        taken: raises where training does not take such a batch; asked of the training batches that are looked at.

    Raises:
        InputError, InputTypeError: a loader is empty or can be read only once, a batch is not as described in `Loader`,
            or processes have different numbers of batches.
        LostError: another process has raised one of these, which it shows.
    """
    failure: Exception | None = None
    doubt: str | None = None
    counts: list[int | None] = []
    try:
        counts.append(steps_in(train))
        _check_loader("validation", validation, epochs, classes, labels=True, taken=None)
        _check_loader("train", train, epochs, classes, labels, taken)
        counts.append(len(validation) if isinstance(validation, Sized) else None)
        doubt = None if warn is None else _doubt(train)
    except Exception as error:  # of the user's loaders, too: nobody may wait for a process that has given up
        if group.size == 1:
            raise
        failure = error
    told = group.gather((None if failure is None else str(failure) or type(failure).__name__, counts, doubt))
    if failure is not None:
        raise failure
    for rank, (reason, _, _) in enumerate(told):
        if reason is not None:
            raise LostError(f"process {rank} cannot train: {reason}")
    _check_alike([counts for _, counts, _ in told], group)
    doubts = [f"{doubt} (process {rank})" if rank else doubt for rank, (_, _, doubt) in enumerate(told) if doubt]
    if warn is not None and doubts:
        warn(doubts[0])
    assert counts[0] is not None
    return counts[0]


def _check_alike(counts: list[list[int | None]], group: Group) -> None:
    """Raises where processes have different numbers of batches; process 0 shows why."""
    for rank, others in enumerate(counts):
        if others != counts[0]:
            message = (
                f"processes have different numbers of batches: train and validation have {others} in process {rank} "
                f"and {counts[0]} in process 0; they must be the same, or some would wait for the others"
            )
            raise InputError(message) if group.leads else LostError(message)


def _doubt(train: Loader) -> str | None:
    """Why a resumed run would see other batches; None if nothing is known to speak for that."""
    resumed = "so a run that is resumed, or gone on with, will see others than one that was not interrupted"
    if not loader_state.in_order(train):
        return f"train has in_order=False, and its batches come in the order in which workers are ready; {resumed}"
    if isinstance(train, Batches | list | tuple) or loader_state.same_again(train):
        return None
    return (
        "train served another first batch when it was read again with all random generators put back: it draws from "
        f"something that a checkpoint cannot hold, such as the clock or a generator that is made anew; {resumed}"
    )


def checked(
    name: str, item: Any, num_classes: int | None, loader: Loader, labels: bool = True, taken: Taken | None = None
) -> tuple[Tensor, Any]:
    """Images and labels (or None) of a batch, their values found to be allowed; those of `Batches` are known to be.

    Args:
        name: of the loader, for messages.
        item: what the loader yielded.
        num_classes: labels are below it; None if nobody knows.
        loader: that yielded it.
        labels: whether it must have some.
        taken: raises where the run does not take such a batch; None where nobody asks.

    Raises:
        InputTypeError, InputError: it is not as described in `Loader`.
    """
    try:
        x, y = images_and_labels(item, labels)
        if isinstance(loader, Batches):
            check_labels(loader.images.num_classes - 1, num_classes)
        else:
            check_form(x, y, num_classes, soft=name == "train")
            check_values(x, y, num_classes, sums=num_classes is not None)
        if taken is not None:
            taken(x, y)
    except AfdError as error:
        raise type(error)(f"{name}: {error}") from error
    return x, y


def _check_loader(
    name: str, loader: Loader, epochs: int, classes: Callable[[Tensor], int], labels: bool, taken: Taken | None
) -> None:
    """Checks the first batch; of a list, all of them."""
    if isinstance(loader, type) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise InputTypeError(f"{name} is a {type(loader).__name__}; it must be a loader or a list of batches")
    with loader_state.untouched(loader):
        if _read_once(loader):
            raise InputError(
                f"{name} is a {type(loader).__name__} that can be read only once; give a loader that begins anew at "
                "each pass, such as a DataLoader or a list of batches"
            )
        items = list(loader if isinstance(loader, list | tuple) else islice(loader, 1))
        if not items:
            raise InputError(f"{name} holds no images")
        num_classes = classes(checked(name, items[0], None, loader, labels)[0])
        for item in items:
            checked(name, item, num_classes, loader, labels, taken)
        if not isinstance(loader, Batches | DataLoader | list | tuple) and epochs > 1 and not list(islice(loader, 1)):
            raise InputError(f"{name} is a {type(loader).__name__} that has no batches in a second pass")


def _read_once(loader: Any) -> bool:
    """Whether two passes share an iterator, but for that of a DataLoader with lasting workers, which is reset."""
    if isinstance(loader, DataLoader):
        sources = (loader.dataset, loader.sampler, loader.batch_sampler)
        return any(_read_once(source) for source in sources if isinstance(source, Iterable))
    return iter(loader) is iter(loader)


# --- Training batches -----------------------------------------------------------------------------------------------


Item = tuple[Tensor, Tensor | None, Tensor | None]  # images, labels, index


@runtime_checkable
class _KnowsEpochs(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class ResumableLoader:
    """One process's training batches, epoch after epoch, on one device: as an uninterrupted run sees them.

    A loader that draws at random (a shuffling DataLoader) is replayed from the state of the generators at the start of
    the epoch, which is why that is kept: of the global ones and of all that `loader_state` finds in loaders. Batches
    that were trained on already are served again and thrown away. Workers that a DataLoader keeps from pass to pass
    (``persistent_workers``) are begun anew at every epoch, as only that makes an epoch repeatable.

    Args:
        loader: of the batches.
        device: where to put them.
        num_classes: labels are below it.
        steps: of an epoch: batches, each as often as it is served; what the loader has beyond is not asked for.
        validation: the other loader of the run, whose state is kept with this one's.
        earlier: the loader of an earlier part of this run in the same process, if there was one.
        labels: whether batches must have labels.
        taken: raises where training does not take such a batch; asked in the first epoch.
        repeats: how often each batch is served in a row.
    """

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        num_classes: int,
        steps: int,
        validation: Loader | None = None,
        earlier: ResumableLoader | None = None,
        labels: bool = True,
        taken: Taken | None = None,
        repeats: int = 1,
    ) -> None:
        self.loader, self.device, self.num_classes, self.steps = loader, device, num_classes, steps
        self.labels, self.taken, self.repeats = labels, taken, repeats
        self.at_start: dict[str, Any] | None = None if earlier is None else earlier.at_start
        self.serving: Item | None = None if earlier is None else earlier.serving  # the batch that is repeated
        self.loaders = {"train": loader, "validation": validation}
        # as a new process finds them
        self.before: dict[str, Any] = loader_state.numbers(self.loaders) if earlier is None else earlier.before

    def capture(self) -> dict[str, Any]:
        """The generators as they are now, those of the loaders included: plain content of a checkpoint."""
        return {
            **loader_state.global_generators(),
            loader_state.LOADERS: loader_state.capture(self.loaders, self.before),
        }

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
        loader_state.set_global_generators(state)

    def epoch(self, epoch: int, done: int, now: dict[str, Any] | None) -> Iterator[Item]:
        """The batches of an epoch after the first `done` steps, each as often as it is repeated.

        Args:
            epoch: counted from 1.
            done: steps taken already; if there are any, `at_start` is set.
            now: the generators after these, where a run is resumed.

        Raises:
            InputError, InputTypeError: the loader has fewer batches than it said; in the first epoch, images are not
                finite floats in [0, 1] or labels not int64 classes of the model.
        """
        for knows in _told_of_epochs(self.loader):
            knows.set_epoch(epoch)
        loader_state.begin_anew(self.loaders)
        if done == self.steps:  # the epoch came to its end
            if now is not None:
                self.restore(now)
            return
        served, repeated = divmod(done, self.repeats)
        if done:
            assert self.at_start is not None
            now = now or self.capture()  # an epoch that was left in this process
            self.restore(self.at_start)
            batches = _from_batch(self.loader, served)
            if repeated:  # of the batch in progress; read again, it might be another: steps have drawn meanwhile
                batches = chain([self.serving for _ in islice(batches, 1)], batches)
            self.restore(now, own=isinstance(self.loader, Batches))  # which are where they are
        else:
            if now is not None:
                self.restore(now)
            self.at_start = self.capture()
            batches = _from_batch(self.loader, 0)
        whole = self.steps // self.repeats
        for item in islice(batches, whole - served):
            served += 1
            # the first epoch shows every batch once
            if epoch == 1:
                x, y = checked("train", item, self.num_classes, self.loader, self.labels, self.taken)
            else:
                x, y = images_and_labels(item, self.labels)
            index = index_in(item, len(x))
            here = self._here(x), None if y is None else self._here(y), None if index is None else self._here(index)
            self.serving = here if self.repeats > 1 else None
            for _ in range(repeated, self.repeats):
                yield here
            repeated = 0
        if served < whole:
            raise InputError(
                f"train has a length of {whole} batches, but had no more than {served} in epoch {epoch}; an "
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


def _from_batch(loader: Loader, done: int) -> Iterator[Any]:
    if isinstance(loader, Batches):
        return loader.with_index(done)
    batches = iter(loader)
    for _ in islice(batches, done):
        pass
    return batches


MOST = 256  # images of a sample


class Sample:
    """Every n-th validation image, `MOST` at most, others from epoch to epoch; and how many there are of each class.

    Args:
        offset: which of n neighbours.
    """

    def __init__(self, offset: int) -> None:
        self.offset, self.stride, self.seen = offset, 2, 0
        self._kept: list[tuple[int, Tensor, Tensor]] = []  # by the index of each, images and labels of one
        self._classes = torch.zeros(0, dtype=torch.int64)

    def look(self, x: Tensor, y: Tensor) -> None:
        """Takes what it wants of a batch, in their order."""
        if not self._kept or x.shape[1:] == self._kept[0][1].shape:
            for row in range((self.offset - self.seen) % self.stride, len(x), self.stride):
                self._kept.append((self.seen + row, x[row].clone(), y[row].clone()))
        while len(self._kept) > MOST:
            self.stride *= 2
            self._kept = [one for one in self._kept if one[0] % self.stride == self.offset % self.stride]
        counts = torch.bincount(y.cpu(), minlength=len(self._classes))
        counts[: len(self._classes)] += self._classes
        self._classes, self.seen = counts, self.seen + len(x)

    def __len__(self) -> int:
        return len(self._kept)

    def images(self, device: torch.device, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Some of the images and their labels."""
        images, labels = zip(*(self._kept[row][1:] for row in rows), strict=True)
        return torch.stack(images).to(device), torch.stack(labels).to(device)

    @property
    def largest_class(self) -> float:
        """Its share of all images; 1 of none."""
        return int(self._classes.max()) / self.seen if self.seen else 1.0
