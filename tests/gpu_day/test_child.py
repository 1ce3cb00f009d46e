"""Time boxes hold for children, and for what children start."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from gpu_day.child import Command, run_all

BEATS = """
import pathlib, sys, time
while True:
    pathlib.Path(sys.argv[1]).write_text(str(time.monotonic()))
    time.sleep(0.05)
"""


def run(tmp_path, *commands, seconds=30.0, **settings):
    return run_all(commands, time.monotonic() + seconds, tmp_path / "logs", dict(os.environ), tmp_path, **settings)


def test_a_child_leaves_its_output_and_status(kit, tmp_path):
    (good, bad) = run(tmp_path, kit.python("good", "print('said')"), kit.python("bad", "raise SystemExit(3)"))
    assert good.well
    assert good.log.read_text().splitlines()[-1] == "said"
    assert (bad.well, bad.status, bad.timed_out) == (False, 3, False)


def test_allowed_statuses_are_no_failure(kit, tmp_path):
    (found,) = run(tmp_path, kit.python("five", "raise SystemExit(5)", allowed=frozenset({0, 5})))
    assert found.well


def test_a_program_that_is_not_there_is_said_in_its_log(kit, tmp_path):
    (found,) = run(tmp_path, Command("absent", ("/no/such/program",)))
    assert not found.well
    assert not found.timed_out
    assert "cannot be started" in found.log.read_text()


@pytest.mark.parametrize("escape", ["", "os.setsid()", "os.setpgid(0, 0)"])
def test_grandchildren_end_with_their_parent(kit, tmp_path, escape):
    """One that shuts its ears to the interruption, in the group of its parent, in another, and in another session."""
    beat, stopped = tmp_path / "beat", threading.Event()
    start = (
        "import os, subprocess, sys, time, signal;"
        f"subprocess.Popen([sys.executable, '-c', {BEATS!r}, {str(beat)!r}], "
        f"preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.SIG_IGN), {escape or None})); time.sleep(60)"
    )
    threading.Thread(target=lambda: (kit.wait_for(beat), stopped.set())).start()
    (found,) = run(tmp_path, kit.python("parent", start), stopped=stopped)
    assert found.timed_out
    assert not writes(beat)


def test_grandchildren_end_with_a_child_that_ends_well(kit, tmp_path):
    beat = tmp_path / "beat"
    start = (
        f"import subprocess, sys, time, pathlib; subprocess.Popen([sys.executable, '-c', {BEATS!r}, {str(beat)!r}],"
        f"start_new_session=True)\nwhile not pathlib.Path({str(beat)!r}).exists(): time.sleep(0.01)"
    )
    (found,) = run(tmp_path, kit.python("parent", start))
    assert found.well
    assert not writes(beat)


def writes(beat):
    """Whether somebody still does."""
    last = beat.read_text()
    time.sleep(0.4)
    return beat.read_text() != last


def test_it_is_interrupted_before_it_is_killed(kit, tmp_path):
    ready, stopped = tmp_path / "ready", threading.Event()
    code = (
        "import pathlib, time\n"
        f"try: pathlib.Path({str(ready)!r}).touch(); time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    )
    threading.Thread(target=lambda: (kit.wait_for(ready), stopped.set())).start()
    (found,) = run(tmp_path, kit.python("saver", code), stopped=stopped)
    assert found.log.read_text().splitlines()[-1] == "saved"
    assert found.status == 0


def test_one_that_will_not_be_interrupted_is_killed_when_its_time_is_over(tmp_path):
    deaf = Command("deaf", ("sh", "-c", "trap '' INT; while :; do sleep 0.1; done"))
    begin = time.monotonic()
    (found,) = run(tmp_path, deaf, seconds=1.5)
    assert found.timed_out
    assert found.status == -signal.SIGKILL
    assert 1.2 < time.monotonic() - begin < 20


def test_many_share_the_time_and_those_that_never_began_say_so(kit, tmp_path):
    sleepers = [kit.python(f"s{i}", "import time; time.sleep(60)") for i in range(4)]
    begin = time.monotonic()
    found = run(tmp_path, *sleepers, seconds=1.5, workers=2)
    assert time.monotonic() - begin < 5
    assert all(exit_.timed_out for exit_ in found)
    assert [exit_.status is None for exit_ in found] == [False, False, True, True]
