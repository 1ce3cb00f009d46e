"""Labelled images in files: checked before anything is trained, and decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from afd.data.datasets import LIMIT_SEED, drawn_by_class
from afd.data.decoding import BadImageError, Pixels, fitted
from afd.data.images import Images
from afd.data.sizing import Sizing
from afd.data.sources import SHOWN, Source
from afd.errors import DataError, InputError, InputTypeError, one_of, whole

BAD = ("error", "skip")
MOST_WORKERS = 8
CHUNK = 256  # images that are looked at, or decoded, by a worker at a time


@dataclass(frozen=True, eq=False, repr=False)
class StoredImages:
    """Labelled images that lie in files, and are decoded when they are asked for.

    Attributes:
        source: has them.
        index: which of the source's, int64 [N].
        shape: channels, height and width that networks see.
        sizing: how an image is brought to that; None where all are of that size.
        bad: what is done where an image turns out to be damaged when it is decoded: "error", or "skip", where the next
            one takes its place.
        workers: processes that decode; 0 for the caller's own.
        left_out: names of images that were found damaged before, with the reasons.
        held_out: whether others of the source are to train on, and these were drawn to be none of them.

    Raises:
        InputError: `bad` is none of these, or there are more workers than images.
    """

    source: Source
    index: Tensor
    shape: tuple[int, int, int]
    sizing: Sizing | None = None
    bad: str = "error"
    workers: int = 0
    left_out: tuple[str, ...] = field(default=(), repr=False)
    held_out: bool = False
    scale = 255.0

    def __post_init__(self) -> None:
        one_of("bad_images", self.bad, BAD)
        whole("workers", self.workers, 0)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"StoredImages({self.name}: {len(self)} of {size}, {self.num_classes} classes)"

    @property
    def name(self) -> str:
        """Of the source."""
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.source.classes

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not all of them occur."""
        return len(self.source.classes)

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self.source.labels[self.index]

    @property
    def device(self) -> torch.device:
        """Where labels and index lie: on the CPU."""
        return torch.device("cpu")

    def told(self, position: int) -> str:
        """What messages call the image at a position."""
        return self.source.told(int(self.index[position]))

    def take(self, index: Tensor) -> StoredImages:
        """Those at these positions, in this order."""
        return replace(self, index=self.index[index.to("cpu", torch.int64)])

    def some(self, count: int) -> Images:
        """So many, at most, in memory: drawn class by class, as the first ones may be of one class."""
        found = self.take(drawn_by_class(self.labels, count, LIMIT_SEED)).loaded()
        return replace(found, chosen="{} (drawn class by class)") if count < len(self) else found

    def digest(self) -> str:
        """SHA-256 over what these images are, so that a run does not go on with others."""
        found = hashlib.sha256(self.source.digest.encode())
        found.update(self.index.numpy().tobytes())
        return found.hexdigest()

    def loaded(self) -> Images:
        """All of them, decoded, in memory.

        Raises:
            DataError: one is damaged, and `bad` is "error".
        """
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        labels, first = self.labels.clone(), 0
        chunks = torch.arange(len(self), device="cpu").split(CHUNK)
        for part, used, _ in decoded_batches(self, [one.numpy() for one in chunks], self.sizing):
            pixels[first : first + len(part)] = part
            labels[first : first + len(part)] = self.labels[used]
            first += len(part)
        return Images(pixels, labels, self.scale, self.num_classes, self.name)


