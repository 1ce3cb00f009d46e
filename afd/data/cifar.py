"""CIFAR-10 and CIFAR-100 from either of their archives: the binary one, or the pickles of the Python one."""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afd.data import fetch
from afd.data.fetch import Source, locate, which
from afd.data.images import Images
from afd.errors import DataError
from afd.files import check_target

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}
RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
BYTE = {"u1", b"u1", "|u1", b"|u1"}  # NumPy's names for uint8


class _Dtype:
    """What a pickle says of a dtype."""

    __slots__ = ("arguments", "state")

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array:
    """What a pickle says of an array: (version, shape, dtype, whether columns come first, bytes)."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """An unpickler to which nothing is known but the names that an array's pickle uses."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECONSTRUCT:
            return lambda *_: _Array()  # made for this pickle alone, as it could change them
        if (module, name) == ("numpy", "dtype"):
            return lambda *arguments: _Dtype(arguments)
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_pickled(path: Path, count: int, row: int, label: str, num_classes: int) -> tuple[Bytes, Bytes]:
    """Pixels and labels of one file.

    Args:
        path: the file; one whose name ends in .gz is unpacked.
        count: images that it must hold.
        row: bytes of an image.
        label: the entry that holds the labels.
        num_classes: labels are below it.

    Returns:
        uint8 [count, row] and uint8 [count].

    Raises:
        DataError: it cannot be read, or is not such a file; nothing in it was run.
    """
    entries = _entries(path, fetch.read_bytes(path))
    pixels = _pixels(path, _entry(path, entries, "data"), count, row)
    labels = _entry(path, entries, label)
    if not isinstance(labels, list) or not all(type(one) is int for one in labels):
        raise DataError(f"{path} has {label} that are no list of whole numbers")
    if len(labels) != count:
        raise DataError(f"{path} has {len(labels)} {label}; expected {count}")
    for extreme in (min(labels), max(labels)):
        fetch.check_labels(path, extreme, num_classes)
    return pixels, np.array(labels, dtype=np.uint8)


def _entries(path: Path, data: bytes) -> dict[Any, Any]:
    """The dict that a pickle holds."""
    try:
        _check_opcodes(data)
        found = _Reader(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # on damaged bytes the unpickler stumbles in any way it can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path} is no pickle of images and labels, or a damaged one: {reason[:200]}; replace it by a fresh copy"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}; expected a dict of images and labels")
    return found


def _check_opcodes(data: bytes) -> None:
    """Refuses what no such file needs: objects, persistent names, extensions, numbers that ask for memory."""
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name} at byte {position}")
        if opcode.name in {"PUT", "LONG_BINPUT"} and not (isinstance(argument, int) and 0 <= argument <= len(data)):
            raise pickle.UnpicklingError(f"it has an entry numbered {argument} at byte {position}")


def _entry(path: Path, entries: dict[Any, Any], name: str) -> Any:
    """An entry under its name in Python 2's or 3's strings."""
    for key in (name.encode(), name):
        if key in entries:
            return entries[key]
    raise DataError(f"{path} has no entry {name!r}; expected one")


def _pixels(path: Path, array: Any, count: int, row: int) -> Bytes:
    try:
        _, shape, dtype, columns_first, data = array.state
        kind = dtype.arguments[0]
        known = kind in BYTE
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} has data that are no array; expected uint8 [{count}, {row}]") from error
    if not isinstance(columns_first, bool):
        raise DataError(f"{path} has data whose order is {columns_first!r:.50}; expected True or False")
    if not known:
        raise DataError(f"{path} has data of dtype {kind!r:.50}; expected uint8 [{count}, {row}]")
    if shape != (count, row):
        raise DataError(f"{path} has data of shape {shape!r:.50}; expected ({count}, {row})")
    if not isinstance(data, bytes) or len(data) != count * row:
        size = len(data) if isinstance(data, bytes) else "no"
        raise DataError(f"{path} has {size} bytes of pixels; expected {count * row}")
    return np.frombuffer(data, dtype=np.uint8).reshape(count, row, order="F" if columns_first else "C")


SHAPE = (3, 32, 32)  # the red plane, then green, then blue, each row by row
PIXELS = 3 * 32 * 32
URL = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Layout:
    """How one CIFAR is laid out in its files, in both archives.

    Attributes:
        source: the binary files: records of `label_bytes` labels, the last one meant, then the pixels.
        pickled: the Python files, whose entry `label` holds the labels.
        records: images per file, in the order of the files; the last file is the test set.
    """

    source: Source
    pickled: Source
    num_classes: int
    label_bytes: int
    label: str
    records: tuple[int, ...]

    def read(self, root: Path, *, download: bool) -> tuple[Images, Images]:
        """Training and test images, 3x32x32."""
        check_target("data-root", root)
        source = which((self.source, self.pickled), root)
        paths = locate(source, root, download=download)
        read_one = self.read_file if source is self.source else self.read_pickle
        *train, test = [read_one(path, count) for path, count in zip(paths, self.records, strict=True)]
        return self.images(train), self.images([test])

    def read_file(self, path: Path, count: int) -> tuple[Bytes, Bytes]:
        """Pixels uint8 [count, 3072] and labels uint8 [count] of one binary file."""
        data = fetch.read_bytes(path)
        record = self.label_bytes + PIXELS
        if len(data) != count * record:
            expected = f"{count * record} ({count} records of {record})"
            raise DataError(f"{path} holds {len(data)} bytes; expected {expected}")
        records = np.frombuffer(data, dtype=np.uint8).reshape(count, record)
        labels = records[:, self.label_bytes - 1]
        fetch.check_labels(path, int(labels.max()), self.num_classes)
        return records[:, self.label_bytes :], labels

    def read_pickle(self, path: Path, count: int) -> tuple[Bytes, Bytes]:
        """The same of one Python file, of which nothing is run."""
        return read_pickled(path, count, PIXELS, self.label, self.num_classes)

    def images(self, files: list[tuple[Bytes, Bytes]]) -> Images:
        """One set, from pixels and labels of its files."""
        pixels, labels = (np.concatenate(parts) for parts in zip(*files, strict=True))
        return Images(
            torch.from_numpy(pixels).view(-1, *SHAPE),
            torch.from_numpy(labels.astype(np.int64)),
            scale=255.0,
            num_classes=self.num_classes,
            name=self.source.name,
        )


CIFAR10: Layout = Layout(
    source=Source(
        name="cifar10",
        files=(*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"),
        folders=("cifar-10-batches-bin",),
        url=URL,
        md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        instead="cifar-10-batches-py or cifar-10-python.tar.gz",
    ),
    pickled=Source(
        name="cifar10",
        files=(*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"),
        folders=("cifar-10-batches-py",),
        url=URL,
        md5={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    num_classes=10,
    label_bytes=1,
    label="labels",
    records=(10_000,) * 6,
)

CIFAR100: Layout = Layout(
    source=Source(
        name="cifar100",
        files=("train.bin", "test.bin"),
        folders=("cifar-100-binary",),
        url=URL,
        md5={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        instead="cifar-100-python or cifar-100-python.tar.gz",
    ),
    pickled=Source(
        name="cifar100",
        files=("train", "test"),
        folders=("cifar-100-python",),
        url=URL,
        md5={"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
    ),
    num_classes=100,
    label_bytes=2,  # the coarse label, then the fine one
    label="fine_labels",
    records=(50_000, 10_000),
)
