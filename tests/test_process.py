"""A command's process: Ctrl-C shows no traceback whenever it comes, a closed pipe neither, and a bug of ours does."""

import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afd import process
from afd.errors import InputError, ModelWarning

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
READY = """
import runpy, sys
from afd import process
run = process.run
def ready(*given):
    run_once(given)
def run_once(given):
    import signal
    handler = signal.signal
    def told(number, to):
        before = handler(number, to)
        if to is process._end and "told" not in vars(process):
            process.told = True
            print("ready", flush=True)
        return before
    signal.signal = told
    run(*given)
process.run = ready
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__")
"""  # says when Ctrl-C has been taken, and is otherwise the command
TINY = ["--width", "2", "--epochs", "1", "--attack-steps", "1", "--eval-steps", "1", "--out"]


def start(*words, **settings):
    child = [sys.executable, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT, "cwd": ROOT}
    return subprocess.Popen(child, **{**pipes, **settings})


@pytest.mark.parametrize(
    "words", [["afd", "info"], ["afd", "train", "--help"], ["afd", "train", *TINY], ["afd.demo", "--out"]], ids=" ".join
)
def test_ctrl_c_at_any_moment_is_a_line_and_status_130(words, tmp_path):
    """From the line on that takes it; the moments are drawn, and the early ones are many."""
    drawn = random.Random(" ".join(words))
    for attempt in range(4):
        out = [str(tmp_path / str(attempt))] if words[-1] == "--out" else []
        child = start("-c", READY, *words, *out)
        assert child.stdout.readline() == "ready\n"
        time.sleep(drawn.choice([0, 0.01, 0.3, 1.5]) * drawn.random())
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=120)
        assert "Traceback" not in told
        assert told.count("\n") <= 1
        assert child.returncode in (130, 0)
        assert child.returncode == 0 or "interrupted" in told or "SIGINT" in told


@pytest.mark.slow
def test_ctrl_c_at_forty_moments(tmp_path):
    drawn = random.Random(0)
    for attempt in range(40):
        words = [["afd", "info"], ["afd", "train", "--help"], ["afd", "train", *TINY, str(tmp_path / str(attempt))]]
        child = start("-c", READY, *words[attempt % 3])
        assert child.stdout.readline() == "ready\n"
        time.sleep(3 * drawn.random())
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=120)
        assert "Traceback" not in told
        assert child.returncode in (130, 0)


CHILD = """
import os, signal, sys
from afd import process
def work():
    {work}
process.run(lambda: work, "afd")
"""


def ended(work):
    child = start("-c", CHILD.format(work=work))
    out, told = child.communicate(timeout=60)
    return child.returncode, out, told


def test_during_the_work_it_is_a_keyboard_interrupt_and_a_second_one_ends_the_process():
    first = "os.kill(os.getpid(), signal.SIGINT)"
    status, _, told = ended(first)
    assert (status, told.count("\n")) == (130, 1)
    assert told.startswith("afd: interrupted; what was finished")
    status, out, told = ended(f"""
    try:
        {first}
    finally:
        print("in order", flush=True)
        {first}
        print("never")""")
    assert (status, out, told) == (130, "in order\n", "afd: interrupted\n")


def test_an_interrupt_in_a_destructor_is_not_shown_and_forgotten():
    status, _, told = ended("""
    class Held:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(100))
    held = Held()
    del held
    print("never")""")
    assert (status, told) == (130, "afd: interrupted\n")