def usual_workers() -> int:
    """One less than there are cores for each of torchrun's processes here, at least 1 and at most `MOST_WORKERS`."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // processes - 1))


# --- Workers ----------------------------------------------------------------------------------------------------------


Positions = np.ndarray[Any, np.dtype[np.int64]]
Decoded = tuple[Tensor, Tensor, dict[int, str]]


class Decoder:
    """Batches of decoded images by their positions: what a worker process does.

    Args:
        images: that are decoded.
        sizing: how they are brought to one size; None for as they are.
    """

    def __init__(self, images: StoredImages, sizing: Sizing | None) -> None:
        self.source, self.numbers, self.bad = images.source, images.index.numpy(), images.bad
        self.shape, self.sizing = images.shape, sizing
        self.damaged: dict[int, str] = {}  # positions that were tried before

    def __getitem__(self, positions: Positions) -> Decoded:
        """Pixels uint8 [B, 3, H, W], which positions they are of, and what is damaged, with the reasons."""
        height, width = self.shape[1:] if self.sizing is None else (self.sizing.side,) * 2
        pixels = torch.empty(len(positions), 3, height, width, dtype=torch.uint8)
        rows, used, problems = pixels.numpy(), positions.copy(), dict[int, str]()
        for row, wanted in enumerate(positions):
            for after in range(len(self.numbers)):
                used[row] = at = (wanted + after) % len(self.numbers)
                try:
                    if at in self.damaged:
                        raise BadImageError(self.damaged[at])
                    rows[row] = self._image(int(self.numbers[at])).transpose(2, 0, 1)
                    break
                except BadImageError as error:
                    problems[int(at)] = self.damaged[int(at)] = str(error)
                    if self.bad == "error":
                        return pixels, torch.from_numpy(used), problems
        return pixels, torch.from_numpy(used), problems

    def _image(self, number: int) -> Pixels:
        if self.sizing is not None:
            found = self.source.pixels(number, 2 * self.sizing.shorter)
            return fitted(found, self.sizing.shorter, self.sizing.side)
        found = self.source.pixels(number)
        if found.shape[:2] != self.shape[1:]:
            height, width = found.shape[:2]
            raise BadImageError(f"it is of {height}x{width}, and the others are of {self.shape[1]}x{self.shape[2]}")
        return found


def decoded_batches(
    images: StoredImages, batches: Sequence[Positions], sizing: Sizing | None, *, pinned: bool = False
) -> Iterator[Decoded]:
    """What `Decoder` makes of batches of positions, in their order, by the workers of the images.

    Raises:
        DataError: an image is damaged, and is not to be skipped; all are; or a worker has died.
    """
    for found in by_workers(Decoder(images, sizing), batches, images.workers, pinned=pinned):
        _, _, problems = found
        if problems and images.bad == "error":
            ((position, reason),) = problems.items()
            raise DataError(
                f"{images.told(position)} holds no whole image: {reason}; leave such files out by --bad-images skip"
            )
        if len(problems) >= len(images):
            reason = next(iter(problems.values()))
            raise DataError(f"none of the {len(images)} images of {images.name} can be decoded: {reason}")
        yield found


def by_workers(work: Any, batches: Sequence[Any], workers: int, *, pinned: bool = False) -> Iterator[Any]:
    """``work[batch]`` for each batch, in their order, done by processes.

    Args:
        work: what processes do.
        batches: what is done.
        workers: processes; 0 for this one. There are never more than batches.
        pinned: hand tensors over in memory that a GPU reads quickly.

    Raises:
        DataError: a worker has died.
    """
    loader: Any = DataLoader(
        work,
        sampler=batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        collate_fn=_as_it_is,
        pin_memory=pinned,
        worker_init_fn=_let_the_parent_end,
        generator=torch.Generator("cpu"),  # which it draws its workers' seeds from: not the run's
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*worker processes in total", UserWarning)  # the user has named the number
        iterator = iter(loader)
    while True:
        try:
            found = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that reads images has died; it may have been out of memory: try fewer with --workers "
                f"({str(error).splitlines()[0]})"
            ) from error
        yield found


def _as_it_is(found: Any) -> Any:
    return found


def _let_the_parent_end(_worker: int) -> None:
    """Ctrl-C goes to all processes of a terminal; the one that trains finishes its step, and needs its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # not SIGTERM, by which Python ends what is left of them at its exit


# --- Looked at before anything is trained -----------------------------------------------------------------------------


