"""Stage 2: every test on this machine, the sanitizers over the kernels, and what ptxas said about them.

Each test file runs in a process of its own: after one illegal access, every later CUDA call of its process fails too.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gpu_day import build, readers
from gpu_day.child import Command, Exit
from gpu_day.setting import Setting
from gpu_day.steps import Box, Findings, Stage, Step

NO_TESTS = 5  # pytest's exit status where a file has none of the kind
INTERRUPTED = 2
ON_GPU = re.compile(r"\b(device|cuda)\b")
KERNELS = ("tests/ops/*.py", "tests/nn/test_spectral*.py")  # what the sanitizers watch
FEW = ("tests/ops/test_pgd_step.py", "tests/ops/test_apgd_step.py", "tests/test_structure.py")  # where there is no GPU
OURS = "afd"  # in the mangled name of every kernel of ours


def stage() -> Stage:
    """GPU tests first, then what watches the kernels, then everything else."""
    return Stage(2, "checks", "tests, sanitizers, registers and spills", share=6, steps=steps)


def steps(setting: Setting) -> Sequence[Step]:
    """All of it; without a GPU, a few tests and what can be said without one."""
    tests = partial(Step, modules=("pytest", "hypothesis"), read=read_tests)
    threads, small = max(1, setting.machine.cores // 2), not setting.machine.gpu
    return [
        tests("tests-gpu", partial(pytest_files, "gpu", sorted_files(setting.root, on_gpu)), share=4, gpu=True,
              workers=min(4, threads)),
        Step("registers", registers, share=0.1, gpu=True, read=read_registers),
        sanitized("memcheck", share=3),
        sanitized("racecheck", share=3),
        tests("tests-cpu", partial(pytest_files, "not slow and not gpu", FEW if small else sorted_files(setting.root)),
              share=3, workers=threads),
        *([] if small else [
            tests("tests-slow", partial(pytest_files, "slow and not gpu", sorted_files(setting.root, is_slow)), share=2,
                  workers=threads),
        ]),
    ]  # fmt: skip


# --- Tests ------------------------------------------------------------------------------------------------------------


def sorted_files(root: Path, chosen: Callable[[str], object] = str) -> list[str]:
    """Test files (those whose text is of interest), as seen from the checkout."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in files if chosen(path.read_text())]


def on_gpu(text: str) -> object:
    """Whether a test file may have tests for a GPU."""
    return ON_GPU.search(text)


def is_slow(text: str) -> object:
    """Whether a test file may have slow ones."""
    return "pytest.mark.slow" in text


def pytest_files(marks: str, files: Sequence[str], box: Box) -> list[Command]:
    """A child a file."""
    return [
        Command(stem(file), (sys.executable, *pytest(box.setting, marks, file, box.folder / f"{stem(file)}.xml")),
                {"OMP_NUM_THREADS": "2"}, frozenset({0, NO_TESTS}))
        for file in files
    ]  # fmt: skip


def pytest(setting: Setting, marks: str, file: str, report: Path) -> tuple[str, ...]:
    """pytest without the options of pyproject.toml, one of which needs a plugin that may be absent."""
    options = ["--import-mode=importlib", "--strict-markers", "-ra", "--tb=short", "--durations=5"]
    if setting.has("pytest_benchmark"):
        options.append("--benchmark-disable")
    if setting.has("pytest_timeout"):
        options.append("--timeout=300")
    return ("-m", "pytest", "-o", "addopts=", *options, "-m", marks, f"--junitxml={report}", file)


def stem(file: str) -> str:
    """The name of a test file's log: tests/ops/test_x.py is ops-x."""
    parts = Path(file).with_suffix("").parts[1:]
    return "-".join((*parts[:-1], parts[-1].removeprefix("test_")))


def read_tests(box: Box, exits: Sequence[Exit]) -> Findings:
    """Counts of all files together, and the names of those that failed or had no time."""
    counts, failed = readers.junit(sorted(box.folder.glob("*.xml")))
    figures: dict[str, object] = {**counts}
    if failed:
        figures["first failures"] = failed[:20]
    if cut := [exit_.command.name for exit_ in exits if exit_.timed_out]:
        figures["not finished"] = cut
    return Findings(figures, [] if cut or counts["passed"] else ["not one test passed"])


