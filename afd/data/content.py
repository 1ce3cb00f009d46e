"""The bytes of a data file, with every way that reading can fail told as one kind of error."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from afd.data.errors import DataError


def read(path: Path) -> bytes:
    """All bytes of a file; a name that ends in .gz is unpacked.

    Raises:
        DataError: the file cannot be read, or is not the whole of a gzip file.
    """
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as stream:
            return stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); replace it by a fresh copy") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def check_labels(path: Path, label: int, num_classes: int) -> None:
    """Raises DataError if a file's label, its largest or its least, is not in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise DataError(f"{path} holds label {label}; expected labels 0 to {num_classes - 1}")
