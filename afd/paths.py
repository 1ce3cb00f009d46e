"""Paths that somebody has named: what no file system can look for, and folders that are taken back when left empty."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from afd.errors import InputError

HOPELESS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def check_path(argument: str, path: Path | str) -> None:
    """Raises InputError if no file or folder can be at a path: it is empty, too long, or runs in a circle of links.

    Args:
        argument: what it was given as, for the message.
        path: what is there, if anything, is of no concern.
    """
    text = os.fspath(path)
    if not text:
        raise InputError(f"{argument} is ''; it must name a file or folder")
    if "\0" in text:
        raise InputError(f"{argument} is {text!r}; a path has no null byte")
    try:
        Path(path).stat()
    except OSError as error:
        if error.errno in HOPELESS:
            shown = text if len(text) <= 80 else f"{text[:80]}…"
            raise InputError(f"{argument} is {shown}: {error.strerror}") from error


def check_target(argument: str, path: Path | str) -> None:
    """Raises InputError if nothing can be made at a path: as `check_path`, or a link on the way leads nowhere."""
    check_path(argument, path)
    for part in (Path(path), *Path(path).parents):
        if part.is_symlink() and not part.exists():
            told = "a link that leads nowhere" if part == Path(path) else f"below {part}, a link that leads nowhere"
            raise InputError(f"{argument} is {path}, {told}")


def check_file_target(argument: str, path: Path | str) -> None:
    """Raises InputError if no file can be written at a path: as `check_target`, or another thing is there."""
    check_target(argument, path)
    if Path(path).is_dir():
        raise InputError(f"{argument} is {path}, which is a folder; it must be the name of a file")
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{argument} is {path}, which is a device or pipe; it must be an ordinary file")


def check_source(argument: str, path: Path | str) -> None:
    """Raises InputError if what is at a path can be read without end: a device, a pipe; as `check_path`, besides."""
    check_path(argument, path)
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise InputError(f"{argument} is {path}, which is a device or pipe; it must be an ordinary file")


def missing(folder: Path) -> list[Path]:
    """A folder and those above it, as far as they are not there."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, in this order, that nothing is in."""
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            try:
                folder.rmdir()
            except OSError as error:  # another process was quicker, to remove it or to put something there
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise
