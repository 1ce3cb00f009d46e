"""The disk that tests fill is full while it is asked to be, in this process and in those that it starts."""

import subprocess
import sys

import pytest
from full_disk import PAGE, REASONS, Disk

from afd.files import FileError, write_whole


@pytest.fixture(params=["mounted", "limited"])
def either(request, disk, tmp_path):
    """A disk of each kind; as root of a machine of one's own, both can be had."""
    if request.param == "limited":
        return Disk(tmp_path, mounted=False)
    if not disk.mounted:
        pytest.skip("this user may mount nothing")
    return disk


def test_nothing_can_be_written_while_it_is_full(either):
    path = either.folder / "file"
    write_whole(path, b"before")
    with either.full():
        with pytest.raises(FileError, match=f"cannot write .*file: {REASONS}"):
            write_whole(path, b"after")
        code = f"import pathlib; pathlib.Path({str(either.folder / 'other')!r}).write_text('text')"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        (either.folder / "other").unlink()
    assert "OSError" in child.stderr
    assert path.read_bytes() == b"before"
    write_whole(path, b"after")
    assert either.files() == ["file"]
    assert path.read_bytes() == b"after"


def test_room_may_be_left(either):
    path = either.folder / "file"
    with either.full(room=2 * PAGE):
        path.write_bytes(bytes(2 * PAGE))
        with pytest.raises(OSError, match=REASONS):
            path.write_bytes(bytes(2 * PAGE + 1))
