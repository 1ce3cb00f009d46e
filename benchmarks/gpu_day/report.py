"""What a day leaves: stage.json as it goes, and of all stages a summary and an archive small enough to carry away."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_day import readers
from gpu_day.setting import Setting, description
from gpu_day.steps import FAILED, MISSING, NO_GPU, OK, TIMED_OUT, UNFINISHED

FORMAT = {"format": "afd-gpu-day", "version": 1}
LARGEST = 2**20  # bytes of a file in the archive; weights and states stay where they are
LEFT_OUT = {".pt", ".pth", ".so"}
WORST_FIRST = (FAILED, UNFINISHED, TIMED_OUT, MISSING)
SHOWN = 8  # figures of a step on the terminal and in summary.md


def overall(statuses: Iterable[str]) -> str:
    """What a stage's steps make of it: the worst that happened; "no GPU" only where nothing else did."""
    found = set(statuses)
    worst = next((status for status in WORST_FIRST if status in found), None)
    return worst or (NO_GPU if found == {NO_GPU} else OK)


def stage_file(setting: Setting, number: int, name: str) -> Path:
    """Where a stage is written down."""
    return setting.results / f"{number}-{name}" / "stage.json"


def stages(setting: Setting) -> list[dict[str, Any]]:
    """All stages that this work folder knows of, earlier calls included."""
    found = [readers.read_json(path) for path in sorted(setting.results.glob("*/stage.json"))]
    return [stage for stage in found if stage]


def write(setting: Setting) -> None:
    """Renews summary.json, summary.md and results.tar.gz in the folder that was asked for."""
    done = stages(setting)
    header = {**FORMAT, "machine": vars(setting.machine), "commit": setting.commit or None}
    setting.out.mkdir(parents=True, exist_ok=True)
    readers.write_json(setting.out / "summary.json", {**header, "stages": done})
    (setting.out / "summary.md").write_text(markdown(setting, done), encoding="utf-8")
    archive(setting.results, setting.out / "results.tar.gz")


def archive(folder: Path, target: Path) -> None:
    """Packs logs and results; the archive that is there stays whole until the new one is."""
    half = target.with_name(f".{target.name}.half")
    with tarfile.open(half, "w:gz", compresslevel=6) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in LEFT_OUT and path.stat().st_size <= LARGEST:
                tar.add(path, path.relative_to(folder.parent))
    half.replace(target)


def markdown(setting: Setting, done: Sequence[Mapping[str, Any]]) -> str:
    """A table of stages, then one of each stage's steps."""
    lines = ["# GPU day", "", f"{description(setting.machine)}; commit {setting.commit or 'unknown'}", ""]
    rows = [
        (f"{stage['number']} {stage['title']}", stage["status"], f"{stage['seconds']:.0f}", stage["begun"])
        for stage in done
    ]
    lines += _table(("stage", "status", "seconds", "begun"), rows)
    for stage in done:
        steps = [
            (step["name"], step["status"], f"{step['seconds']:.0f} of {step['box']:.0f}", told(step))
            for step in stage["steps"]
        ]
        lines += ["", f"## {stage['number']} {stage['name']}", "", *_table(("step", "status", "seconds", ""), steps)]
    return "\n".join(lines) + "\n"


def told(step: Mapping[str, Any]) -> str:
    """A step's reasons and first figures in one line."""
    figures = [f"{name} {_short(value)}" for name, value in list(step["figures"].items())[:SHOWN]]
    more = len(step["figures"]) - len(figures)
    return "; ".join([*step["reasons"], *figures, *([f"and {more} more"] if more > 0 else [])])


def _short(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [list(headings), ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]
