"""The loaders of a run, looked at before its first step: nothing that is found here should cost an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from itertools import islice
from typing import Any, Literal, overload

from torch import Tensor
from torch.utils.data import DataLoader

from afd.data import Batches
from afd.data.images import images_and_labels
from afd.errors import AfdError, InputError, InputTypeError
from afd.methods.inputs import check_form, check_labels, check_values
from afd.training import loader_state
from afd.training.distributed import Group, LostError

Loader = Iterable[Any]
"""Any re-iterable of batches: a DataLoader, `Batches`, a list.

A batch is what `afd.data.images.images_and_labels` reads: (images [N, ...] in [0, 1], labels [N] int64, ...), a dict or
an object; a training batch may have soft labels [N, K] or, for a method that asks for none, none. Where the loader has
a ``set_epoch(epoch)``, or a sampler or data set of it has, that is called before each pass. What a loader draws at
random is drawn again when a run is resumed, as far as `loader_state` finds its generators.
"""


def rounds_in(loader: Loader) -> int:
    """Batches of one pass over the training images.

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


def look(
    train: Loader,
    validation: Loader,
    epochs: int,
    classes: Callable[[Tensor], int],
    group: Group,
    warn: Callable[[str], None] | None = None,
    labels: bool = True,
) -> int:
    """Looks at both loaders, which are as if nobody had; returns the rounds in an epoch.

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

    Raises:
        InputError, InputTypeError: a loader is empty or can be read only once, a batch is not as described in `Loader`,
            or processes have different numbers of batches.
        LostError: another process has raised one of these, which it shows.
    """
    failure: Exception | None = None
    doubt: str | None = None
    counts: list[int | None] = []
    try:
        counts.append(rounds_in(train))
        _look_at("validation", validation, epochs, classes)
        _look_at("train", train, epochs, classes, labels)
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


@overload
def checked(
    name: str, item: Any, num_classes: int | None, loader: Loader, labels: Literal[True] = True
) -> tuple[Tensor, Tensor]: ...
@overload
def checked(
    name: str, item: Any, num_classes: int | None, loader: Loader, labels: bool
) -> tuple[Tensor, Tensor | None]: ...
def checked(
    name: str, item: Any, num_classes: int | None, loader: Loader, labels: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch, their values found to be allowed; `Batches` were looked at when they were made.

    Args:
        name: of the loader, for messages.
        item: what the loader yielded.
        num_classes: labels are below it; None if nobody knows.
        loader: that yielded it.
        labels: whether it must have some.

    Raises:
        InputTypeError, InputError: it is not as described in `Loader`.
    """
    try:
        x, y = images_and_labels(item, labels)
        if isinstance(loader, Batches):
            check_labels(loader.images.num_classes - 1, num_classes)
        else:
            check_form(x, y, num_classes, soft=name == "train")
            check_values(x, y, num_classes)
    except AfdError as error:
        raise type(error)(f"{name}: {error}") from error
    return x, y


def _look_at(name: str, loader: Loader, epochs: int, classes: Callable[[Tensor], int], labels: bool = True) -> None:
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
            checked(name, item, num_classes, loader, labels)
        if not isinstance(loader, Batches | DataLoader | list | tuple) and epochs > 1 and not list(islice(loader, 1)):
            raise InputError(f"{name} is a {type(loader).__name__} that has no batches in a second pass")


def _read_once(loader: Any) -> bool:
    """Whether two passes share an iterator, but for that of a DataLoader with lasting workers, which is reset."""
    if isinstance(loader, DataLoader):
        sources = (loader.dataset, loader.sampler, loader.batch_sampler)
        return any(_read_once(source) for source in sources if isinstance(source, Iterable))
    return iter(loader) is iter(loader)
