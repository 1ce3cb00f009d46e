"""A day goes on whatever a step meets, keeps its time, and what was done is on disk whenever it ends."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from gpu_day import __main__ as command
from gpu_day import plan
from gpu_day.results import Reading, documents

ROOT = Path(__file__).parents[2]
DEAF = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
SAVES = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
CASES = """import json, sys, time
for i in range(1, 4):
    time.sleep(0.8)
    text = json.dumps({"cases": {f"case {j}": {"ok": True} for j in range(i)}, "finished": i == 3})
    open(sys.argv[1] + "/cases.json", "w").write(text)
"""
DAY = """import sys, shlex
from gpu_day import __main__ as day, plan
command = shlex.join(sys.argv.pop(1).split(" ", 2))
steps = [plan.Step(1, "build", ["true"], None), *(plan.Step(2, f"step-{i}", [command], None) for i in range(300))]
day.probe, plan.steps = lambda *_: {"gpu": "", "architecture": ""}, lambda *_: steps
raise SystemExit(day.main(["--stages=1,2", "--budget=9999", *sys.argv[1:]]))
"""


def statuses(steps):
    return {name: step["status"] for name, step in steps.items()}


def test_steps_are_written_down_and_a_failure_stops_nothing(make_day, make_step, written, tmp_path):
    trace = f"open({str(tmp_path / 'trace')!r}, 'a').write('x');"
    bad = make_step("bad", trace, f"{trace} print('why'); raise SystemExit(3)", trace)
    late = make_step("late", "pass", read=lambda *_: [].items())
    poor = make_step("poor", "pass", read=lambda *_: Reading({}, {}, [], "nothing came"))
    alien = make_step("alien", "raise SystemExit(1)", read=lambda *_: Reading({}, {}, [], "", "no such tool here"))
    day = make_day()
    assert day.run([bad, make_step("good", "pass", note="a copy"), make_step("card"), late, poor, alien]) == 1
    found, told = written(), ["failed", "ok", "no GPU", "failed", "failed", "not supported"]
    assert statuses(found) == dict(zip(("bad", "good", "card", "late", "poor", "alien"), told, strict=True))
    assert (tmp_path / "trace").read_text() == "xx", "commands run while they end well"
    assert (found["bad"]["reasons"], found["poor"]["reasons"]) == (["status 3: why"], ["nothing came"])
    assert (found["late"]["reasons"][0][:14], found["good"]["figures"]) == ("AttributeError", {"note": "a copy"})
    assert "| 2 | good | ok |" in (tmp_path / "out" / "summary.md").read_text()
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as tar:
        assert b"why" in tar.extractfile("./bad.log").read()
    assert make_day().run([make_step("bad", "pass")]) == 0, "the exit status is this call's"
    assert statuses(written()) == {**statuses(found), "bad": "ok"}
    with pytest.raises(command.DayError, match=r"^without its module nothing can run: status 1: no nvcc"):
        day.run([make_step("build", "raise SystemExit('no nvcc')"), make_step("next", "pass")])
    assert "next" not in written()


def test_time_boxes_hold_together(make_day, make_step, written, tmp_path):
    """What a step does not use falls to the others, a cap is a cap, and a deaf child is killed."""
    steps = [make_step("quick", "pass"), make_step("capped", DEAF, cap=1.5, share=99), make_step("last", SAVES, cap=99)]
    begin = time.monotonic()
    assert make_day(seconds=6).run([*steps, make_step("deaf", DEAF, share=40), make_step("none", "", share=0.1)]) == 0
    assert 4.5 < time.monotonic() - begin < 8
    found = written()
    assert statuses(found) == {"quick": "ok"} | dict.fromkeys(("capped", "last", "deaf", "none"), "timed out")
    assert found["capped"]["box"] == 1.5
    assert 2.5 < found["last"]["box"] < 3.5
    assert (tmp_path / "work" / "logs" / "last.log").read_text().endswith("saved\n")


def test_cases_are_on_disk_while_a_step_runs_and_its_document_goes_out(make_day, make_step, written, tmp_path):
    """The step is called interrupted until it has ended."""
    seen = []
    threading.Timer(2.2, lambda: seen.append(written()["cases"])).start()
    make_day().run([make_step("cases", CASES, read=documents)])
    assert (seen[0]["status"], seen[0]["device"], len(seen[0]["cases"]) in (1, 2)) == ("interrupted", "H100", True)
    assert (written()["cases"]["status"], written()["cases"]["figures"]) == ("ok", {"cases": 3})
    assert len(json.loads((tmp_path / "out" / "cases.json").read_text())["cases"]) == 3


@pytest.fixture
def begun(tmp_path):
    """A day of 300 steps with one command, as a process of its own, that has just built the module."""

    def begun(line, name=""):
        words = [f"--{option}={tmp_path / name / option}" for option in ("out", "work")] + [f"--wheels={tmp_path}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
        words = [sys.executable, "-c", DAY, line, *words]
        day = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        assert "there is no stamp.json" in day.stdout.readline()
        assert day.stdout.readline().startswith("1 build: ok") or day.kill()
        return day

    return begun


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_day_that_is_stopped_ends_its_child_and_writes(begun, written, number, tmp_path):
    day = begun(f"{sys.executable} -c {SAVES}")
    time.sleep(1)
    day.send_signal(number)
    assert "interrupted" in day.communicate(timeout=15)[0]
    assert (day.returncode, statuses(written())) == (128 + number, {"build": "ok", "step-0": "interrupted"})
    assert (tmp_path / "work" / "logs" / "step-0.log").read_text().endswith("saved\n")


def test_kills_at_random_moments_leave_valid_json_of_all_that_was_finished(begun, tmp_path):
    """SIGKILL, as where a time limit from outside ends the day: no handler runs."""
    chance = random.Random(0)
    for i in range(10):
        day = begun("true", f"day{i}")
        time.sleep(chance.uniform(0, 0.5))
        day.kill()
        said = 1 + len(re.findall("^2 step-.*: ok", day.communicate()[0], re.MULTILINE))
        steps = json.loads((tmp_path / f"day{i}" / "out" / "results.json").read_text())["steps"]
        done = [name for name, state in statuses(steps).items() if state == "ok"]
        assert said <= len(done) <= said + 1 < 301
        assert len(steps) - len(done) <= 1


@pytest.fixture
def refused(tmp_path, capsys):
    """The lines that a call ends with, and its status 2."""

    def refused(*words):
        folders = [f"--{option}={tmp_path / option}" for option in ("out", "work")]
        assert command.main([*folders, *words]) == 2
        return capsys.readouterr().err.splitlines()

    return refused


@pytest.mark.parametrize(
    ("option", "texts", "said"),
    [
        ("stages", ["9", "", "1,,2", "1,1", "one", "1:", "1.5", "²"], "STAGES is '{}', where "),
        ("stages", ["5:vgg"], "STAGES asks for {}, but the steps of stage 5 are round-resnet18, round-small"),
        ("budget", ["soon", "", "nan", "inf", "-5", "29.9", "²"], "BUDGET is '{}'; it must be a number of seconds"),
        ("data", ["/nowhere"], "DATA is {}, which is no folder"),
        ("wheels", ["/nowhere"], "WHEELS is {}, which is no folder"),
        ("out", [str(ROOT / "tests")], "OUT is {}, which holds other files"),
        ("out", ["/proc/day"], "{} cannot be written"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(refused, option, texts, said):
    for text in texts:
        (line,) = refused(f"--{option}={text}")
        assert line.startswith(f"make gpu: {said.format(text)}")


def test_a_full_disk_ends_the_day_in_one_line(refused, monkeypatch, tmp_path):
    def full(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "probe", lambda *_: {"architecture": ""})
    monkeypatch.setattr(Path, "write_text", full)
    assert refused() == [f"make gpu: {tmp_path / 'out'} cannot be written: No space left on device"]


def test_what_is_missing_is_named_within_five_seconds_and_before_torch(tmp_path):
    for name in plan.MODULES[6] - {"tyro"}:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    given = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'benchmarks'}", "PATH": os.environ["PATH"]}
    for stages, said in (
        ("3,6", "the Python package tyro is missing, which stage 6 needs: make gpu-pack where there is a network"),
        ("3", f"{sys.executable} cannot import torch and look for a GPU: imported"),
    ):
        words, begin = [f"--stages={stages}", f"--out={tmp_path / 'out'}", f"--work={tmp_path}"], time.monotonic()
        words = [sys.executable, "-S", "-m", "gpu_day", *words]  # without this environment's own packages
        ran = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
        assert (ran.returncode, len(ran.stderr.splitlines()), time.monotonic() - begin < 5) == (2, 1, True)
        assert ran.stderr.startswith(f"make gpu: {said}")


def test_make_passes_every_variable_on():
    words = ["STAGES=1,4:resnet50", "BUDGET=580", "DATA=a folder", "WHEELS=w", "COMMIT=abc", "PYTHON=py", "OUT=/o"]
    options = '--stages "1,4:resnet50" --budget "580" --out "/o" --commit "abc" --data "a folder" --wheels "w"'
    inherited = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    packing = 'py benchmarks/gpu_pack.py build/wheels "py3" "a folder" "abc"'
    for goal, end in {"gpu": f"py -m gpu_day {options}", "gpu-pack": packing}.items():
        make = ["make", "--dry-run", "--no-print-directory", goal, "GPU_PYTHON=py3", *words]
        ran = subprocess.run(make, cwd=ROOT, env=inherited, capture_output=True, text=True, check=True)
        assert " ".join(ran.stdout.replace("\\\n", " ").split()).endswith(end)
