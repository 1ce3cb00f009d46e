"""``python -m gpu_day``: what `make gpu` runs."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gpu_day import benches, build, checks, report, training, wheels
from gpu_day.choice import ChoiceError, seconds_named, stages_named
from gpu_day.day import Day
from gpu_day.setting import MachineError, Setting, description, environment, machine

ROOT = Path(__file__).resolve().parents[2]
STAGES = {stage.number: stage for stage in (build.stage(), checks.stage(), *benches.stages(), training.stage())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a day; returns 0, 1 where a step failed, 2 where it could not begin, 130 or 143 where it was stopped."""
    options = parser().parse_args(arguments)
    begin, stopped, signals = time.monotonic(), threading.Event(), []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        signals.append(number)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        words, budget = stages_named(options.stages, STAGES), seconds_named(options.budget)
        setting = prepared(options)
        if 1 not in words and not build.up_to_date(setting):
            print("stage 1 is added: the module in this checkout was not built here from these sources")
            words = {1: "", **words}
        left = budget - (time.monotonic() - begin)  # the first import of torch can take a minute
        status = Day(setting, [STAGES[number] for number in words], words, left, said, stopped).run()
    except (ChoiceError, MachineError, FileNotFoundError, NotADirectoryError) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"make gpu: {options.wheels} cannot be installed: {error}", file=sys.stderr)
        return 2
    print(
        f"\n{report.markdown(setting, report.stages(setting))}\nwritten to {setting.out}; all logs in {setting.results}"
    )
    return 128 + signals[0] if signals else status


def parser() -> argparse.ArgumentParser:
    """The options, named as make's variables."""
    found = argparse.ArgumentParser(prog="make gpu", description="Stages of a day on a GPU, each in its time box.")
    found.add_argument(
        "--stages", default=",".join(map(str, STAGES)), help="numbers; 4:resnet50 for steps of that name"
    )
    found.add_argument("--budget", default="1740", help="seconds for all of them")
    found.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="folder for the build, logs and runs")
    found.add_argument(
        "--out", type=Path, help="folder for summary.json, summary.md and results.tar.gz (default: --work)"
    )
    found.add_argument("--data", type=Path, help="folder with mnist/ and CIFAR-10; without it, digits are trained")
    found.add_argument("--wheels", type=Path, help="folder of wheels for packages that are absent here")
    found.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    return found


def prepared(options: argparse.Namespace) -> Setting:
    """Folders, packages, and what the machine is."""
    work, data = options.work.resolve(), options.data and options.data.resolve()
    if data and not data.is_dir():
        raise NotADirectoryError(f"DATA is {options.data}, which is no folder")
    work.mkdir(parents=True, exist_ok=True)
    children = environment(ROOT, work, data, os.environ)
    if options.wheels and (added := wheels.install(options.wheels.resolve(), work / "site", children)):
        print(f"installed into {work / 'site'}: {', '.join(added)}")
    setting = Setting(
        ROOT, work, (options.out or work).resolve(), machine(children, ROOT), children, data, options.commit
    )
    print(description(setting.machine))
    if setting.machine.driver and not setting.machine.gpu:
        print(f"torch sees no GPU, although nvidia-smi lists {setting.machine.driver}; everything is done on the CPU")
    return setting


def said(line: str) -> None:
    """At once, for the day may be cut off."""
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
