"""compute-sanitizer over the kernels' GPU tests.

Only our own kernels are instrumented, or it would take hours. That tool, filter and machine go together is shown by
a program with a planted error, which must be seen: where it is not, silence means nothing.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from gpu_day import pytests, readers
from gpu_day.child import Command, Exit
from gpu_day.steps import TESTS, Box, Findings, Step

KERNELS = ("tests/ops/*.py", "tests/nn/test_spectral*.py")  # what is watched
OURS = "afd"  # in the mangled name of every kernel of ours
PLANTED = Path(__file__).with_name("planted.cu")
INTERRUPTED = 2  # pytest's exit status


def sanitized(tool: str, share: float) -> Step:
    """The kernels' GPU tests under one tool of compute-sanitizer, preceded by a program with a planted error."""
    return Step(
        tool, partial(watched, tool), share=share, modules=TESTS,
        tools=("compute-sanitizer", "nvcc"), gpu=True, read=partial(read_sanitized, tool), workers=4,
    )  # fmt: skip


def watched(tool: str, box: Box) -> list[Command]:
    """The planted error first, then a child a file; hypothesis draws few examples, as each takes long."""
    setting = box.setting
    nvcc, architecture = setting.tool("nvcc") or "", setting.machine.architecture.removesuffix("-real")
    sanitizer = (
        setting.tool("compute-sanitizer") or "", "--tool", tool, "--kernel-name", f"kns={OURS}",
        "--report-api-errors", "no", "--target-processes", "all", "--print-limit", "20",
    )  # fmt: skip
    program = str(box.folder / "planted")
    compiled = shlex.join((nvcc, "-std=c++17", f"-arch=sm_{architecture}", "-o", program, str(PLANTED)))
    extra = {"AFD_HYPOTHESIS": "brief", "OMP_NUM_THREADS": "2"}
    if tool == "memcheck":
        extra["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else all tensors share blocks that no access leaves
    chosen = [file for file in pytests.gpu_files(setting) if any(fnmatch(file, pattern) for pattern in KERNELS)]
    planted = ("sh", "-c", f"{compiled} && {shlex.join((*sanitizer, program))}")
    return [Command("planted", planted, allowed=frozenset(range(256)))] + [
        Command(
            pytests.stem(file),
            (*sanitizer, sys.executable, *pytests.words(setting, "gpu", file, box.folder / f"{pytests.stem(file)}.xml"),
             "-k", "not graph"),  # which cannot be captured without torch's own memory
            extra,
            frozenset({0, 1, INTERRUPTED, pytests.NO_TESTS}),
        )
        for file in chosen
    ]  # fmt: skip


def read_sanitized(tool: str, box: Box, exits: Sequence[Exit]) -> Findings:
    """The tool's own verdicts; one that does not see the planted error has none."""
    del box
    tried = [exit_ for exit_ in exits if exit_.log.is_file() and exit_.status != pytests.NO_TESTS]
    errors = {exit_.command.name: readers.sanitizer_errors(exit_.log) for exit_ in tried}
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
