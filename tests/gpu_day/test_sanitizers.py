"""A sanitizer's silence counts only where it has seen the planted error."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from gpu_day import sanitizers
from gpu_day.child import Command, Exit
from gpu_day.steps import Box

ROOT = Path(__file__).parents[2]
CLEAN, ERRORS = "========= ERROR SUMMARY: 0 errors\n", "========= ERROR SUMMARY: 2 errors\n"


@pytest.fixture
def verdict(make_setting, tmp_path):
    def verdict(planted, *files, statuses=(), cut=()):
        exits = []
        for i, text in enumerate((planted, *files)):
            name = "planted" if i == 0 else f"ops-{i}"
            (tmp_path / f"{name}.log").write_text(text)
            status = statuses[i] if statuses else 0
            exits.append(Exit(Command(name, ()), tmp_path / f"{name}.log", status, 1.0, timed_out=name in cut))
        return sanitizers.read_sanitized("memcheck", Box(make_setting(gpu="H100"), tmp_path, 9), exits)

    return verdict


def test_clean_kernels_and_a_seen_planted_error(verdict):
    found = verdict(ERRORS, CLEAN, CLEAN)
    assert not found.problems
    assert found.figures == {"planted error found": True, "files watched": 2, "errors": 0}


def test_errors_in_kernels(verdict):
    assert verdict(ERRORS, CLEAN, ERRORS).problems == ["2 errors in ops-2"]


@pytest.mark.parametrize("planted", [CLEAN, "nvcc: not found\n"])
def test_silence_about_the_planted_error_is_a_failure(verdict, planted):
    assert "did not see the planted error" in verdict(planted, CLEAN).problems[0]


def test_a_file_without_a_verdict(verdict):
    assert verdict(ERRORS, "Segmentation fault\n").problems == ["ops-1 ended without a verdict"]
    assert not verdict(ERRORS, "no tests ran\n", statuses=(0, 5)).problems
    cut = verdict(ERRORS, "unfinished\n", cut=("ops-1",))
    assert not cut.problems
    assert cut.figures["not finished"] == ["ops-1"]


def test_a_machine_that_the_tool_does_not_support_is_no_failure(verdict):
    found = verdict("========= Error: Device not supported\n", "========= Error: Device not supported\n")
    assert found.missing.startswith("compute-sanitizer does not support this machine")


def test_only_kernels_are_watched_with_few_examples(make_setting, tmp_path):
    setting = make_setting(gpu="NVIDIA H100")
    setting = type(setting)(**{**vars(setting), "root": ROOT})
    planted, *files = sanitizers.watched("memcheck", Box(setting, tmp_path, 60))
    assert "planted.cu" in planted.words[-1]
    assert {"ops-pgd_step", "ops-spectral_norm"} <= {command.name for command in files}
    assert not [command.name for command in files if command.name.startswith(("training", "attacks"))]
    assert all(command.extra["AFD_HYPOTHESIS"] == "brief" for command in files)
    assert all("kns=afd" in command.words for command in files)


def test_kernel_tests_that_capture_say_so_in_their_names():
    """They are left out by name: memcheck runs without torch's pool, and no graph can be captured without it."""
    functions = [
        node
        for path in (ROOT / "tests" / "ops").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    capturing = [node.name for node in functions if "CUDAGraph" in ast.unparse(node)]
    assert len(capturing) > 5
    assert [name for name in capturing if "graph" not in name] == []
