"""Tar shards of images with labels, as webdataset writes them: indexed once, then read at any place.

A sample is the members of one name before its first dot: an image, and its class in a member that ends in ``.cls`` (a
number or a name) or ``.json`` (under "label", "cls" or "class"). Shards are files, also of a mounted store, or URLs
that fsspec reads (``s3://``, ``gs://``, ``https://``). What is at a URL is fetched shard by shard into the cache
folder, where only the newest few stay: no disk need hold all of it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd.data import decoding, fetch
from afd.data.decoding import ENDINGS, BadImageError, Pixels
from afd.data.sources import TOLD, Names, Source, named
from afd.errors import DataError, in_a_line
from afd.files import write_whole

LABELS = ("label", "cls", "class")
GROUP = 8  # shards whose images are shuffled together
KEPT = 3 * GROUP  # shards from URLs that stay on the disk
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
        indexes = [_index_of(shard) for shard in shards]
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
        labels = np.concatenate([one["label"] for one in indexes])
        self.classes = tuple(_classes_in(labels) if classes is None else classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        if unknown := sorted({str(label) for label in np.unique(labels)} - set(numbers)):
            raise DataError(f"{self.name} holds the classes {named(unknown)}, which the training images have none of")
        kinds, inverse = np.unique(labels, return_inverse=True)
        self.labels = torch.from_numpy(np.array([numbers[str(one)] for one in kinds], dtype=np.int64)[inverse])

    def told(self, number: int) -> str:
        """Its name, and that of its shard."""
        return f"{self.names[number]} in {self.shards[self._shard(number)]}"

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


def _classes_in(labels: Any) -> list[str]:
    found = sorted(map(str, np.unique(labels)))
    if all(one.isascii() and one.isdigit() for one in found):
        return [str(number) for number in range(max(map(int, found)) + 1)]
    return found


# --- Which shards -----------------------------------------------------------------------------------------------------


def shards_by_part(pattern: str, parts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The shards that a pattern stands for, by the part of the data that their names tell.

    Args:
        pattern: a path or URL with ``{000..127}`` or ``{train,val}`` for several, or with ``*``, ``?``, ``[...]``.
        parts: words, as parts of a file's name, by what they stand for; all others are "train".

    Raises:
        DataError: there is no such shard, one of several numbered ones is missing, or it stands for too many.
    """
    found = [shard for one in expanded(pattern) for shard in _matching(one)]
    by_part: dict[str, list[str]] = {}
    for shard in found:
        words = re.split(r"[^a-z]+", shard.rpartition("/")[2].lower())
        part = next((part for part, told in parts.items() if set(told) & set(words)), "train")
        by_part.setdefault(part, []).append(shard)
    return by_part


def expanded(pattern: str) -> list[str]:
    """What a pattern with braces stands for.

    Raises:
        DataError: for more than `LONGEST` names.
    """
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    low, dots, high = braces[1].partition("..")
    if dots and low.isdecimal() and high.isdecimal():
        width, numbers = len(low), range(int(low), int(high) + 1)
        if len(numbers) > LONGEST:
            raise DataError(
                f"{braces[0]} in {pattern} stands for {len(numbers)} shards; at most {LONGEST} may be named"
            )
        words = [f"{number:0{width}d}" for number in numbers]
    else:
        words = braces[1].split(",")
    return [
        one for word in words for one in expanded(f"{pattern[: braces.start()]}{word}{pattern[braces.end() :]}")
    ]  # fmt: skip


def _matching(pattern: str) -> list[str]:
    """The shards of a name, or those that a pattern with wildcards matches, none of which may be missing."""
    if not any(sign in pattern for sign in "*?["):
        if not _is_there(pattern):
            raise DataError(f"the shard {pattern} is missing")
        return [pattern]
    if "://" in pattern:
        system, path = _remote(pattern)
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


# --- Files and URLs ---------------------------------------------------------------------------------------------------


def _remote(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be read: {in_a_line(error)}") from error
    return system, path


def _is_there(shard: str) -> bool:
    if "://" not in shard:
        return Path(shard).expanduser().is_file()
    system, path = _remote(shard)
    try:
        return bool(system.isfile(path))
    except Exception as error:  # whatever a store, or the way there, has against it
        raise DataError(f"{shard} cannot be read: {in_a_line(error)}") from error


def _cache() -> Path:
    folder = fetch.default_root() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local(shard: str) -> Path:
    """The file of a shard; of one at a URL, a copy, which is fetched where it is not there.

    Several processes may ask: a copy appears whole, and one that another process is reading may be removed under it.
    """
    if "://" not in shard:
        return Path(shard).expanduser()
    folder = _cache()
    copy = folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:32]}.tar"
    try:
        os.utime(copy)  # the newest, of those that are there
    except FileNotFoundError:
        system, path = _remote(shard)
        part = folder / f"{copy.name}.{os.getpid()}.part"
        try:
            system.get_file(path, str(part))
            part.replace(copy)
        except Exception as error:  # whatever a store, or the way there, has against it
            part.unlink(missing_ok=True)
            raise BadImageError(f"its shard cannot be fetched: {in_a_line(error)}") from error
        _forget_oldest(folder)
    return copy


