"""A child leaves its output and status, and nothing else; its environment is its own."""

import os
import sys
import threading
import time

import pytest
from gpu_day.run import environment, run

BEATS = "import pathlib, time\nwhile True: pathlib.Path({!r}).write_text(str(time.time())); time.sleep(0.05)"


@pytest.fixture
def child(tmp_path):
    def child(*words, stopped=()):
        until = time.monotonic() + 30
        return run(words, tmp_path / "log", os.environ, tmp_path, until, lambda: None, stopped)

    return child


def test_a_child_leaves_its_output_and_status(child, tmp_path):
    assert [child("echo", "said"), child("sh", "-c", "exit 3"), child("/no/such/program")] == [0, 3, 127]
    assert child("sh", "-c", "kill -9 $$") == -9, "not for want of time, but for want of memory, say"
    log = (tmp_path / "log").read_text()
    assert "said\n$ " in log, "one log for all commands of a step"
    assert "cannot be started" in log


def test_a_deaf_grandchild_ends_with_a_day_that_is_stopped(child, tmp_path):
    beat, stopped = tmp_path / "beat", []
    words = [sys.executable, "-c", BEATS.format(str(beat))]
    start = "import signal, subprocess, time; ignore = lambda: signal.signal(2, signal.SIG_IGN)\n"
    threading.Timer(1.5, lambda: stopped.append(15)).start()
    start += f"subprocess.Popen({words}, preexec_fn=ignore); time.sleep(60)"
    assert child(sys.executable, "-c", start, stopped=stopped) is None
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


def test_children_get_this_checkout_a_home_in_the_work_folder_and_nothing_of_make(tmp_path):
    given = {"PATH": "/bin", "HOME": "/absent", "MAKEFLAGS": "-j", "PYTHONPATH": "/peers", "CUDA_HOME": "/kit"}
    found = environment(tmp_path, tmp_path / "work", given)
    assert "MAKEFLAGS" not in found
    assert found["HOME"] == str(tmp_path / "work" / "home")
    assert (tmp_path / "work" / "home").is_dir()
    assert found["PYTHONPATH"] == ":".join([*(f"{tmp_path}{at}" for at in ("", "/benchmarks", "/work/site")), "/peers"])
    assert {"/bin", "/kit/bin", "/kit/compute-sanitizer"} <= set(found["PATH"].split(":"))
