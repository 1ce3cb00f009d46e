"""`make gpu` as it is called."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_day import __main__ as command
from gpu_day import build, checks, pytests
from gpu_day.steps import Box

ROOT = Path(__file__).parents[2]


def make(*words, **variables):
    """What make would run, without running it."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "OUT", "DATA", "WHEELS"}
    }
    printed = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *words], cwd=ROOT, env={**inherited, **variables},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return shlex.split(printed.replace("\\\n", " "))


def options(words):
    """What the program makes of make's words."""
    return command.parser().parse_args(words[words.index("gpu_day") + 1 :])


def test_make_passes_every_variable_on():
    words = make(
        "gpu", "STAGES=1,4:resnet50", "BUDGET=580", "DATA=a folder", "WHEELS=build/wheels", "COMMIT=abc", "PYTHON=py"
    )
    found = options(words)
    assert words[words.index("-m") - 1] == "py"
    assert (found.stages, found.budget, found.commit) == ("1,4:resnet50", "580", "abc")
    assert (found.data, found.wheels, found.out) == (Path("a folder"), Path("build/wheels"), Path("build/gpu"))


def test_the_results_folder_may_come_from_the_environment():
    found = options(make("gpu", OUT="/elsewhere"))
    assert found.out == Path("/elsewhere")
    assert (found.data, found.wheels) == (None, None)


def test_without_git_make_goes_on():
    assert (
        options(make("gpu", PATH=str(Path(sys.executable).parent) + ":/usr/bin:/bin", GIT_DIR="/nowhere")).commit == ""
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "9"], "make gpu: STAGES is '9'"),
        (["--budget", "soon"], "make gpu: BUDGET is 'soon'"),
        (["--data", "/nowhere"], "make gpu: DATA is /nowhere, which is no folder"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(words, said, tmp_path, capsys):
    assert command.main([*words, "--work", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_the_six_stages_are_there():
    assert list(command.STAGES) == [1, 2, 3, 4, 5, 6]


# --- pytest as it is called -------------------------------------------------------------------------------------------


def test_pytest_needs_no_plugin(make_setting, monkeypatch, tmp_path):
    """pyproject.toml's own options are not used: where pytest-benchmark is absent, pytest would refuse to start."""
    setting = make_setting()
    monkeypatch.setattr(type(setting), "has", lambda *_: False)
    words = pytests.words(setting, "gpu", str(tmp_path / "test_x.py"), tmp_path / "x.xml")
    (tmp_path / "test_x.py").write_text("def test_it(): pass\ndef test_other(): assert False\n")
    plain = [*words[:-1], "-p", "no:benchmark", "-m", "", words[-1]]
    ran = subprocess.run([sys.executable, *plain], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 passed" in ran.stdout
    assert (tmp_path / "x.xml").is_file()
    assert not any("benchmark" in word or "timeout" in word for word in words)


def test_every_file_with_gpu_tests_is_chosen(make_setting):
    """Kept honest by pytest's own collection."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests/data", "tests/ops"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    collected = {line.partition("::")[0] for line in listed.splitlines() if "::" in line}
    assert len(collected) > 10
    setting = type(make_setting())(**{**vars(make_setting()), "root": ROOT})
    assert collected <= set(pytests.gpu_files(setting))


def test_stage_2_says_what_the_compiler_said(make_setting, monkeypatch, tmp_path):
    setting = make_setting(gpu="NVIDIA H100")
    (step,) = [step for step in checks.steps(setting) if step.name == "registers"]
    found = step.read(Box(setting, tmp_path, 1), [])
    assert "ptxas told nothing" in found.problems[0]
    log = build.ptxas_log(setting)
    log.parent.mkdir(parents=True)
    log.write_text(
        "ptxas info    : Compiling entry function '_Z1k' for 'sm_90'\nptxas info    : Function properties for _Z1k\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\nptxas info    : Used 40 registers\n"
    )
    figures = step.read(Box(setting, tmp_path, 1), []).figures
    assert figures["verdict"] == "spills"
    assert figures["spilling kernels"] == ["_Z1k"]
