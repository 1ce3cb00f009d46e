"""Stage 2: every test on this machine, the sanitizers over the kernels, and what ptxas said about them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gpu_day import build, readers
from gpu_day.child import Command, Exit
from gpu_day.pytests import files, gpu_files, in_files, read_tests, slow_files
from gpu_day.sanitizers import sanitized
from gpu_day.setting import Setting
from gpu_day.steps import TESTS, Box, Findings, Stage, Step

FEW = ("tests/ops/test_pgd_step.py", "tests/ops/test_apgd_step.py", "tests/test_structure.py")  # for a small CPU


def stage() -> Stage:
    """GPU tests first, then what watches the kernels, then everything else."""
    return Stage(2, "checks", "tests, sanitizers, registers and spills", share=6, steps=steps)


def steps(setting: Setting) -> Sequence[Step]:
    """All of it; without a GPU, a few tests and what can be said without one."""
    tests = partial(Step, modules=TESTS, read=read_tests)
    threads, small = max(1, setting.machine.cores // 2), not setting.machine.gpu
    return [
        tests("tests-gpu", partial(in_files, "gpu", gpu_files(setting)), share=4, gpu=True, workers=min(4, threads)),
        Step("registers", registers, share=0.1, gpu=True, read=read_registers),
        sanitized("memcheck", share=3),
        sanitized("racecheck", share=3),
        tests("tests-cpu", partial(in_files, "not slow and not gpu", FEW if small else files(setting)), share=3,
              workers=threads),
        *([] if small else [
            tests("tests-slow", partial(in_files, "slow and not gpu", slow_files(setting)), share=2, workers=threads),
        ]),
    ]  # fmt: skip


def registers(box: Box) -> list[Command]:
    """Nothing to run: ptxas has spoken while it compiled."""
    del box
    return []


def read_registers(box: Box, exits: Sequence[Exit]) -> Findings:
    """Registers, stack and spills of every kernel."""
    del exits
    log = build.ptxas_log(box.setting)
    kernels = readers.ptxas(log.read_text(errors="replace")) if log.is_file() else []
    readers.write_json(box.folder / "registers.json", kernels)
    if not kernels:
        return Findings(problems=[f"ptxas told nothing in {log}"])
    spilling = [kernel for kernel in kernels if kernel["spill_stores"] or kernel["spill_loads"]]
    figures = {
        "kernels": len(kernels), "spilling": len(spilling),
        "verdict": "spills" if spilling else "no spills",
        "most registers": max(kernel["registers"] for kernel in kernels),
    }  # fmt: skip
    named = {"spilling kernels": [kernel["kernel"] for kernel in spilling[:20]]} if spilling else {}
    return Findings({**figures, **named})
