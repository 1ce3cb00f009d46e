"""The day itself: stage by stage and step by step, each in its time, each written down before the next begins."""

from __future__ import annotations

import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gpu_day import build, readers, report
from gpu_day.child import Exit, run_all
from gpu_day.choice import ChoiceError, box
from gpu_day.setting import Setting
from gpu_day.steps import FAILED, MISSING, NO_GPU, OK, TIMED_OUT, UNFINISHED, Box, Findings, Stage, Step

ADDED_BY = "`make wheels` where there is a network, carry build/wheels here, and WHEELS=build/wheels"
LEAST_SECONDS = 1.0  # less than this, and a step is not begun
SHOWN, TAIL = 3, 15  # failed commands of a step on the terminal, and lines of their logs

Say = Callable[[str], None]


@dataclass
class Day:
    """One call of ``make gpu``.

    Attributes:
        setting: where.
        stages: those asked for, in order.
        words: by stage number, what a step's name must have.
        budget: seconds for all.
        say: where lines go that tell how it goes.
        stopped: ends the day early, with everything written.
    """

    setting: Setting
    stages: Sequence[Stage]
    words: Mapping[int, str]
    budget: float
    say: Say = print
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        """Runs all stages; returns 0, or 1 where a step failed.

        Raises:
            ChoiceError: a stage has no step of the name that was asked for.
        """
        end = time.monotonic() + self.budget
        plan = [(stage, self._steps(stage)) for stage in self.stages]
        found: list[str] = []
        for i, (stage, steps) in enumerate(plan):
            if self.stopped.is_set():
                break
            seconds = box(end - time.monotonic(), [one.share for one, _ in plan[i:]], stage.least)
            self.say(f"{stage.number} {stage.title}: up to {seconds:.0f} s")
            found += self._stage(stage, steps, seconds)
        return 1 if FAILED in found else 0

    def _steps(self, stage: Stage) -> list[Step]:
        steps, word = list(stage.steps(self.setting)), self.words.get(stage.number, "")
        chosen = [step for step in steps if word in step.name]
        if not chosen:
            names = ", ".join(step.name for step in steps)
            raise ChoiceError(f"STAGES asks for {stage.number}:{word}, but the steps of that stage are {names}")
        return chosen

    def _stage(self, stage: Stage, steps: Sequence[Step], seconds: float) -> list[str]:
        """Runs one stage's steps in their shares of its time; returns their statuses."""
        begin, end = time.monotonic(), time.monotonic() + seconds
        path = report.stage_file(self.setting, stage.number, stage.name)
        kept = readers.read_json(path).get("steps", []) if self.words.get(stage.number) else []
        if not kept:
            shutil.rmtree(path.parent, ignore_errors=True)
        names = {step.name for step in steps}
        records: list[dict[str, Any]] = [record for record in kept if record["name"] not in names]
        written = {
            "number": stage.number, "name": stage.name, "title": stage.title, "box": round(seconds, 1),
            "begun": datetime.now(UTC).isoformat(timespec="seconds"), "device": self.setting.machine.gpu or "no GPU",
            "commit": self.setting.commit or None, "steps": records,
        }  # fmt: skip

        def write() -> None:
            told = {"status": report.overall(record["status"] for record in records)}
            readers.write_json(path, {**written, **told, "seconds": round(time.monotonic() - begin, 1)})
            report.write(self.setting)

        here: list[str] = []
        for i, step in enumerate(steps):
            if self.stopped.is_set():
                break
            share = box(end - time.monotonic(), [one.share for one in steps[i:]])
            folder = path.parent / step.name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            records.append(_record(step, UNFINISHED, share))
            write()
            records[-1] = self._step(stage, step, Box(self.setting, folder, share))
            write()
            here.append(records[-1]["status"])
            seconds_, told = records[-1]["seconds"], report.told(records[-1])
            self.say(f"  {step.name}: {records[-1]['status']}, {seconds_:.0f} s{f': {told}' if told else ''}")
        return here

    def _step(self, stage: Stage, step: Step, where: Box) -> dict[str, Any]:
        """Runs one step, whatever it meets; returns what is written down of it."""
        if reason := self._lacking(stage, step):
            lacking = NO_GPU if step.gpu and not self.setting.machine.gpu else MISSING
            return _record(step, lacking, where.seconds, reasons=[reason])
        if where.seconds < LEAST_SECONDS:
            return _record(step, TIMED_OUT, where.seconds, reasons=["no time was left"])
        begin, exits, setting = time.monotonic(), [], self.setting
        try:
            exits = run_all(
                step.commands(where), begin + where.seconds, where.folder, setting.environment, setting.root,
                step.workers, self.stopped,
            )  # fmt: skip
            findings = step.read(where, exits)
        except Exception as error:  # of this step's own code: the day goes on, and it stands in the record
            (where.folder / "error.txt").write_text(traceback.format_exc())
            findings = Findings(problems=[f"{type(error).__name__}: {error}; see error.txt"])
        broken = [exit_ for exit_ in exits if not exit_.well and not exit_.timed_out]
        for exit_ in broken[:SHOWN]:
            self.say(tail(exit_))
        reasons = [*findings.problems, *filter(None, [findings.missing])]
        reasons += [f"{exit_.command.name} ended with {exit_.status}; see {exit_.log.name}" for exit_ in broken]
        return _record(
            step,
            self._status(findings, exits),
            where.seconds,
            time.monotonic() - begin,
            reasons,
            findings.figures,
            exits,
        )

    def _status(self, findings: Findings, exits: Sequence[Exit]) -> str:
        if self.stopped.is_set():
            return UNFINISHED
        if findings.missing:
            return MISSING
        if findings.problems or any(not exit_.well and not exit_.timed_out for exit_ in exits):
            return FAILED
        return TIMED_OUT if any(exit_.timed_out for exit_ in exits) else OK

    def _lacking(self, stage: Stage, step: Step) -> str:
        """What keeps a step from running here, or ""."""
        setting = self.setting
        if step.gpu and not setting.machine.gpu:
            return "torch sees no GPU"
        if modules := [name for name in step.modules if not setting.has(name)]:
            return f"needs the Python package {', '.join(modules)}: {ADDED_BY}"
        if tools := [name for name in step.tools if not setting.tool(name)]:
            return f"needs {', '.join(tools)}, which is neither on PATH nor in a CUDA toolkit (CUDA_HOME names one)"
        if stage.number > 1 and not build.up_to_date(setting):
            return "needs the build of stage 1"
        return ""


def _record(
    step: Step,
    status: str,
    seconds_given: float,
    seconds: float = 0.0,
    reasons: Sequence[str] = (),
    figures: Mapping[str, Any] | None = None,
    exits: Sequence[Exit] = (),
) -> dict[str, Any]:
    commands = [
        {"name": exit_.command.name, "words": list(exit_.command.words), "status": exit_.status,
         "seconds": round(exit_.seconds, 1), "timed out": exit_.timed_out}
        for exit_ in exits
    ]  # fmt: skip
    return {
        "name": step.name, "status": status, "seconds": round(seconds, 1), "box": round(seconds_given, 1),
        "reasons": list(reasons), "figures": dict(figures or {}), "commands": commands,
    }  # fmt: skip


def tail(exit_: Exit) -> str:
    """The end of a log, indented."""
    lines = exit_.log.read_text(errors="replace").splitlines()[-TAIL:]
    return "\n".join(f"    | {line}" for line in (f"{exit_.log.name}:", *lines))