def test_an_interrupt_that_the_process_was_started_to_ignore_is_ignored():
    child = start("-c", CHILD.format(work="os.kill(os.getpid(), signal.SIGINT); print('went on')"),
                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # fmt: skip
    assert child.communicate(timeout=60) == ("went on\n", "")
    assert child.returncode == 0


def test_a_pipe_that_nobody_reads_any_more_ends_the_command_quietly():
    child = start("-m", "afd", "train", "--help")
    child.stdout.close()
    told = child.stderr.read()
    assert (child.wait(), told) == (process.UNREAD, "")


def test_an_error_of_the_user_is_a_line_what_the_machine_refuses_too_and_a_bug_keeps_its_traceback(capsys):
    def raising(error):
        def work():
            raise error

        return process.carry_out(lambda: work, "afd")

    assert raising(InputError("eps is 8")) == 2
    assert raising(RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes.\nmore")) == 2
    assert raising(MemoryError()) == 2
    assert raising(OSError(28, "No space left on device", "log.jsonl")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "afd: error: eps is 8",
        "afd: error: out of memory; a smaller batch, width or model takes less ([enforce] DefaultCPUAllocator: can't "
        "allocate memory: 9 bytes.)",
        "afd: error: out of memory; a smaller batch, width or model takes less (MemoryError)",
        "afd: error: log.jsonl: No space left on device",
    ]
    for bug in (RuntimeError("shape mismatch"), KeyError("x"), FileNotFoundError(2, "No such file")):
        with pytest.raises(type(bug)):
            raising(bug)


def test_nothing_of_the_process_is_changed_for_somebody_who_calls_main(capsys):
    from afd.cli import main

    before = (signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook)
    assert main(["--version"]) == 0
    assert main(["train", "--eps", "8"]) == 2
    assert (signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook) == before


COLOUR = re.compile(rb"\x1b\[[0-9;]*(?:3[0-9]|4[0-9]|9[0-7]|10[0-7])[0-9;]*m")


def on_terminal(code, **more):
    """What a child writes to a terminal of its own."""
    kept = {name: value for name, value in ENVIRONMENT.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    inner, outer = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=outer, stdout=outer, stderr=outer, cwd=ROOT,
                             env={**kept, "TERM": "xterm-256color", **more})  # fmt: skip
    os.close(outer)
    written = b""
    while True:
        try:
            part = os.read(inner, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(inner)
    child.wait()
    return written


SHOWN = """
import sys
from afd import cli
from rich.console import Console
for words in sys.argv[1:] or ["--help", "train --help", "train --method magic", "train --spede 3", "bench x"]:
    try:
        cli.main(words.split())
    except SystemExit:
        pass
from afd.bench.results import Candidate, Case, Document, Timing
from afd.bench.base import begin, telling
from afd.bench import results
from afd.experiments.display import Terminal
from afd.training.callbacks import EpochReport, IntervalReport
from afd.evaluation.folder import ProgressBar
document = Document("kernels", "a CPU", "cpu", 1, {"torch": "2"}, None, "", 3, {}, {
    "case": Case({}, {"afd": Candidate(Timing(1, 2, 3), {"rate": 0.5})})})
results.whole(Console(), results.table(document, (results.Column("rate", "rate"),)))
with telling(Console(), "bench"):
    begin("a case")
with Terminal(Console(), 1, "digits") as bar:
    bar(IntervalReport(1, 1, 1, 2, {"task": 1.0}, {"task": 0.1}))
    bar(EpochReport(1, 2, {"task": 1.0}, 0.9, 0.5, 100.0, {"task": 0.1}))
with ProgressBar(Console()) as bar:
    bar.start(2.0)
    bar.moved(1.0, "PGD")
"""


def test_nothing_is_coloured_where_the_user_wants_no_colour():
    """Help, mistakes, a benchmark's table and line, the bars of training and evaluation."""
    plain = on_terminal(SHOWN, NO_COLOR="1")
    assert b"train" in plain
    assert b"a case" in plain
    assert COLOUR.findall(plain) == []
    assert COLOUR.search(on_terminal(SHOWN)), "and a terminal gets colours otherwise"


def test_warnings_of_ours_are_lines(capsys):
    import warnings

    def work():
        warnings.warn("odd", ModelWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4]))
        process.carry_out(lambda: work, "afd")
    assert capsys.readouterr().err == "afd: warning: odd\n"
