"""What a day leaves, valid at any moment: results.json, summary.md, logs.tar.gz; and what the steps' own files say."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from gpu_day import DayError

OK, FAILED, TIMED_OUT, NO_GPU, UNSUPPORTED = "ok", "failed", "timed out", "no GPU", "not supported"
INTERRUPTED = "interrupted"  # what a step is written down as before it runs, and stays if the day is cut off


def opened(out: Path, commit: str) -> dict[str, Any]:
    """The results in a folder, which must be empty; else a DayError."""
    out.mkdir(parents=True, exist_ok=True)
    if [path for path in out.iterdir() if not path.name.startswith(".")]:
        raise DayError(f"OUT is {out}, which is not empty; name another folder")
    return {"format": "afd-gpu-day", "version": 2, "commit": commit, "machine": {}, "steps": {}}


def write(path: Path, content: str | dict[str, Any]) -> None:
    """Writes text or JSON so that a reader never meets half of it."""
    half = path.with_name(f".{path.name}.half")
    half.write_text(content if isinstance(content, str) else json.dumps(content, indent=1, default=str))
    half.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is absent or was cut off."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def summary(out: Path, content: dict[str, Any], logs: Path) -> None:
    """Renews what is made of the results: a table of steps, and the archive of logs."""
    table = "| stage | step | status | seconds | |\n| --- | --- | --- | --- | --- |\n"
    for name, step in content["steps"].items():
        told = [*step["reasons"], *(f"{what}: {value}" for what, value in step["figures"].items())]
        seconds, words = f"{step['seconds']:.0f} of {step['box']:.0f}", "<br>".join(told).replace("|", "\\|")
        table += f"| {step['stage']} | {name} | {step['status']} | {seconds} | {words} |\n"
    machine = ", ".join(f"{name} {value or 'none'}" for name, value in content["machine"].items())
    write(out / "summary.md", f"# GPU day\n\ncommit {content['commit'] or 'unknown'}; {machine}\n\n{table}")
    Path(shutil.make_archive(str(out / ".logs"), "gztar", logs)).replace(out / "logs.tar.gz")


# --- What steps leave ------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What a step's files say, half-written or whole."""

    figures: dict[str, Any]
    cases: dict[str, Any]
    wrong: list[str]  # why it failed
    lacking: str = ""  # why it failed although it ended well
    unsupported: str = ""  # why this machine cannot do it


def documents(folder: Path, _log: str) -> Reading:
    """The JSON document of a benchmark, of smoke, of the module or of an evaluation, case by case."""
    found: dict[str, Any] = {}
    for path in folder.glob("*.json"):
        found |= read_json(path)
    cases = found.get("cases", {})
    figures: dict[str, Any] = {name: found[name] for name in ("clean", "worst_case", "verdict") if name in found}
    figures |= found.get("figures", {"cases": len(cases)} if cases else {})
    for name, case in cases.items():
        timed = {who: one["seconds"]["p50"] for who, one in case.get("candidates", {}).items() if one["seconds"]}
        figures |= {name: ", ".join(f"{who} {p50 * 1e6:.4g} us" for who, p50 in timed.items())} if timed else {}
    wrong = [f"{name}: {case['words']}" for name, case in cases.items() if case.get("ok") is False]
    return Reading(figures, cases, wrong, "" if figures and found.get("finished", True) else "its file is not whole")


def training(folder: Path, _log: str) -> Reading:
    """The finished epochs of a run."""
    text = (folder / "log.jsonl").read_text() if (folder / "log.jsonl").is_file() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    cases = {f"epoch {one['epoch']}": one for one in found if one["kind"] == "epoch"}
    last = list(cases.values())[-1] if cases else {}
    names = ("epoch", "global_step", "images_per_second", "natural", "robust")
    return Reading({name: last[name] for name in names if last}, cases, [], "" if cases else "no epoch was finished")


def tests(_folder: Path, log: str) -> Reading:
    """pytest: its lines case by case, and why those failed that did, where its last lines tell."""
    found = re.findall(r"^\[gw\d+\] \[ *\d+%\] (\w+) (\S.*?) *$", log, re.MULTILINE)
    cases = {name: state.lower() for state, name in found}
    failed = [name for name, state in cases.items() if state in ("failed", "error")]
    wrong = re.findall(r"^(?:FAILED|ERROR) (\S+\.py\b.*)$", log, re.MULTILINE) or failed
    counts = Counter(cases.values())
    return Reading(dict(counts), cases, wrong, "" if counts["passed"] else "not one test passed")


def sanitizer(_folder: Path, log: str) -> Reading:
    """compute-sanitizer's verdict on smoke, which counts only where it has seen the planted error."""
    runs = [run for run in re.split(r"^\$ ", log, flags=re.MULTILINE) if "--tool" in run.partition("\n")[0]]
    said = [re.findall(r"[A-Z]+ SUMMARY: (\d+) (?:error|hazard)", run) for run in runs]
    planted, errors = (sum(map(int, counts)) if counts else None for counts in (*said, [], [])[:2])
    wrong = [f"{errors} errors"] if errors else []
    if len(runs) > 1 and not planted:
        wrong.append("the planted error was not seen, so that silence means nothing")
    absent = "compute-sanitizer does not support this machine" if "Device not supported" in log else ""
    return Reading({"planted": planted, "errors": errors}, {}, wrong, "no verdict" if errors is None else "", absent)
