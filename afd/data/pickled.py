"""CIFAR's Python archives without Python: what lies in their pickles is read, and nothing in them is run.

A pickle is a program for a small machine that can call any function there is. These files need little of it: dicts,
lists, numbers, strings, and one array of bytes. What else occurs in a file is refused before it is read, and the two
functions and one class of NumPy that arrays are made of are stood in for by records of what they were called with.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from afd.data import content
from afd.data.errors import DataError

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


def read(path: Path, count: int, row: int, label: str, num_classes: int) -> tuple[Bytes, Bytes]:
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
    entries = _entries(path, content.read(path))
    pixels = _pixels(path, _entry(path, entries, "data"), count, row)
    labels = _entry(path, entries, label)
    if not isinstance(labels, list) or not all(type(one) is int for one in labels):
        raise DataError(f"{path} has {label} that are no list of whole numbers")
    if len(labels) != count:
        raise DataError(f"{path} has {len(labels)} {label}; expected {count}")
    for extreme in (min(labels), max(labels)):
        content.check_labels(path, extreme, num_classes)
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
