"""The benchmarks' command lines, and what is told of them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from gpu_day import benches
from gpu_day.child import Command, Exit
from gpu_day.readers import write_json
from gpu_day.steps import Box

ROOT = Path(__file__).parents[2]
TIMES = {"p20": 0.001, "p50": 0.002, "p80": 0.003}


@pytest.fixture
def box(make_setting, tmp_path):
    return Box(make_setting(), tmp_path, 60)


def ended(name, status=0):
    return [Exit(Command(name, ()), Path(name), status, 1.0)]


def test_medians_are_told_case_by_case(box):
    candidates = {"floor": {"seconds": TIMES, "figures": {}}, "afd": {"seconds": TIMES, "figures": {}}}
    write_json(box.folder / "kernels.json", {"cases": {"pgd_step": {"candidates": candidates}}})
    assert benches.read(box, ended("kernels")).figures == {"pgd_step": "floor 2 ms, afd 2 ms"}


def test_a_benchmark_that_measured_nothing_has_failed(box):
    assert "no times" in benches.read(box, ended("kernels")).problems[0]
    write_json(box.folder / "kernels.json", {"cases": {}})
    assert "no times" in benches.read(box, ended("kernels")).problems[0]
    assert not benches.read(box, ended("kernels", status=1)).problems, "its exit status says it"


@pytest.mark.parametrize("gpu", [None, "NVIDIA H100"])
def test_files_and_devices_go_where_they_belong(make_setting, tmp_path, gpu):
    box = Box(make_setting(gpu=gpu), tmp_path, 60)
    for number in (3, 4, 5):
        for step in benches.steps(number, box.setting):
            (command,) = step.commands(box)
            words = command.words
            assert words[1:4] == ("-m", "afd", "bench")
            assert words[words.index("--device") + 1] == ("cuda" if gpu else "cpu")
            assert words[words.index("--out") + 1] == str(tmp_path / f"{step.name}.json")


def test_the_sizes_asked_for_are_measured_on_a_gpu():
    lines = [bench.words for bench in benches.ON_GPU[4]]
    for batch in (128, 256, 1024):
        assert any(f"--model resnet18 --batch {batch} " in line for line in lines)
    assert any("torchvision.models:resnet50" in line and "--shape 3 224 224" in line for line in lines)
    assert all("eager-tf32,eager-bf16,compile" in line for line in lines)


def test_afd_understands_every_command_line(tmp_path):
    """One child reads them all, stopping before anything is measured."""
    lines = [bench.words for kind in (benches.ON_GPU, benches.ON_CPU) for some in kind.values() for bench in some]
    code = f"""
    from afd import cli
    read = []
    cli.run_benchmark = lambda work, console: read.append(work)
    for line in {lines!r}:
        assert cli.main(["bench", *line.split(), "--device", "cuda", "--out", "x.json"]) == 0, line
    print(len(read), *sorted({{type(work).__name__ for work in read}}))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == [str(len(lines)), "AttackBench", "DiscriminatorBench", "KernelBench", "RoundBench"], (
        ran.stdout + ran.stderr
    )