# --- Sanitizers -------------------------------------------------------------------------------------------------------


def sanitized(tool: str, share: float) -> Step:
    """The kernels' GPU tests under one tool of compute-sanitizer, preceded by a program with a planted error."""
    return Step(
        tool, partial(watched, tool), share=share, modules=("pytest", "hypothesis"),
        tools=("compute-sanitizer", "nvcc"), gpu=True, read=partial(read_sanitized, tool), workers=4,
    )  # fmt: skip


def watched(tool: str, box: Box) -> list[Command]:
    """The planted error first, then a child a file; hypothesis draws few examples, as each takes long."""
    setting = box.setting
    files = {str(path.relative_to(setting.root)) for pattern in KERNELS for path in setting.root.glob(pattern)}
    sanitizer = (
        "compute-sanitizer", "--tool", tool, "--kernel-name", f"kns={OURS}", "--report-api-errors", "no",
        "--target-processes", "all", "--print-limit", "20",
    )  # fmt: skip
    sanitizer = (setting.tool("compute-sanitizer") or "", *sanitizer[1:])
    compiled = (
        setting.tool("nvcc") or "", "-std=c++17", f"-arch=sm_{setting.machine.architecture.removesuffix('-real')}", "-o",
        str(box.folder / "planted"), str(Path(__file__).with_name("planted.cu")),
    )  # fmt: skip
    planted = f"{shlex.join(compiled)} && {shlex.join((*sanitizer, str(box.folder / 'planted')))}"
    extra = {"AFD_HYPOTHESIS": "brief", "OMP_NUM_THREADS": "2"}
    if tool == "memcheck":
        extra["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else all tensors share blocks that no access leaves
    return [
        Command("planted", ("sh", "-c", planted), allowed=frozenset(range(256))),
        *(
            Command(
                stem(file),
                (*sanitizer, sys.executable, *pytest(setting, "gpu", file, box.folder / f"{stem(file)}.xml"),
                 "-k", "not graph"),  # which cannot be captured without torch's own memory
                extra, frozenset({0, 1, INTERRUPTED, NO_TESTS}),
            )
            for file in sorted_files(setting.root, on_gpu) if file in files
        ),
    ]  # fmt: skip


def read_sanitized(tool: str, box: Box, exits: Sequence[Exit]) -> Findings:
    """The tool's own verdicts; one that does not see the planted error has none."""
    del box
    errors = {exit_.command.name: readers.sanitizer_errors(exit_.log) for exit_ in exits if exit_.log.is_file()}
    planted = errors.pop("planted", None)
    log = next((exit_.log for exit_ in exits if exit_.command.name == "planted"), None)
    if log is not None and "Device not supported" in log.read_text(errors="replace"):
        return Findings(missing=f"compute-sanitizer does not support this machine; see {log.name}")
    cut = [exit_.command.name for exit_ in exits if exit_.timed_out]
    found = {name: count for name, count in errors.items() if count}
    problems = [f"{count} errors in {name}" for name, count in found.items()]
    problems += [
        f"{name} ended without a verdict" for name, count in errors.items() if count is None and name not in cut
    ]
    if not planted and "planted" not in cut:
        problems.append(f"{tool} did not see the planted error, so that its silence means nothing")
    figures: dict[str, object] = {
        "planted error found": bool(planted),
        "files watched": sum(count is not None for count in errors.values()),
        "errors": sum(found.values()),
    }
    if cut:
        figures["not finished"] = cut
    return Findings(figures, problems)


# --- Registers --------------------------------------------------------------------------------------------------------


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
        "most registers": max(kernel["registers"] for kernel in kernels), "verdict": "spills" if spilling else "no spills",
    }  # fmt: skip
    named = {"spilling kernels": [kernel["kernel"] for kernel in spilling[:20]]} if spilling else {}
    return Findings({**figures, **named})
