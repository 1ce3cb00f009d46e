"""What a day consists of: stages of steps, what a step needs, and what is read from what it left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_day.child import Command, Exit
from gpu_day.setting import Setting

OK, FAILED, TIMED_OUT, MISSING, NO_GPU = "ok", "failed", "timed out", "missing", "no GPU"
UNFINISHED = "unfinished"  # what a step is written down as before it runs, and stays if the day is cut off

AFD = ("numpy", "matplotlib", "rich", "tensorboard", "tyro", "docstring_parser")  # what afd imports, besides torch
TESTS = (*AFD, "pytest", "hypothesis", "sklearn")  # and its tests


@dataclass(frozen=True)
class Findings:
    """What a step's files say.

    Attributes:
        figures: by name, plain values.
        problems: why the step failed although its commands may have ended well.
        missing: what the machine turned out to lack, or "".
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()
    missing: str = ""


@dataclass(frozen=True)
class Box:
    """Where and how long a step runs."""

    setting: Setting
    folder: Path
    seconds: float


Read = Callable[[Box, Sequence[Exit]], Findings]


def nothing_to_read(box: Box, exits: Sequence[Exit]) -> Findings:
    """For a step whose exit status says all."""
    del box, exits
    return Findings()


@dataclass(frozen=True)
class Step:
    """A few commands with one purpose.

    Attributes:
        name: unique in the day's stage; its folder and the word that STAGES can ask for.
        commands: made when the step's turn has come, for they may depend on its time and on earlier steps.
        share: of the stage's time, relative to the other steps.
        modules: Python modules it cannot do without.
        tools: programs it cannot do without.
        gpu: whether it means nothing without one.
        read: what its files say.
        workers: commands that run at a time.
    """

    name: str
    commands: Callable[[Box], Sequence[Command]]
    share: float = 1.0
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    gpu: bool = False
    read: Read = nothing_to_read
    workers: int = 1


@dataclass(frozen=True)
class Stage:
    """One of the six.

    Attributes:
        number: as STAGES names it.
        name: of its folder.
        title: what it is for.
        share: of the day's time, relative to the other stages asked for.
        steps: those that this machine can take.
        least: seconds that it gets in any case.
    """

    number: int
    name: str
    title: str
    share: float
    steps: Callable[[Setting], Sequence[Step]]
    least: float = 0.0
