"""Files that are whole or not there, and folders that one process uses at a time."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest

from afd.files import FileError, FolderError, FolderLock, make_folder, new_folder, point_to, sweep, write_whole

NOBODY = 2**22 + 12345  # above the largest process number


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_what_was_there_is_kept(tmp_path):
    file, before = tmp_path / "new" / "a.txt", tmp_path / "new" / "before.txt"
    write_whole(str(file), "one")
    write_whole(file, b"two", before)
    write_whole(file, memoryview(b"three"), before)
    assert (file.read_text(), before.read_text()) == ("three", "two")
    assert names(file.parent) == ["a.txt", "before.txt"]


@pytest.mark.parametrize("dies_at", range(4))
def test_killed_between_any_two_steps_both_files_are_whole(dies_at, tmp_path):
    """The process dies at its n-th rename or link."""
    script = f"""
        import os, pathlib
        from afd.files import write_whole
        folder = pathlib.Path({str(tmp_path)!r})
        write_whole(folder / "last", "one")
        write_whole(folder / "last", "two", folder / "previous")
        steps = 0
        def dying(real):
            def step(*arguments):
                global steps
                if steps == {dies_at}:
                    os._exit(9)
                steps += 1
                return real(*arguments)
            return step
        os.link, pathlib.Path.replace = dying(os.link), dying(pathlib.Path.replace)
        write_whole(folder / "last", "three", folder / "previous")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode
    assert ended == (9 if dies_at < 3 else 0)
    last, previous = ((tmp_path / name).read_text() for name in ("last", "previous"))
    assert (last, previous) in [("two", "one"), ("two", "two"), ("three", "two")]
    write_whole(tmp_path / "last", "four", tmp_path / "previous")
    assert names(tmp_path) == ["last", "previous"]
    assert (tmp_path / "previous").read_text() == last


def test_what_a_dead_process_was_writing_is_removed_and_a_living_ones_is_not(tmp_path):
    dead, living = tmp_path / f".a.pt.{NOBODY}.part", tmp_path / f".a.pt.{os.getppid()}.part"
    other, mine = tmp_path / f".b.pt.{NOBODY}.part", tmp_path / ".notes.part"
    for path in (dead, living, other, mine):
        path.write_text("half")
    write_whole(tmp_path / "a.pt", "whole")
    assert names(tmp_path) == sorted([living.name, other.name, mine.name, "a.pt"])
    sweep(tmp_path)
    assert names(tmp_path) == sorted([living.name, mine.name, "a.pt"])


def test_a_file_that_cannot_be_written_is_named_and_nothing_half_written_stays(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileError, match=rf"cannot write {tmp_path}/taken: Is a directory"):
        write_whole(tmp_path / "taken", "text")
    assert names(tmp_path) == ["taken"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match=rf"{tmp_path}/file is a file; it must be a folder"):
        write_whole(tmp_path / "file" / "a.txt", "text")
    with pytest.raises(FolderError, match=r"file/deeper cannot be made: a part of the path is a file"):
        make_folder(tmp_path / "file" / "deeper")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderError, match=r"link is a link that leads nowhere; it must be a folder"):
        make_folder(tmp_path / "link")


def elsewhere(folder):
    """What another process that takes the folder says."""
    script = f"""
        from pathlib import Path
        from afd.files import FolderError, FolderLock
        try:
            with FolderLock(Path({str(folder)!r})).held():
                print("taken")
        except FolderError as error:
            print(error)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    ).stdout.strip()


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    with FolderLock(tmp_path).held():
        with FolderLock(tmp_path / ".").held():  # the same thread: a part of the same run
            pass
        said = elsewhere(tmp_path)
        assert said.startswith(f"{tmp_path} is in use by another process (process {os.getpid()} on ")
        assert said.endswith("; name another folder, or wait until it has ended")
    assert elsewhere(tmp_path) == "taken"
    assert names(tmp_path) == []


def test_and_one_threads(tmp_path):
    said = []

    def other():
        try:
            with FolderLock(tmp_path).held():
                said.append("taken")
        except FolderError as error:
            said.append(str(error))

    with FolderLock(tmp_path).held():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert said == [f"{tmp_path} is in use by another run of this process; name another folder", "taken"]


def test_a_killed_owner_leaves_it_free_even_if_its_workers_live_on(tmp_path):
    script = f"""
        import os, signal, sys, time
        from pathlib import Path
        from afd.files import FolderLock
        with FolderLock(Path({str(tmp_path)!r})).held():
            worker = os.fork()
            if not worker:
                time.sleep(30)
                os._exit(0)
            print(worker, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    worker = int(owner.stdout.readline())
    owner.wait()
    try:
        os.kill(worker, 0)
        assert names(tmp_path) == [".lock"]
        assert elsewhere(tmp_path) == "taken"
    finally:
        os.kill(worker, 9)


def test_reading_the_folder_does_not_let_go_of_it(tmp_path):
    with FolderLock(tmp_path).held():
        assert (tmp_path / ".lock").read_text().startswith("process ")
        assert "is in use by another process" in elsewhere(tmp_path)


def test_a_folder_that_was_removed_is_noticed_and_another_owners_lock_stays(tmp_path):
    folder = tmp_path / "run"
    lock = FolderLock(folder)
    with lock.held():
        lock.check()
        (folder / ".lock").unlink()
        folder.rmdir()
        with pytest.raises(FolderError, match="run was removed or replaced while it was in use"):
            lock.check()
        folder.mkdir()
        (folder / ".lock").write_text("process 1, another one's")
    assert (folder / ".lock").read_text() == "process 1, another one's"


def test_numbers_go_on_from_the_largest_and_the_link_follows(tmp_path, capsys):
    runs = tmp_path / "runs"
    for expected in ("0001", "0002"):
        folder = new_folder(runs)
        assert folder.name == expected
        point_to(folder)
        assert (runs / "latest").resolve() == folder
    (runs / "0041").mkdir()
    (runs / "notes").mkdir()
    assert new_folder(runs).name == "0042"
    (runs / "latest").unlink()
    (runs / "latest").mkdir()
    point_to(folder)
    assert "latest is no link but a folder; it stays" in capsys.readouterr().err
    assert names(runs) == ["0001", "0002", "0041", "0042", "latest", "notes"]
