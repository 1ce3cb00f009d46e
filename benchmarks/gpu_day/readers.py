"""What other programs' files say: pytest's reports, the sanitizers' verdicts, ptxas, benchmarks and training runs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def junit(reports: Iterable[Path]) -> tuple[dict[str, int], list[str]]:
    """Counts over pytest's XML reports, and the names of failed tests."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for report in reports:
        try:
            cases = list(ElementTree.parse(report).iter("testcase"))
        except ElementTree.ParseError:  # cut off while it was written
            continue
        for case in cases:
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            counts[kind] += 1
            if kind == "failed":
                failed.append(f"{case.get('classname', '')}::{case.get('name', '')}")
    return counts, failed


def sanitizer_errors(log: Path) -> int | None:
    """Errors, hazards included, that compute-sanitizer counted in all processes; None where it gave no verdict."""
    text = log.read_text(errors="replace")
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)", text)
    return sum(int(a or b) for a, b in counts) if counts else None


def ptxas(text: str) -> list[dict[str, Any]]:
    """Registers, stack and spills by kernel and architecture, from what ``-Xptxas=-v`` prints."""
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    current: dict[str, Any] = {}
    speaks_of = ""
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            current = kernels[found[1], found[2]] = {
                "kernel": found[1], "architecture": found[2],
                "registers": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0,
            }  # fmt: skip
        elif found := re.search(r"Function properties for (\S+)", line):
            speaks_of = found[1]  # or a function that the kernel calls
        elif speaks_of != current.get("kernel"):
            continue
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.update(zip(("stack", "spill_stores", "spill_loads"), map(int, found.groups()), strict=True))
        elif found := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(found[1])
    return list(kernels.values())


def medians(document: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The median seconds of every candidate that `afd bench` timed, by case."""
    return {
        name: {who: one["seconds"]["p50"] for who, one in case["candidates"].items() if one["seconds"]}
        for name, case in document.get("cases", {}).items()
    }


def epochs(log: Path) -> list[dict[str, Any]]:
    """The finished epochs of a training run, from its log.jsonl."""
    lines = log.read_text().splitlines() if log.is_file() else []
    found = []
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:  # the last line of a run that was cut off
            continue
        found += [report] if report.get("kind") == "epoch" else []
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is absent or was cut off."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: object) -> None:
    """Writes JSON so that a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_text(json.dumps(content, indent=2, default=str) + "\n")
    half.replace(path)
