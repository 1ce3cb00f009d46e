"""A day goes on whatever a step meets, keeps its time, and what was done is on disk whenever it ends."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from gpu_day import __main__ as command
from gpu_day import plan, results
from gpu_day.run import environment, run

ROOT = Path(__file__).parents[2]
MISSING = "the Python package tyro is missing, which stage 6 needs: make gpu-pack where there is a network"
CRASHED = f"{sys.executable} cannot import torch and look for a GPU: imported"
DEAF = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
SAVES = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
CASES = """import json, sys, time
for i in range(1, 4):
    text = json.dumps({"cases": {f"case {j}": {"ok": True} for j in range(i)}, "finished": i == 3})
    time.sleep(0.8), open(sys.argv[1] + "/cases.json", "w").write(text)"""
BEATS = """import pathlib, signal, sys, time; signal.signal(2, signal.SIG_IGN)
while True: pathlib.Path(sys.argv[1]).write_text(str(time.time())), time.sleep(0.05)"""
DAY = """import sys, shlex
from gpu_day import __main__ as day, plan
command = shlex.join(sys.argv.pop(1).split(" ", 2))
steps = [plan.Step(1, "build", ["true"], None), *(plan.Step(2, f"step-{i}", [command], None) for i in range(300))]
day.probe, plan.steps = lambda *_: {"gpu": "", "architecture": ""}, lambda *_: steps
raise SystemExit(day.main(["--stages=1,2", "--budget=9999", *sys.argv[1:]]))"""


@pytest.fixture(autouse=True)
def listening():
    """SIGINT is heard here, as in the day's own process; what is started in the background would ignore it."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def play(folder, *steps, seconds=60.0):
    """A day of these steps: its status, and the steps as they lie on disk."""
    out, work = folder / "out", folder / "work"
    children, content = environment(folder, work, os.environ), results.opened(out, "abc") | {"machine": {"gpu": "H100"}}
    (work / "logs").mkdir(exist_ok=True)
    day = command.Day(out, {"work": work}, children, content, time.monotonic() + seconds, [])
    return day.run(steps), written(out)


def step(name, *codes, read=None, **settings):
    """A step whose commands are Python, each given the step's folder."""
    lines = [f"{sys.executable} -c {shlex.quote(code)}".replace("{", "{{").replace("}", "}}") for code in codes]
    return plan.Step(2, name, [f"{line} {{folder}}" for line in lines], read, **settings)


def written(out):
    return json.loads((out / "results.json").read_text())["steps"]


def statuses(steps):
    return {name: step["status"] for name, step in steps.items()}


def test_steps_are_written_down_and_a_failure_stops_nothing(tmp_path):
    trace = f"open({str(tmp_path / 'trace')!r}, 'a').write('x');"
    bad = step("bad", trace, f"{trace} print('why'); raise SystemExit(3)", trace)
    late = step("late", "pass", read=lambda *_: [].items())
    poor = step("poor", "pass", read=lambda *_: results.Reading({}, {}, [], "nothing came"))
    alien = step("alien", "exit(1)", read=lambda *_: results.Reading({}, {}, [], "", "no such tool here"))
    status, found = play(tmp_path, bad, step("good", "pass", note="a copy"), step("card"), late, poor, alien)
    told = ["failed", "ok", "no GPU", "failed", "failed", "not supported"]
    assert (status, list(statuses(found).values())) == (1, told)
    assert (tmp_path / "trace").read_text() == "xx", "commands run while they end well"
    assert (found["bad"]["reasons"], found["poor"]["reasons"]) == (["status 3: why"], ["nothing came"])
    assert (found["late"]["reasons"][0][:14], found["good"]["figures"]) == ("AttributeError", {"note": "a copy"})
    assert "| 2 | good | ok |" in (tmp_path / "out" / "summary.md").read_text()
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as tar:
        assert b"why" in tar.extractfile("./bad.log").read()
    with pytest.raises(command.DayError, match=r"^without its module nothing can run: status 1: no nvcc"):
        play(tmp_path / "red", step("build", "raise SystemExit('no nvcc')"), step("next", "pass"))
    assert "next" not in written(tmp_path / "red" / "out")


def test_time_boxes_hold_together(tmp_path):
    """What a step does not use falls to the others, a cap is a cap, and a deaf child is killed."""
    steps = [step("quick", "pass"), step("capped", DEAF, cap=1.5, share=99), step("saves", SAVES, cap=99)]
    begin = time.monotonic()
    status, found = play(tmp_path, *steps, step("deaf", DEAF, share=40), step("none", "pass", share=0.1), seconds=6)
    assert (status, 4.5 < time.monotonic() - begin < 8) == (0, True)
    assert statuses(found) == {"quick": "ok"} | dict.fromkeys(("capped", "saves", "deaf", "none"), "timed out")
    assert (found["capped"]["box"], 2 < found["saves"]["box"] < 3.5) == (1.5, True)
    assert (tmp_path / "work" / "logs" / "saves.log").read_text().endswith("saved\n")


def test_cases_are_on_disk_while_a_step_runs_and_its_document_goes_out(tmp_path):
    """The step is called interrupted until it has ended."""
    seen = []

    def look(*places):
        seen.append(written(tmp_path / "out").get("cases", {"cases": {}}))
        return results.documents(*places)

    _, found = play(tmp_path, step("first", "pass"), step("cases", CASES, read=look))
    one = next(one for one in seen if one["cases"])
    assert (one["status"], one["device"], len(one["cases"]) in (1, 2)) == ("interrupted", "H100", True)
    assert (found["cases"]["status"], found["cases"]["figures"]) == ("ok", {"cases": 3})
    assert len(json.loads((tmp_path / "out" / "cases.json").read_text())["cases"]) == 3


def test_a_child_leaves_its_status_and_its_output_and_no_children(tmp_path):
    beat, stopped = tmp_path / "beat", []

    def child(*words, heard=lambda: None):
        return run(words, tmp_path / "log", os.environ, tmp_path, time.monotonic() + 30, heard, stopped)

    assert [child("echo", "said"), child("sh", "-c", "exit 3"), child("/no/such/program")] == [0, 3, 127]
    assert child("sh", "-c", "kill -9 $$") == -9, "not for want of time, but for want of memory, say"
    assert re.search("said\n\\$ .*cannot be started", (tmp_path / "log").read_text(), re.DOTALL), "one for a step"
    words = ["sh", "-c", '"$@" & sleep 60', "sh", sys.executable, "-c", BEATS, str(beat)]
    assert child(*words, heard=lambda: beat.exists() and stopped.append(15)) is None
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last, "a deaf grandchild ends, too"


def test_children_get_this_checkout_a_home_in_the_work_folder_and_nothing_of_make(tmp_path):
    given = {"PATH": "/bin", "HOME": "/absent", "MAKEFLAGS": "-j", "PYTHONPATH": "/peers", "CUDA_HOME": "/kit"}
    found = environment(tmp_path, tmp_path / "work", given)
    assert ("MAKEFLAGS" in found, found["HOME"]) == (False, str(tmp_path / "work" / "home"))
    assert found["PYTHONPATH"] == f"{tmp_path}:{tmp_path}/benchmarks:{tmp_path}/work/site:/peers"
    assert {"/bin", "/kit/bin", "/kit/compute-sanitizer"} <= set(found["PATH"].split(":"))


def begun(folder, line):
    """A day of 300 steps with one command, as a process of its own, that has just built the module."""
    words = [f"--{option}={folder / option}" for option in ("out", "work")] + [f"--wheels={folder.parent}"]
    given, words = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}, [sys.executable, "-c", DAY, line, *words]
    day = subprocess.Popen(words, env=given, stdout=subprocess.PIPE, text=True)
    assert "there is no stamp.json" in day.stdout.readline()
    assert day.stdout.readline().startswith("1 build: ok") or day.kill()
    return day


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_day_that_is_stopped_ends_its_child_and_writes(number, tmp_path):
    day = begun(tmp_path, f"{sys.executable} -c {SAVES}")
    time.sleep(2)
    day.send_signal(number)
    assert (day.wait(15), "step-0: interrupted" in day.stdout.read()) == (128 + number, True)
    assert statuses(written(tmp_path / "out")) == {"build": "ok", "step-0": "interrupted"}
    assert (tmp_path / "work" / "logs" / "step-0.log").read_text().endswith("saved\n")


