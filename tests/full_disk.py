"""A disk that is really full: a small file system in memory where one may be mounted, else a limit on files' sizes.

    def test_a_full_disk_is_one_line(disk):
        with disk.full(), pytest.raises(FileError, match=r"cannot write .*: No space left"):
            write_whole(disk.folder / "file", b"content")
        assert disk.files() == []

Child processes see the same: a mount is everybody's, a limit is inherited.
"""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SIZE = 8 << 20
PAGE = 4096  # what a file in memory grows by: one that ends within a page has room to its end
REASONS = "(?:No space left on device|File too large)"  # a full disk's, and a limit's


@dataclass
class Disk:
    """A file system of `SIZE` bytes, or a folder on an ordinary one.

    Attributes:
        folder: where to write.
        mounted: whether it is a file system of its own.
    """

    folder: Path
    mounted: bool

    @contextmanager
    def full(self, room: int = 0) -> Iterator[None]:
        """Nothing more than `room` bytes, a multiple of `PAGE`, can be written for as long as the context lasts."""
        with self._filled(room) if self.mounted else _limited(room):
            yield

    def files(self) -> list[str]:
        """What lies in the folder, hidden files too."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    @contextmanager
    def _filled(self, room: int) -> Iterator[None]:
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as file:
            with suppress(OSError):
                while True:
                    file.write(bytes(PAGE))
            file.truncate(file.tell() - room)
        try:
            yield
        finally:
            filler.unlink()


@contextmanager
def _limited(room: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A disk at `folder`, which is gone when the context ends."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:  # no such tool here
        mounted = False
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