def _forget_oldest(folder: Path) -> None:
    aged = []
    for one in folder.glob("*.tar"):
        try:
            aged.append((one.stat().st_mtime, one))
        except FileNotFoundError:  # another process was quicker
            continue
    for _, one in sorted(aged)[:-KEPT]:
        one.unlink(missing_ok=True)


# --- The index of a shard ---------------------------------------------------------------------------------------------


def _index_of(shard: str) -> dict[str, Any]:
    """Names, places, sizes and labels of a shard's images: made when it is first met, and kept in the cache folder."""
    state = _state(shard)
    file = _cache() / f"{hashlib.sha256(f'1 {state}'.encode()).hexdigest()[:32]}.npz"
    if file.exists():
        with np.load(file, allow_pickle=False) as kept:
            return dict(kept)
    found = _indexed(shard)
    content = io.BytesIO()
    np.savez(content, **found)
    write_whole(file, content.getbuffer())
    return found


def _state(shard: str) -> str:
    """What changes with the content of a shard: its length and time."""
    if "://" not in shard:
        known = Path(shard).expanduser().stat()
        return f"{Path(shard).expanduser().resolve()} {known.st_size} {known.st_mtime_ns}"
    system, path = _remote(shard)
    told = system.info(path)
    return f"{shard} {told.get('size')} {told.get('ETag') or told.get('mtime') or told.get('created') or ''}"


def _indexed(shard: str) -> dict[str, Any]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    sizes, problems = dict[str, tuple[int, int]](), dict[str, str]()
    try:
        path = local(shard)
        length = path.stat().st_size
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            for member in archive:
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key, ending = f"{folder}{slash}{stem}", f".{ending.lower()}"
                if member.offset_data + member.size > length:
                    raise DataError(f"the shard {shard} is cut short in {member.name}")
                file.seek(member.offset_data)
                if ending.endswith(ENDINGS):
                    images[key] = member
                    try:
                        sizes[key] = decoding.size_of(io.BytesIO(file.read(member.size)))
                    except BadImageError as error:
                        sizes[key], problems[key] = (0, 0), str(error)
                elif ending in (".cls", ".json"):
                    labels.setdefault(key, _label(shard, member.name, file.read(member.size), ending))
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # by which an archive ends
                raise DataError(f"the shard {shard} is cut short behind {len(images)} images")
    except (OSError, tarfile.TarError, BadImageError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the shard {shard} cannot be read: {in_a_line(error)}") from error
    if not images:
        raise DataError(f"the shard {shard} holds no {TOLD} files")
    if lost := [key for key in images if key not in labels]:
        raise DataError(
            f"the shard {shard} has no class of {named(lost)}; it is read from a member of that name in .cls or .json"
        )
    keys = list(images)
    damaged = [place for place, key in enumerate(keys) if key in problems]
    return {
        "name": np.array([images[key].name for key in keys]),
        "offset": np.array([images[key].offset_data for key in keys], dtype=np.int64),
        "length": np.array([images[key].size for key in keys], dtype=np.int64),
        "size": np.array([sizes[key] for key in keys], dtype=np.int32).reshape(-1, 2),
        "label": np.array([labels[key] for key in keys]),
        "damaged": np.array(damaged, dtype=np.int64),
        "reason": np.array([problems[keys[place]] for place in damaged], dtype=np.str_),
    }


def _label(shard: str, name: str, content: bytes, ending: str) -> str:
    try:
        if ending == ".cls":
            found: Any = content.decode().strip()
        else:
            told = json.loads(content)
            found = next((told[one] for one in LABELS if one in told), None) if isinstance(told, dict) else told
    except ValueError as error:
        raise DataError(f"{name} in the shard {shard} cannot be read: {in_a_line(error)}") from error
    if isinstance(found, bool) or not isinstance(found, (int, str)) or found == "":
        raise DataError(f"{name} in the shard {shard} names no class, but {found!r}; it must be a number or a name")
    return str(found)
