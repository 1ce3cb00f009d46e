"""A day goes on whatever a step meets, and what was done is on disk whenever it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from gpu_day import report
from gpu_day.choice import ChoiceError
from gpu_day.day import Day
from gpu_day.steps import AFD, Findings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(make_setting, built, kit):
    """Runs stages; returns the exit status, and the steps' records by name."""

    def run(*stages, words=None, budget=60.0, **settings):
        said = []
        setting = make_setting(**settings)
        status = Day(setting, stages, words or {}, budget, said.append).run()
        steps = {step["name"]: step for stage in report.stages(setting) for step in stage["steps"]}
        return status, steps, setting, "\n".join(said)

    return run


def test_steps_run_in_order_and_are_written_down(run, kit, tmp_path):
    trace = tmp_path / "trace"
    note = f"import pathlib, sys; file = pathlib.Path({str(trace)!r}).open('a'); file.write('{{}} ')"
    first = kit.stage(1, kit.one("a", note.format("a")), kit.one("b", note.format("b")))
    status, steps, setting, said = run(first, kit.stage(2, kit.one("c", note.format("c"))))
    assert status == 0
    assert trace.read_text() == "a b c "
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys("abc", "ok")
    assert "a: ok" in said
    summary = json.loads((setting.out / "summary.json").read_text())
    assert summary["format"] == "afd-gpu-day"
    assert [stage["status"] for stage in summary["stages"]] == ["ok", "ok"]
    assert "| 2 the stage 2 | ok |" in (setting.out / "summary.md").read_text()


def test_a_failing_step_fails_the_day_and_the_day_goes_on(run, kit):
    status, steps, setting, said = run(
        kit.stage(1, kit.one("bad", "print('why it went wrong'); raise SystemExit(3)"), kit.one("good")),
        kit.stage(2, kit.one("next")),
    )
    assert status == 1
    assert [steps[name]["status"] for name in ("bad", "good", "next")] == ["failed", "ok", "ok"]
    assert steps["bad"]["reasons"] == ["bad ended with 3; see bad.log"]
    assert "why it went wrong" in said
    assert [stage["status"] for stage in report.stages(setting)] == ["failed", "ok"]


def test_findings_can_fail_a_step_that_ended_well(run, kit):
    wrong = kit.one("wrong", read=lambda *_: Findings({"errors": 2}, problems=["2 errors"]))
    status, steps, *_ = run(kit.stage(1, wrong))
    assert (status, steps["wrong"]["status"], steps["wrong"]["figures"]) == (1, "failed", {"errors": 2})


@pytest.mark.parametrize("where", ["commands", "read"])
def test_an_error_in_a_steps_own_code_is_written_down(run, kit, where):
    def broken(*_):
        raise KeyError("seconds")

    step = kit.one("broken", read=broken)
    step = step if where == "read" else type(step)("broken", broken)
    status, steps, setting, _ = run(kit.stage(1, step, kit.one("next")))
    assert status == 1
    assert steps["broken"]["reasons"] == ["KeyError: 'seconds'; see error.txt"]
    assert "raise KeyError" in (setting.results / "1-stage1" / "broken" / "error.txt").read_text()
    assert steps["next"]["status"] == "ok"


def test_a_step_over_its_time_is_timed_out_and_the_next_runs(run, kit):
    begin = time.monotonic()
    hangs = kit.one("long", "import time; time.sleep(60)", share=1)
    status, steps, *_ = run(kit.stage(1, hangs, kit.one("next", share=15)), budget=24)
    assert time.monotonic() - begin < 24
    assert status == 0
    assert [steps[name]["status"] for name in ("long", "next")] == ["timed out", "ok"]


def test_nothing_begins_without_time(run, kit):
    _, steps, *_ = run(kit.stage(1, kit.one("late")), budget=0.5)
    assert steps["late"]["reasons"] == ["no time was left"]
    assert steps["late"]["status"] == "timed out"


def test_what_is_missing_is_named_with_how_to_add_it(run, kit):
    status, steps, *_ = run(
        kit.stage(
            2,
            kit.one("package", modules=("json", "no_such_package")),
            kit.one("tool", tools=("sh", "no-such-tool")),
            kit.one("card", gpu=True, modules=("no_such_package",)),
            kit.one("found", read=lambda *_: Findings(missing="no support here")),
            kit.one("next"),
        )
    )
    assert status == 0
    assert steps["package"]["status"] == "missing"
    assert steps["package"]["reasons"][0].startswith("needs the Python package no_such_package: `make wheels`")
    assert steps["tool"]["status"] == "missing"
    assert steps["tool"]["reasons"][0].startswith("needs no-such-tool, which is neither on PATH")
    assert steps["card"]["status"] == "no GPU"
    assert (steps["found"]["status"], steps["found"]["reasons"]) == ("missing", ["no support here"])
    assert steps["next"]["status"] == "ok"


def test_a_gpu_step_runs_where_there_is_one(run, kit):
    assert run(kit.stage(2, kit.one("card", gpu=True)), gpu="NVIDIA H100")[1]["card"]["status"] == "ok"


def test_without_the_build_only_stage_1_runs(make_setting, kit):
    setting = make_setting()
    setting = type(setting)(**{**vars(setting), "root": setting.root / "never-built"})
    setting.root.mkdir()
    Day(setting, [kit.stage(1, kit.one("first")), kit.stage(2, kit.one("second"))], {}, 30, lambda _: None).run()
    steps = {step["name"]: step for stage in report.stages(setting) for step in stage["steps"]}
    assert steps["first"]["status"] == "ok"
    assert (steps["second"]["status"], steps["second"]["reasons"]) == ("missing", ["needs the build of stage 1"])


def test_a_word_chooses_steps_and_keeps_what_other_calls_found(run, kit):
    stages = [kit.stage(4, kit.one("resnet18", "raise SystemExit(1)"), kit.one("resnet50"))]
    assert run(*stages)[0] == 1
    status, steps, *_ = run(*stages, words={4: "resnet50"})
    assert status == 0, "the exit status is this call's"
    assert [steps[name]["status"] for name in ("resnet18", "resnet50")] == ["failed", "ok"]
    with pytest.raises(ChoiceError, match="asks for 4:vgg, but the steps of that stage are resnet18, resnet50"):
        run(*stages, words={4: "vgg"})


def test_a_whole_stage_forgets_what_an_earlier_call_left(run, kit):
    run(kit.stage(4, kit.one("old")))
    _, steps, setting, _ = run(kit.stage(4, kit.one("new")))
    assert set(steps) == {"new"}
    assert not (setting.results / "4-stage4" / "old").exists()


def test_a_day_that_is_killed_leaves_what_it_did(kit, tmp_path):
    """SIGKILL, as where a time limit from outside ends it: no handler runs."""
    ready = tmp_path / "ready"
    script = f"""
    import os, sys
    from pathlib import Path
    from gpu_day import build
    from gpu_day.child import Command
    from gpu_day.day import Day
    from gpu_day.setting import Machine, Setting, environment
    from gpu_day.steps import Stage, Step
    build.up_to_date = lambda setting: True
    root = Path({str(tmp_path)!r})
    given = environment(root, root / "work", None, os.environ)
    setting = Setting(root, root / "work", root / "out", Machine("2.11.0"), given)
    done = Step("done", lambda box: [Command("done", ("echo", "finished"))])
    hangs = Step("hangs", lambda box: [Command("hangs", ("sh", "-c", "touch {ready}; exec sleep 5"))])
    stages = [Stage(1, "first", "", 1, lambda _: [done]), Stage(2, "second", "", 1, lambda _: [hangs])]
    Day(setting, stages, {{}}, 60).run()
    """
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    kit.wait_for(ready)
    process.send_signal(signal.SIGKILL)
    process.wait()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["ok", "unfinished"]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as tar:
        assert b"finished" in tar.extractfile("results/1-first/done/done.log").read()
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "results.tar.gz",
        "summary.json",
        "summary.md",
    ]


def test_a_day_that_is_stopped_ends_its_child_and_writes(make_setting, built, kit, tmp_path):
    ready, setting = tmp_path / "ready", make_setting()
    code = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    day = Day(setting, [kit.stage(1, kit.one("long", code), kit.one("next"))], {}, 60, lambda _: None)
    threading.Thread(target=lambda: (kit.wait_for(ready), day.stopped.set())).start()
    begin = time.monotonic()
    day.run()
    assert time.monotonic() - begin < 30
    (stage,) = report.stages(setting)
    assert [(step["name"], step["status"]) for step in stage["steps"]] == [("long", "unfinished")]


def test_the_archive_leaves_weights_and_large_files_behind(make_setting):
    setting = make_setting()
    folder = setting.results / "6-training" / "mnist"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("{}\n")
    (folder / "best.pt").write_bytes(b"weights")
    (folder / "large.log").write_bytes(bytes(report.LARGEST + 1))
    report.archive(setting.results, setting.work / "results.tar.gz")
    with tarfile.open(setting.work / "results.tar.gz") as tar:
        assert tar.getnames() == ["results/6-training/mnist/log.jsonl"]


def test_what_afd_imports_is_what_its_steps_ask_for():
    """A package that `import afd` needs and nobody asked for would fail every step instead of being named."""
    code = "import sys; import afd.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True
    )
    others = {"numpy", "matplotlib", "pooch", "rich", "sklearn", "tensorboard", "tyro", "docstring_parser", "foolbox"}
    assert set(AFD) == others & set(ran.stdout.split())