class _Look:
    """Sizes and problems of images by their numbers: what a worker process does."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, numbers: range) -> list[tuple[tuple[int, int], str]]:
        return [self.source.problem(number) for number in numbers]


@dataclass(frozen=True)
class Inspection:
    """What images of a source are of use.

    Attributes:
        good: numbers of those that are, int64.
        sizes: height and width of each of the source's, int32 [N, 2]; (0, 0) of those that are of none.
        problems: why, by number.
    """

    good: Tensor
    sizes: np.ndarray[Any, np.dtype[np.int32]]
    problems: dict[int, str]


def inspected(source: Source, workers: int) -> Inspection:
    """Looks at the headers and ends of all images."""
    sizes = np.zeros((len(source), 2), dtype=np.int32)
    problems: dict[int, str] = {}
    parts = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    for numbers, found in zip(parts, by_workers(_Look(source), parts, workers), strict=True):
        for number, (size, problem) in zip(numbers, found, strict=True):
            sizes[number] = size
            if problem:
                problems[number] = problem
    good = torch.from_numpy(np.flatnonzero(sizes[:, 0] > 0))
    return Inspection(good, sizes, problems)


def stored(
    source: Source,
    *,
    image_size: int | None = None,
    resize: int | None = None,
    bad: str = "error",
    workers: int | None = None,
    inspection: Inspection | None = None,
) -> StoredImages:
    """Images of a source, all looked at.

    Args:
        source: has them.
        image_size: side of the square that networks see; None for images as they are, all of one size.
        resize: shorter side of an image before the square is cut from its middle; None for the usual.
        bad: "error", or "skip": what is done about files that hold no whole image.
        workers: processes that decode; None for the usual number, 0 for this one.
        inspection: of the source, where it has been looked at.

    Raises:
        DataError: files hold no whole image, and are not to be skipped; none holds one, or none of some class; images
            are of several sizes, and no size is named.
        InputError: a size is out of range, or there are more workers than images.
    """
    if not isinstance(source, Source):
        raise InputTypeError(f"source is a {type(source).__name__}; it must be a Source, such as FolderSource(folder)")
    one_of("bad_images", bad, BAD)
    if resize is not None and image_size is None:
        raise InputError(f"resize is {resize}, but image_size is missing")
    sizing = None if image_size is None else Sizing.of(image_size, resize)
    if workers is None:
        workers = min(usual_workers(), len(source))
    whole("workers", workers, 0)
    if workers > max(1, len(source)):
        raise InputError(f"workers is {workers}; there are {len(source)} images in {source.name}")
    found = inspected(source, workers) if inspection is None else inspection
    left_out = tuple(f"{source.told(number)}: {reason}" for number, reason in sorted(found.problems.items()))
    if left_out and bad == "error":
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        raise DataError(
            f"{len(left_out)} of {len(source)} files of {source.name} hold no whole image: "
            f"{'; '.join(left_out[:SHOWN])}{more}; leave them out by --bad-images skip"
        )
    _check_classes(source, found.good)
    side = (sizing.side,) * 2 if sizing is not None else _only_size(source, found)
    return StoredImages(source, found.good, (3, *side), sizing, bad, workers, left_out)


def _check_classes(source: Source, good: Tensor) -> None:
    """Raises DataError where all images of a class that the source has some of are damaged."""
    there, left = (set(labels.unique().tolist()) for labels in (source.labels, source.labels[good]))
    if there - left:
        lost = ", ".join(source.classes[label] for label in sorted(there - left)[:SHOWN])
        raise DataError(f"no file of {source.name} in {lost} holds a whole image; each class must have at least one")


def _only_size(source: Source, found: Inspection) -> tuple[int, int]:
    """Height and width of all images.

    Raises:
        DataError: there are several.
    """
    size = found.sizes[found.good[0]]
    if ((found.sizes != size).any(1) & (found.sizes[:, 0] > 0)).any():
        sizes, first, counts = np.unique(found.sizes[found.good], axis=0, return_index=True, return_counts=True)
        order = np.argsort(-counts)[:SHOWN]
        shown = ", ".join(
            f"{sizes[one][0]}x{sizes[one][1]} ({counts[one]}, such as {source.told(int(found.good[first[one]]))})"
            for one in order
        )
        raise DataError(f"images of {source.name} are of {len(sizes)} sizes: {shown}; name one for all by --image-size")
    return int(size[0]), int(size[1])
