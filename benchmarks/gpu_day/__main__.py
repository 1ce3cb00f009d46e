"""``python -m gpu_day``: what `make gpu` runs, a step after the other, each written down as it goes."""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_day import DayError, module, plan, results
from gpu_day.module import ROOT
from gpu_day.plan import Step
from gpu_day.run import environment, has, run

RESERVE, LEAST = 3.0, 1.0  # seconds in which nothing runs any more, and that a step must have
PROBE = """import json, torch
from torch import cuda
name, capability = (cuda.get_device_name(), cuda.get_device_capability()) if cuda.is_available() else ("", ("", ""))
print(json.dumps({"gpu": name, "architecture": "{}{}".format(*capability), "torch": torch.__version__}))"""


@dataclass
class Day:
    """One call: folders, the environment of children, all that is known so far, when it ends, signals that came."""

    out: Path
    folders: Mapping[str, Path | None]  # that commands speak of
    children: Mapping[str, str]
    content: dict[str, Any]
    end: float
    stopped: list[int]

    def run(self, steps: Sequence[Step]) -> int:
        """Runs steps, each in its share of the time that is left; returns 1 where one failed."""
        failed = False
        for i, step in enumerate(steps):
            shares = [one.share or one.cap for one in steps[i:] if one.commands or one is step]
            record = self.step(step, min(step.cap, shares[0] / sum(shares) * (self.end - time.monotonic())))
            failed, why = failed or record["status"] == results.FAILED, "; ".join(record["reasons"])
            print(f"{step.stage} {step.name}: {record['status']}, {record['seconds']:.0f} s {why}", flush=True)
            if self.stopped:
                break
            if step.name == "build" and record["status"] != results.OK:
                raise DayError(f"without its module nothing can run: {why}")
        return int(failed)

    def step(self, step: Step, box: float) -> dict[str, Any]:
        """Runs one step in so many seconds; all that is known of it is written down once a second."""
        begin, work = time.monotonic(), Path(str(self.folders["work"]))
        folder, log = work / step.name, work / "logs" / f"{step.name}.log"
        epochs = plan.epochs(box, self.content["steps"].get(step.name.replace("-train", "-pace"), {}))
        places = {name: shlex.quote(str(place)) for name, place in {**self.folders, "folder": folder}.items()}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log.write_text("")
        record = self.content["steps"][step.name] = {
            "stage": step.stage, "status": results.INTERRUPTED, "box": round(box, 1), "reasons": [],
            "device": self.content["machine"].get("gpu"), "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip

        def read() -> results.Reading:
            try:
                text = log.read_text(errors="replace")
                reading = step.read(folder, text) if step.read else results.Reading({}, {}, [])
            except (ValueError, LookupError, TypeError, AttributeError) as error:  # a file is not what it should be
                reading = results.Reading({}, {}, [f"{type(error).__name__}: {error}"])
            figures = reading.figures | ({"note": step.note} if step.note else {})
            record.update(figures=figures, cases=reading.cases, seconds=round(time.monotonic() - begin, 1))
            for kept in (path for path in folder.glob("*.json*") if path.name in (f"{step.name}.json", "log.jsonl")):
                results.write(self.out / f"{step.name}{kept.suffix}", kept.read_text())
            results.write(self.out / "results.json", self.content)
            return reading

        reading, status = read(), 0 if box >= LEAST else None
        for command in step.commands if status == 0 else ():
            words = shlex.split(command.format(epochs=epochs, **places))
            status = run(words, log, self.children, ROOT, begin + box, read, self.stopped)
            reading = read()
            if status != 0:
                break
        said = log.read_text(errors="replace").strip().splitlines()
        wrong = reading.wrong + ([f"status {status}: {said[-1]}"] if status else [])
        wrong += [reading.lacking] if status == 0 and reading.lacking and not wrong else []
        record["status"], record["reasons"] = (
            (results.INTERRUPTED, []) if self.stopped
            else (results.NO_GPU, []) if not step.commands
            else (results.UNSUPPORTED, [reading.unsupported]) if reading.unsupported
            else (results.FAILED, wrong[:20]) if wrong
            else (results.OK if status == 0 else results.TIMED_OUT, [])
        )  # fmt: skip
        results.write(self.out / "results.json", self.content)
        results.summary(self.out, self.content, log.parent)
        return record


def probe(steps: Sequence[Step], children: Mapping[str, str]) -> dict[str, str]:
    """What torch sees here; a DayError that names every module that steps ask for and that is missing."""
    asked = {name: step.stage for step in reversed(steps) for name in plan.MODULES[step.stage]}
    missing = [f"the Python package {name} is missing, which stage {asked[name]} needs: "
               "make gpu-pack where there is a network, and WHEELS=build/wheels here"
               for name in sorted(asked) if not has(name, children)]  # fmt: skip
    if missing:
        raise DayError("\n".join(missing))
    told = subprocess.run(["timeout", "150", sys.executable, "-c", PROBE], env=children, capture_output=True, text=True)
    if told.returncode:
        said = f"status {told.returncode}\n{told.stderr.strip()}".splitlines()[-1]
        raise DayError(f"{sys.executable} cannot import torch and look for a GPU: {said}")
    return dict(json.loads(told.stdout))


def prepared(options: argparse.Namespace, begin: float, stopped: list[int]) -> tuple[Day, list[Step]]:
    """The day that was asked for, and its steps."""
    if not options.budget.replace(".", "", 1).isdecimal() or float(options.budget) < 30:
        raise DayError(f"BUDGET is {options.budget!r}; it must be a number of seconds, at least 30")
    for name, folder in (("WHEELS", options.wheels), ("DATA", options.data)):
        if folder and not folder.is_dir():
            raise DayError(f"{name} is {folder}, which is no folder")
    out, work = options.out.resolve(), options.work.resolve()
    wheels = (options.wheels or ROOT / "build" / "wheels").resolve()
    data = options.data.resolve() if options.data else wheels / "data" if (wheels / "data").is_dir() else None
    asked = plan.chosen(options.stages, plan.steps(data, ""))
    content = results.opened(out, options.commit)
    (work / "logs").mkdir(parents=True, exist_ok=True)
    children = environment(ROOT, work, os.environ)
    module.unpack(wheels, work / "site", children)
    machine = content["machine"] = probe(asked, children)
    reason = module.misfit(wheels / "module", machine["architecture"])
    taken = f"cannot be used, and one is compiled here: {reason}" if reason else "is taken"
    print(f"{machine['gpu'] or 'no GPU'}; the module in {wheels / 'module'} {taken}", flush=True)
    folders, end = {"work": work, "wheels": wheels, "data": data}, begin + float(options.budget) - RESERVE
    chosen = plan.chosen(options.stages, plan.steps(data, machine["architecture"]))
    return Day(out, folders, children, content, end, stopped), chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a day; returns 0, 1 where a step failed, 2 where it cannot go on, 128 + the signal that ended it."""
    begin, stopped = time.monotonic(), list[int]()
    parser = argparse.ArgumentParser(prog="make gpu", description="Stages of a day on a GPU, each in its time box.")
    parser.add_argument("--stages", default="1,2,3", help="numbers from 1 to 6; 4:128 for steps of that name")
    parser.add_argument("--budget", default="350", help="seconds for all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for the results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-work", help="folder for all else")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 (default: the pack's)")
    parser.add_argument("--wheels", type=Path, help="folder that make gpu-pack filled (default: build/wheels)")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    try:
        day, steps = prepared(options, begin, stopped)
        status = day.run(steps)
    except DayError as error:
        print(*(f"make gpu: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make gpu: {error.filename or f'{options.out} or {options.work}'}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"\n{(day.out / 'summary.md').read_text()}\nwritten to {day.out}; all else is in {options.work}")
    return 128 + stopped[0] if stopped else status


if __name__ == "__main__":
    raise SystemExit(main())
