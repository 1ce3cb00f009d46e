"""The IDX format: a magic number for type and rank, one 32-bit big-endian size per dimension, then the values."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from afd.data import content
from afd.data.errors import DataError

UNSIGNED_BYTE = 0x08


def read(path: Path, dims: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, plain or gzip-packed.

    Args:
        path: the file; a name that ends in .gz is unpacked.
        dims: the rank it must have: 3 for images [N, H, W], 1 for labels [N].

    Returns:
        Its values, uint8, in the shape its header states.

    Raises:
        DataError: it cannot be read, is of another type or rank, or is longer or shorter than its header states.
    """
    data = content.read(path)
    header = struct.Struct(f">{1 + dims}I")
    if len(data) < header.size:
        raise DataError(f"{path} holds {len(data)} bytes; expected at least the {header.size} bytes of an IDX header")
    magic, *shape = header.unpack_from(data)
    expected_magic = UNSIGNED_BYTE << 8 | dims
    if magic != expected_magic:
        raise DataError(f"{path} starts with magic number {magic:#010x}; expected {expected_magic:#010x}")
    expected = header.size + math.prod(shape)
    if len(data) != expected:
        raise DataError(f"{path} holds {len(data)} bytes; expected {expected} for the shape {shape} in its header")
    return np.frombuffer(data, dtype=np.uint8, offset=header.size).reshape(shape)
