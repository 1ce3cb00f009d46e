"""Files that are whole or not there, folders that one process uses at a time, and paths that somebody has named."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afd.errors import AfdError, InputError

LOCK = ".lock"
PART = re.compile(r"\..+\.(\d+)\.part")
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class FileError(AfdError):
    """A file cannot be written; the message names it and the reason."""


class FolderError(AfdError):
    """A folder cannot be used; the message names it and the reason."""


def write_whole(path: Path | str, content: bytes | memoryview | str, previous: Path | None = None) -> None:
    """Writes beside the target, flushes to disk, then renames: whatever happens, the file at `path` is a whole one.

    What an earlier process that was killed in here has left beside it is removed.

    Args:
        path: file to write; its folder is made.
        content: bytes, or text that is written as UTF-8.
        previous: where to keep what was at `path`, which is there at every moment; None to let it go.

    Raises:
        FileError: the file cannot be written (a full disk, say); what was at `path` is still there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        make_folder(path.parent)
        sweep(path.parent, path.name)
        if previous is not None:
            sweep(previous.parent, previous.name)
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                _keep(path, previous)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def append_whole(path: Path | str, content: bytes | str) -> None:
    """Adds to the end of a file, all of it or nothing.

    Args:
        path: file to write; made, with its folder, where there is none.
        content: bytes, or text that is written as UTF-8.

    Raises:
        FileError: it cannot be written (a full disk, say); the file is as it was.
    """
    path = Path(path)
    rest = memoryview(content.encode() if isinstance(content, str) else content)
    make_folder(path.parent)
    try:
        new = not path.exists()
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                file.truncate(before)
                if new:
                    path.unlink()
                raise
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Makes a folder that can be written to, or finds it made.

    Raises:
        FolderError: it cannot be made, is a file, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        kind = "a file" if folder.exists() else "a link that leads nowhere"
        raise FolderError(f"{folder} is {kind}; it must be a folder") from None
    except NotADirectoryError:
        raise FolderError(f"{folder} cannot be made: a part of the path is a file") from None
    except OSError as error:
        raise FolderError(f"{folder} cannot be made: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FolderError(f"{folder} cannot be written to: permission denied")


def check_writable(folder: Path) -> None:
    """Makes a folder and tries it: some that look as if they could be written to refuse every file.

    Raises:
        FolderError: no file can be made there.
    """
    make_folder(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FolderError(f"{folder} cannot be written to: {error.strerror or error}") from error


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what processes that are no more were writing in a folder: all of it, or of the file of one name."""
    for path in folder.glob(".*.part" if name is None else f".{name}.*.part"):
        match = PART.fullmatch(path.name)
        if match and not _lives(int(match[1])):
            path.unlink(missing_ok=True)


@dataclass
class _Claim:
    """A lock that is held: by which thread, in which open file, how many times."""

    owner: int
    descriptor: int
    depth: int = 1


class FolderLock:
    """This process's claim on a folder, which ends with the process, however that ends.

    One thread may take it several times. The operating system keeps it, so nothing is left to clear after a kill; a
    process that is forked lets go of it at once, so that workers which outlive the process do not hold it.

    Args:
        folder: made when the lock is taken.
    """

    _taken: dict[Path, _Claim] = {}  # noqa: RUF012  (by this process: its threads could wait for each other)
    _guard = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """Takes the folder for as long as the context lasts, and removes what dead processes were writing there.

        Raises:
            FolderError: another process, or another thread of this one, uses it; or it cannot be written to.
        """
        make_folder(self.folder)
        path = self.folder.resolve() / LOCK
        with self._guard:
            claim = self._taken.get(path)
            if claim is None:
                claim = self._taken[path] = _Claim(threading.get_ident(), self._descriptor(path))
                sweep(self.folder)
            elif claim.owner == threading.get_ident():
                claim.depth += 1
            else:
                raise FolderError(f"{self.folder} is in use by another run of this process; name another folder")
        try:
            yield
        finally:
            with self._guard:
                claim.depth -= 1
                if claim.depth == 0 and self._taken.get(path) is claim:  # and not a fork's
                    del self._taken[path]
                    if _is_at(claim.descriptor, path):
                        path.unlink()
                    os.close(claim.descriptor)

    def check(self) -> None:
        """Raises FolderError if the folder that is held has been removed since, or is another one now."""
        path = self.folder.absolute() / LOCK
        with self._guard:
            if not any(_is_at(claim.descriptor, path) for claim in self._taken.values()):
                raise FolderError(
                    f"{self.folder} was removed or replaced while it was in use; nothing is written there"
                )

    @classmethod
    def let_go(cls) -> None:
        """What a forked process does first: its parent holds the folders, and not it."""
        cls._guard = threading.Lock()
        for claim in cls._taken.values():
            os.close(claim.descriptor)
        cls._taken.clear()

    def _descriptor(self, path: Path) -> int:
        try:
            return self._locked(path)
        except OSError as error:
            raise FolderError(f"{self.folder} cannot be written to: {error.strerror or error}") from error

    def _locked(self, path: Path) -> int:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in LOCKLESS:
                    print(f"afd: warning: {self.folder} cannot be locked on this file system", file=sys.stderr)
                    return descriptor
                owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
                os.close(descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise FolderError(
                    f"{self.folder} is in use by another process{f' ({owner})' if owner else ''}; name another "
                    "folder, or wait until it has ended"
                ) from None
            if _is_at(descriptor, path):  # and not a file that its owner has removed since
                try:
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                except OSError:  # a full disk
                    path.unlink()
                    os.close(descriptor)
                    raise
                return descriptor
            os.close(descriptor)


os.register_at_fork(after_in_child=FolderLock.let_go)


def new_folder(parent: Path) -> Path:
    """Makes the next numbered folder, ``parent/0001`` or what follows the largest number there."""
    make_folder(parent)
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    number = max(numbers, default=0) + 1
    while True:
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run was quicker
            number += 1
        except OSError as error:
            raise FolderError(f"{folder} cannot be made: {error.strerror or error}") from error
        else:
            return folder


def point_to(folder: Path, name: str = "latest") -> None:
    """Makes the symbolic link `name` beside a folder point to it; a real folder of that name stays, and it is said."""
    link = folder.with_name(name)
    if link.exists() and not link.is_symlink():
        print(f"afd: warning: {link} is no link but a folder; it stays, and does not lead to {folder}", file=sys.stderr)
        return
    beside = link.with_name(f".{name}.{os.getpid()}.part")
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(folder.name)
        beside.replace(link)
    except OSError as error:
        print(f"afd: warning: {link} does not lead to {folder}: {error.strerror or error}", file=sys.stderr)


def _keep(path: Path, previous: Path) -> None:
    """Makes `previous` what `path` is, without a moment in which either is missing."""
    beside = previous.with_name(f".{previous.name}.{os.getpid()}.part")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:  # a file system without hard links
        path.replace(previous)
        return
    beside.replace(previous)
    beside.unlink(missing_ok=True)  # where both were one file already, replace did nothing


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    """Makes a rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Paths that somebody has named ----------------------------------------------------------------------------------


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
