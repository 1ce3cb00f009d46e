"""Tar shards of images with labels, as webdataset writes them: indexed once, then read at any place.

A sample is the members of one name before its first dot: an image, and its class in a member that ends in ``.cls`` (a
number or a name) or ``.json`` (under "label", "cls" or "class"). Shards are files, also of a mounted store, or URLs
that fsspec reads (``s3://``, ``gs://``, ``https://``). What is at a URL is fetched shard by shard into the cache
folder, where only the newest few stay: no disk need hold all of it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd.data import decoding
from afd.data.decoding import BadImageError, Pixels
from afd.data.shard_files import index_of, is_there, local, remote
from afd.data.sources import MOST_CLASSES, Names, Source, named
from afd.errors import DataError, in_a_line

GROUP = 8  # shards whose images are shuffled together
LONGEST = 10_000  # shards that braces may stand for
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")


class ShardSource(Source):
    """Images in tar shards, in the order of shards and members.

    Args:
        shards: paths or URLs.
        classes: names of the classes; None for the numbers up to the largest, or, where labels are names, these in
            their order.

    Raises:
        DataError: a shard is not there, is cut short, or holds no images with labels.
    """

    def __init__(self, shards: Sequence[str], classes: Sequence[str] | None = None) -> None:
        self.shards, self.name = tuple(shards), shards[0] if len(shards) == 1 else f"{shards[0]} ... {shards[-1]}"
        indexes = [index_of(shard) for shard in shards]
        self.counts = np.array([len(one["offset"]) for one in indexes], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.offsets, self.lengths, self.sizes = (
            np.concatenate([one[name] for one in indexes]) for name in ("offset", "length", "size")
        )
        self.names = Names(str(name) for one in indexes for name in one["name"])
        self.reasons = {
            int(start + place): str(reason)
            for start, one in zip(self.first[:-1], indexes, strict=True)
            for place, reason in zip(one["damaged"], one["reason"], strict=True)
        }
        labels = _plain_numbers(np.concatenate([one["label"] for one in indexes]))
        self.classes = tuple(_classes_in(labels) if classes is None else classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        if unknown := sorted({str(label) for label in np.unique(labels)} - set(numbers)):
            raise DataError(f"{self.name} holds the classes {named(unknown)}, which the training images have none of")
        kinds, inverse = np.unique(labels, return_inverse=True)
        self.labels = torch.from_numpy(np.array([numbers[str(one)] for one in kinds], dtype=np.int64)[inverse])

    def told(self, number: int) -> str:
        """Its name, and that of its shard."""
        return f"{self.names[number]} in {self.shards[self._shard(number)]}"

    def identity(self, number: int) -> str:
        """Its name, place and length in its shard."""
        shard = self.shards[self._shard(number)].rpartition("/")[2]
        return f"{shard} {self.names[number]} {self.offsets[number]} {self.lengths[number]}"

    def size(self, number: int) -> tuple[int, int]:
        """As was found when the shard was indexed."""
        if number in self.reasons:
            raise BadImageError(self.reasons[number])
        height, width = self.sizes[number]
        return int(height), int(width)

    def pixels(self, number: int, least: int = 0) -> Pixels:
        """See `Source`."""
        try:
            with local(self.shards[self._shard(number)]).open("rb", buffering=0) as file:
                file.seek(int(self.offsets[number]))
                content = file.read(int(self.lengths[number]))
        except OSError as error:
            raise BadImageError(error.strerror or in_a_line(error)) from error
        return decoding.decoded(content, least)

    def order(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Shards in an order, and the images of `GROUP` shards at a time in another: what is read lies together."""
        shard = torch.from_numpy(np.searchsorted(self.first, index.numpy(), side="right") - 1)
        place = torch.randperm(len(self.shards), generator=generator, device="cpu")
        within = torch.randperm(len(index), generator=generator, device="cpu")
        group = place[shard] // GROUP
        return within[torch.argsort(group[within], stable=True)]

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self.first, number, side="right")) - 1


def _plain_numbers(labels: Any) -> Any:
    """Labels that are all numbers without zeros in front."""
    kinds, inverse = np.unique(labels, return_inverse=True)
    if all(str(one).isascii() and str(one).isdigit() for one in kinds):
        return np.array([str(int(one)) for one in kinds])[inverse]
    return labels


def _classes_in(labels: Any) -> list[str]:
    found = sorted(map(str, np.unique(labels)))
    if not all(one.isascii() and one.isdigit() for one in found):
        return found
    most = max(map(int, found))
    if most >= MOST_CLASSES:
        raise DataError(f"a label is {most}; numbers of classes must be below {MOST_CLASSES}")
    return [str(number) for number in range(most + 1)]


# --- Which shards -----------------------------------------------------------------------------------------------------


def shards_by_part(pattern: str, parts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The shards that a pattern stands for, by the part of the data that their names tell.

    Args:
        pattern: a path or URL with ``{000..127}`` or ``{train,val}`` for several, or with ``*``, ``?``, ``[...]``.
        parts: words in the name of a shard, or else of its folder, by what they stand for; all others are "train".

    Raises:
        DataError: there is no such shard, one of several numbered ones is missing, or it stands for too many.
    """
    found = [shard for one in expanded(pattern) for shard in _matching(one)]
    if not found:
        raise DataError(f"{pattern} stands for no shard")
    by_part: dict[str, list[str]] = {}
    for shard in found:
        by_part.setdefault(_part_of(shard, parts), []).append(shard)
    return by_part


def _part_of(shard: str, parts: Mapping[str, Sequence[str]]) -> str:
    """The part that the name of a shard tells first, or else that its folder is called; all others are to train on."""
    known = {word: part for part, words in parts.items() for word in words}
    folders, _, name = shard.lower().rpartition("/")
    told = (*re.split(r"[^a-z]+", name), folders.rpartition("/")[2])
    return next((known[word] for word in told if word in known), "train")


def expanded(pattern: str) -> list[str]:
    """What a pattern with braces stands for.

    Raises:
        DataError: for more than `LONGEST` names.
    """
    found = [pattern]
    while any(BRACES.search(one) for one in found):
        found = [one for name in found for one in _once(name)]
        if len(found) > LONGEST:
            raise DataError(f"{pattern} stands for more than {LONGEST} shards")
    return found


def _once(pattern: str) -> list[str]:
    """What a pattern's first braces stand for."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    low, dots, high = braces[1].partition("..")
    words = braces[1].split(",")
    if dots and low.isdecimal() and high.isdecimal():
        last = min(int(high), int(low) + LONGEST)  # of more, it is said that they are too many
        words = [f"{number:0{len(low)}d}" for number in range(int(low), last + 1)]
    return [f"{pattern[: braces.start()]}{word}{pattern[braces.end() :]}" for word in words]


def _matching(pattern: str) -> list[str]:
    """The shards of a name, or those that a pattern with wildcards matches, none of which may be missing."""
    if not any(sign in pattern for sign in "*?["):
        if not is_there(pattern):
            raise DataError(f"the shard {pattern} is missing")
        return [pattern]
    if "://" in pattern:
        system, path = remote(pattern)
        found = sorted(map(system.unstrip_protocol, system.glob(path)))
    else:
        folder = Path(pattern).expanduser().parent
        names = (one.name for one in folder.iterdir() if one.is_file()) if folder.is_dir() else iter(())
        found = sorted(str(folder / name) for name in names if fnmatch.fnmatchcase(name, Path(pattern).name))
    if not found:
        raise DataError(f"no shard is named {pattern}")
    _check_numbers(found)
    return found


def _check_numbers(shards: Sequence[str]) -> None:
    """Raises DataError where a number between those of shards that are numbered alike is missing."""
    numbered: dict[tuple[str, str, int], list[int]] = {}
    for shard in shards:
        before, _, name = shard.rpartition("/")
        if parts := NUMBERED.fullmatch(name):
            numbered.setdefault((f"{before}/{parts[1]}", parts[3], len(parts[2])), []).append(int(parts[2]))
    for (before, after, width), numbers in numbered.items():
        if lost := sorted(set(range(min(numbers), max(numbers))) - set(numbers)):
            told = [f"{before}{number:0{width}d}{after}" for number in lost]
            raise DataError(f"of numbered shards, {named(told)} is missing; if it is to be, name the others in braces")
