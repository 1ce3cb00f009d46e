"""Where encoded images come from: files in class folders, and rows of somebody's own data set."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from afd.data import decoding
from afd.data.decoding import ENDINGS, BadImageError, Pixels
from afd.errors import DataError, InputError, InputTypeError, in_a_line

SHOWN = 3  # of many names, in a message
TOLD = "JPEG, PNG or WebP"
HIDDEN = (".", "__MACOSX")
MOST_CLASSES = 100_000


class Source(ABC):
    """Encoded images by number, with labels.

    What it keeps of each is a few bytes, so that processes that read it stay small, however many images there are.

    Attributes:
        labels: int64 [N].
        classes: their names.
        name: what messages call it.
    """

    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def told(self, number: int) -> str:
        """What messages call an image."""

    def identity(self, number: int) -> str:
        """What tells an image from another, wherever all of them lie."""
        return self.told(number)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what all images are, and their classes: it asks for the length of every file, and so once."""
        found = hashlib.sha256(repr(self.classes).encode(errors="surrogateescape"))
        found.update(self.labels.numpy().tobytes())
        for number in range(len(self)):
            found.update(self.identity(number).encode(errors="surrogateescape"))
        return found.hexdigest()

    @abstractmethod
    def pixels(self, number: int, least: int = 0) -> Pixels:
        """An image, decoded: uint8 [H, W, 3]; `least` as in `decoding.decoded`.

        Raises:
            BadImageError: there is none.
        """

    @abstractmethod
    def size(self, number: int) -> tuple[int, int]:
        """Height and width of an image, without decoding it.

        Raises:
            BadImageError: it is damaged, or cannot be read.
        """

    def order(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """All positions of an index in an order drawn from a generator, int64 [N]."""
        return torch.randperm(len(index), generator=generator, device="cpu")

    def problem(self, number: int) -> tuple[tuple[int, int], str]:
        """Height and width of an image, or (0, 0) and why it is of no use."""
        try:
            return self.size(number), ""
        except BadImageError as error:
            return (0, 0), str(error)


# --- Files in class folders -------------------------------------------------------------------------------------------


class Names:
    """Many names in one string of bytes."""

    def __init__(self, names: Iterable[str]) -> None:
        joined, ends = bytearray(), array("q")
        for name in names:
            joined += os.fsencode(name)
            ends.append(len(joined))
        self.joined, self.ends = bytes(joined), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        start = self.ends[number - 1] if number else 0
        return os.fsdecode(self.joined[start : self.ends[number]])


class FolderSource(Source):
    """Image files in class folders, at any depth, in the order of their names.

    Files of other endings than `decoding.ENDINGS` are left out, and so is what begins with a dot.

    Args:
        folder: with a folder for each class.
        classes: names of the classes; None for the folders that there are, in the order of their names.

    Raises:
        DataError: there is no such folder, it holds no class folders, or one of them no image, or it cannot be read.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        self.folder, self.name = folder, str(folder)
        folders = class_folders(folder)
        self.classes = tuple(folders if classes is None else classes)
        if unknown := sorted(set(folders) - set(self.classes)):
            raise DataError(f"{folder} holds {named(unknown)}, which the training images have no class of")
        labels, empty = array("q"), list[str]()

        def in_order() -> Iterator[str]:
            for one in folders:
                found = sorted(_files_below(folder / one, one))
                labels.extend([self.classes.index(one)] * len(found))
                empty.extend([] if found else [one])
                yield from found

        self.files = Names(in_order())
        self.labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        if empty:
            raise DataError(f"{folder} holds no {TOLD} files in {named(empty)}; a class folder must hold at least one")

    def told(self, number: int) -> str:
        """Its path."""
        return str(self.folder / self.files[number])

    def identity(self, number: int) -> str:
        """Its path in the folder, and its length."""
        try:
            return f"{self.files[number]} {(self.folder / self.files[number]).stat().st_size}"
        except OSError:  # it is gone, or a link to nothing
            return self.files[number]

    def pixels(self, number: int, least: int = 0) -> Pixels:
        """See `Source`."""
        try:
            content = content_of(f"{self.name}/{self.files[number]}")
        except OSError as error:
            raise BadImageError(error.strerror or in_a_line(error)) from error
        return decoding.decoded(content, least)

    def size(self, number: int) -> tuple[int, int]:
        """See `Source`."""
        path = self.folder / self.files[number]
        try:
            if not path.is_file():
                raise BadImageError("it is no ordinary file")
            with path.open("rb") as file:
                return decoding.size_of(file)
        except OSError as error:
            raise BadImageError(error.strerror or in_a_line(error)) from error


class ListedSource(FolderSource):
    """Image files that a file lists with their classes, as Tiny-ImageNet's validation images are.

    Args:
        folder: of the files.
        listing: lines of a file's name, a tab, its class, and more that is left out.
        classes: names of the classes.

    Raises:
        DataError: the listing cannot be read, names a file that is not there, or an unknown class.
    """

    def __init__(self, folder: Path, listing: Path, classes: Sequence[str]) -> None:
        self.folder, self.name, self.classes = folder, str(folder), tuple(classes)
        numbers = {name: number for number, name in enumerate(classes)}
        files, labels = list[str](), list[int]()
        try:
            for line in filter(str.strip, listing.read_text().splitlines()):
                file, _, rest = line.partition("\t")
                label = rest.partition("\t")[0]
                if label not in numbers:
                    raise DataError(f"{listing} has the class {label!r} for {file}; the training images have no such")
                if not (folder / file).is_file():
                    raise DataError(f"{listing} names {file}, which is not in {folder}")
                files.append(file)
                labels.append(numbers[label])
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{listing} cannot be read: {in_a_line(error)}") from error
        if not files:
            raise DataError(f"{listing} lists no images")
        self.files, self.labels = Names(files), torch.tensor(labels, dtype=torch.int64)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a folder, in order.

    Raises:
        DataError: there are none, or it cannot be read.
    """
    try:
        found = sorted(one.name for one in os.scandir(folder) if one.is_dir() and not one.name.startswith(HIDDEN))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    for name in found:
        if not name.isprintable():
            raise DataError(f"{folder} holds the class folder {name!r}; the name of a class must be printable UTF-8")
    if not found:
        raise DataError(f"{folder} holds no folders; it must hold one for each class, with {TOLD} files")
    return found


def has_folders(folder: Path) -> bool:
    """Whether folders lie in a folder, or nothing at all."""
    with os.scandir(folder) as entries:
        found = [one.is_dir() for one in entries if not one.name.startswith(HIDDEN)]
    return any(found) or not found


def content_of(path: str) -> bytes:
    """All bytes of a file, without what objects of a path and of a file cost: small images are decoded in less."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = [os.read(descriptor, os.fstat(descriptor).st_size + 1)]
        while parts[-1]:  # of what is read in several parts, as from some mounted stores
            parts.append(os.read(descriptor, 2**20))
    finally:
        os.close(descriptor)
    return b"".join(parts) if len(parts) > 2 else parts[0]


def named(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _files_below(folder: Path, before: str) -> Iterator[str]:
    """Image files at any depth, by the path from the folder above all class folders."""
    try:
        with os.scandir(folder) as entries:
            for one in entries:
                if one.name.startswith(HIDDEN):
                    continue
                path = f"{before}/{one.name}"
                if one.is_dir():
                    yield from _files_below(folder / one.name, path)
                elif one.name.lower().endswith(ENDINGS):
                    yield path
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error


# --- Rows of somebody's own data set ----------------------------------------------------------------------------------


class RowsSource(Source):
    """Rows with an image and a label each, such as a split of a Hugging Face data set.

    An image is one of Pillow's, the bytes of a file, a dict with them under "bytes" or with the file's "path" (as with
    ``datasets.Image(decode=False)``, which is faster), or an array uint8 [H, W], [H, W, 3] or [3, H, W].

    Args:
        rows: ``rows[number]`` is a dict; with a length.
        image: name of the images.
        label: name of the labels, integers.
        classes: their names; None for those that ``rows.features`` has, or else the numbers.

    Raises:
        InputError: there are no rows, or none of these names, or labels are no classes.
    """

    def __init__(
        self, rows: Any, image: str = "image", label: str = "label", classes: Sequence[str] | None = None
    ) -> None:
        self.rows, self.image, self.name = rows, image, type(rows).__name__
        if isinstance(rows, Mapping) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise InputTypeError(f"rows is a {type(rows).__name__}; it must have rows by their number, and a length")
        if not len(rows):
            raise InputError("rows is empty; there must be at least one image")
        columns = list(rows[0]) if isinstance(rows[0], Mapping) else []
        for name in (image, label):
            if name not in columns:
                raise InputError(f"rows have {', '.join(map(str, columns)) or 'no names'}; they have no {name!r}")
        column = rows[label] if hasattr(rows, "column_names") else [rows[number][label] for number in range(len(rows))]
        labels = np.asarray(list(column))
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise InputError(f"{label!r} is of {labels.dtype} {list(labels.shape)}; labels must be integers, one a row")
        if classes is None:
            classes = getattr((getattr(rows, "features", None) or {}).get(label), "names", None)
        low, high = int(labels.min()), int(labels.max())
        most = MOST_CLASSES if classes is None else len(classes)
        if low < 0 or high >= most:
            raise InputError(f"labels run from {low} to {high}; they must be in [0, {most})")
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.classes = tuple(map(str, range(high + 1)) if classes is None else classes)

    def told(self, number: int) -> str:
        """Its number."""
        return f"row {number}"

    def pixels(self, number: int, least: int = 0) -> Pixels:
        """See `Source`."""
        found = self._held(number)
        if isinstance(found, bytes):
            return decoding.decoded(found, least)
        if hasattr(found, "convert"):
            return decoding.of_image(found)
        return _coloured(np.asarray(found))

    def size(self, number: int) -> tuple[int, int]:
        """See `Source`."""
        found = self._held(number)
        if isinstance(found, bytes):
            file: BinaryIO = io.BytesIO(found)
            return decoding.size_of(file)
        height, width, _ = self.pixels(number).shape
        return height, width

    def _held(self, number: int) -> Any:
        """The bytes of a row's file, or its image in another form."""
        row = self.rows[number]
        if not isinstance(row, Mapping) or self.image not in row:
            raise BadImageError(f"it has no {self.image!r}")
        found = row[self.image]
        if isinstance(found, bytearray | memoryview):
            return bytes(found)
        if isinstance(found, str | Path):
            found = {"path": found}
        if not isinstance(found, dict):
            return found
        if isinstance(found.get("bytes"), bytes | bytearray | memoryview):
            return bytes(found["bytes"])
        try:
            return content_of(str(found.get("path")))
        except OSError as error:
            raise BadImageError(f"{found.get('path')}: {error.strerror or error}") from error


def _coloured(array: Any) -> Pixels:
    """An array of an image as uint8 [H, W, 3]."""
    if array.dtype != np.uint8:
        raise BadImageError(f"it is an array of {array.dtype}; it must be uint8")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise BadImageError(f"it is an array of {list(array.shape)}; it must be [H, W], [H, W, 3] or [3, H, W]")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
