"""pytest, a child a file: after one illegal access, every later CUDA call of its process would fail too."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gpu_day import readers
from gpu_day.child import Command, Exit
from gpu_day.setting import Setting
from gpu_day.steps import Box, Findings

NO_TESTS = 5  # pytest's exit status where a file has none of the kind


def files(setting: Setting, having: re.Pattern[str] = re.compile("")) -> list[str]:
    """Test files (those whose text has a word), as seen from the checkout."""
    found = sorted((setting.root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(setting.root)) for path in found if having.search(path.read_text())]


gpu_files = partial(files, having=re.compile(r"\b(device|cuda)\b"))
slow_files = partial(files, having=re.compile(r"\bslow\b"))


def in_files(marks: str, chosen: Sequence[str], box: Box) -> list[Command]:
    """A child a file."""
    return [
        Command(
            stem(file),
            (sys.executable, *words(box.setting, marks, file, box.folder / f"{stem(file)}.xml")),
            {"OMP_NUM_THREADS": "2"},
            frozenset({0, NO_TESTS}),
        )
        for file in chosen
    ]


def words(setting: Setting, marks: str, file: str, report: Path) -> tuple[str, ...]:
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