def test_kills_at_random_moments_leave_valid_json_of_all_that_was_finished(tmp_path):
    """SIGKILL, as where a time limit from outside ends the day: no handler runs."""
    for i in range(10):
        day = begun(tmp_path / f"{i}", "true")
        time.sleep(random.Random(i).uniform(0, 0.5))
        day.kill()
        said = 1 + len(re.findall("^2 step-.*: ok", day.communicate()[0], re.MULTILINE))
        steps = list(statuses(written(tmp_path / f"{i}" / "out")).values())
        assert said <= steps.count("ok") <= said + 1 < 301
        assert len(steps) - steps.count("ok") <= 1


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path, capsys):
    for option, texts, said in (
        ("stages", ["9", "", "1,,2", "1,1", "one", "1:", "1.5", "²"], "STAGES is '{}', where "),
        ("stages", ["5:vgg"], "STAGES asks for {}, but the steps of stage 5 are methods-resnet18 with this DATA"),
        ("budget", ["soon", "", "nan", "inf", "-5", "29.9", "²"], "BUDGET is '{}'; it must be a number of seconds"),
        *((name, ["/nowhere"], f"{name.upper()} is {{}}, which is no folder") for name in ("data", "wheels")),
        ("out", [str(ROOT / "tests")], "OUT is {}, which is not empty"),
        ("out", ["/proc/day"], "{}: "),
    ):
        for text in texts:
            assert command.main([f"--out={tmp_path}/out", f"--work={tmp_path}/work", f"--{option}={text}"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"make gpu: {said.format(text)}")


def test_a_full_disk_ends_the_day_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "probe", lambda *_: {"gpu": "", "architecture": ""})
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=OSError(28, "No space left on device")))
    assert command.main([f"--out={tmp_path}/out", f"--work={tmp_path}/work"]) == 2
    assert capsys.readouterr().err == f"make gpu: {tmp_path}/out or {tmp_path}/work: No space left on device\n"


@pytest.mark.parametrize(("stages", "said"), [("3,6", MISSING), ("3", CRASHED)])
def test_what_is_missing_is_named_within_five_seconds_and_before_torch(tmp_path, stages, said):
    for name in plan.MODULES[6] - {"tyro"}:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    given = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'benchmarks'}", "PATH": os.environ["PATH"]}
    options, begin = [f"--{name}={tmp_path}/{name}" for name in ("out", "work")], time.monotonic()
    words = [sys.executable, "-S", "-m", "gpu_day", f"--wheels={tmp_path}", f"--stages={stages}", *options]
    ran = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.count("\n"), time.monotonic() - begin < 5) == (2, 1, True)
    assert ran.stderr.startswith(f"make gpu: {said}")


def test_make_passes_every_variable_on():
    words = shlex.split("STAGES=1,4:resnet50 BUDGET=580 DATA='a d' WHEELS=w COMMIT=abc PYTHON=py OUT=/o GPU_PYTHON=py3")
    options = '--stages "1,4:resnet50" --budget "580" --out "/o" --commit "abc" --data "a d" --wheels "w"'
    given = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    pack = 'py benchmarks/gpu_pack.py build/wheels "py3" "a d" "abc"'
    for goal, end in {"gpu": f"py -m gpu_day {options}", "gpu-pack": pack}.items():
        make = ["make", "--dry-run", "--no-print-directory", goal, *words]
        ran = subprocess.run(make, cwd=ROOT, env=given, capture_output=True, text=True, check=True)
        assert " ".join(ran.stdout.replace("\\\n", " ").split()).endswith(end)
