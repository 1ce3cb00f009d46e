"""Time boxes hold for children, and for what children start; their environment is their own."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
from gpu_day.run import environment, run

BEATS = "import pathlib, time\nwhile True: pathlib.Path({!r}).write_text(str(time.time())); time.sleep(0.05)"


@pytest.fixture
def child(tmp_path):
    def child(code, seconds=30.0, stopped=(), beat=lambda: None):
        words = code if isinstance(code, list) else [sys.executable, "-c", code]
        return run(words, tmp_path / "log", os.environ, tmp_path, time.monotonic() + seconds, beat, stopped)

    return child


def test_a_child_leaves_its_output_and_status(child, tmp_path):
    assert [child("print('said')"), child("raise SystemExit(3)"), child(["/no/such/program"])] == [0, 3, 127]
    assert child("import os; os.kill(os.getpid(), 9)") == -9, "killed by something else, and not for want of time"
    log = (tmp_path / "log").read_text()
    assert "said\n$ " in log, "one log for all commands of a step"
    assert "cannot be started" in log


def test_it_is_interrupted_before_it_is_killed_and_beats_are_heard_meanwhile(child, tmp_path):
    beats = []
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    assert child(code, seconds=3, beat=lambda: beats.append(1)) is None
    assert (tmp_path / "log").read_text().endswith("saved\n")
    assert len(beats) >= 2


def test_a_deaf_child_is_killed_when_its_time_is_over(child):
    begin = time.monotonic()
    assert child(["sh", "-c", "trap '' INT; while :; do sleep 0.1; done"], seconds=1.5) is None
    assert 1.2 < time.monotonic() - begin < 4


def test_a_deaf_grandchild_ends_with_a_day_that_is_stopped(child, tmp_path):
    beat, stopped = tmp_path / "beat", []
    words = [sys.executable, "-c", BEATS.format(str(beat))]
    start = "import signal, subprocess, time; ignore = lambda: signal.signal(2, signal.SIG_IGN)\n"
    start += f"subprocess.Popen({words}, preexec_fn=ignore); time.sleep(60)"
    threading.Timer(1.5, lambda: stopped.append(15)).start()
    assert child(start, stopped=stopped) is None
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


def test_children_get_this_checkout_a_home_in_the_work_folder_and_nothing_of_make(tmp_path):
    given = {"PATH": "/usr/bin", "HOME": "/absent", "MAKEFLAGS": "-j", "PIP_USER": "1", "AFD_BACKEND": "reference"}
    found = environment(tmp_path, tmp_path / "work", {**given, "PYTHONPATH": "/peers", "CUDA_HOME": "/kit"})
    assert not {"MAKEFLAGS", "PIP_USER", "AFD_BACKEND"} & set(found)
    assert found["HOME"] == str(tmp_path / "work" / "home")
    assert (tmp_path / "work" / "home").is_dir()
    folders = [str(tmp_path), str(tmp_path / "benchmarks"), str(tmp_path / "work" / "site"), "/peers"]
    assert found["PYTHONPATH"].split(os.pathsep) == folders
    assert {"/usr/bin", "/kit/bin", "/kit/compute-sanitizer"} <= set(found["PATH"].split(os.pathsep))
