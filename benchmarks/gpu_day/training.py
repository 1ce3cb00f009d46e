"""Stage 6: real training in the time there is, then `afd evaluate`.

How many epochs fit is found by measuring: two short epochs of each kind of run come first (`pace`). The one-cycle
schedule then ends where the time does. A run that is stopped all the same has saved its best epoch, which is evaluated.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpu_day import readers
from gpu_day.child import Command, Exit
from gpu_day.setting import Setting
from gpu_day.steps import AFD, Box, Findings, Stage, Step

METHODS = {
    "wgan": "--method afd --loss wgan",
    "natural": "--method natural",
    "dcgan": "--method afd --loss dcgan",
}
PROTOCOLS = (("quick", 1.0, ()), ("autoattack", 2.0, ("foolbox", "eagerpy", "pyautoattack")))
START = 15.0  # seconds to import, load data and save
SAFETY = 0.85  # of the time is planned


@dataclass(frozen=True)
class Task:
    """A data set as it is trained and evaluated here.

    Attributes:
        data: name, as --data takes it.
        options: of every run.
        most: epochs, by method, beyond which the time is better left to others.
        quick: test images of the quick evaluation.
        hard: those of AutoAttack.
        share: of the stage's time.
        note: what stands beside every figure.
    """

    data: str
    options: str
    most: dict[str, int]
    quick: int
    hard: int
    share: float = 1.0
    note: str = ""


MNIST = Task("mnist", "--model resnet18 --width 16 --eps 0.3 --attack-steps 40",
             {"wgan": 20, "natural": 5, "dcgan": 20}, quick=1000, hard=256)  # fmt: skip
CIFAR10 = Task("cifar10", "--model resnet18 --width 64 --eps 8/255 --attack-steps 10",
               {"wgan": 60, "natural": 20, "dcgan": 60}, quick=1000, hard=256, share=2)  # fmt: skip
DIGITS = Task("digits", "--eps 0.2 --attack-steps 10", {"wgan": 60, "natural": 30, "dcgan": 60}, quick=359, hard=359,
              note="scikit-learn's 8x8 digits, for want of DATA")  # fmt: skip
TINY = Task("digits", "--width 8 --eps 0.2 --attack-steps 2", dict.fromkeys(METHODS, 2), quick=16, hard=4,
            note="a tiny run that shows only that all parts work")  # fmt: skip


def stage() -> Stage:
    """The one that takes what time it is given."""
    return Stage(6, "training", "training for as many epochs as fit, and its evaluation", share=12, steps=steps)


def steps(setting: Setting) -> list[Step]:
    """Per data set: paces, runs, and the evaluations of all runs side by side (only their time suffers)."""
    found, together = [], len(METHODS) if setting.machine.gpu else 1
    for task in tasks(setting):
        needs = (*AFD, "sklearn") if task.data == "digits" else AFD
        if task.data == "cifar10" and packed_cifar(setting):
            found.append(Step("cifar10-unpack", unpacking, share=0.5, modules=("numpy", "PIL")))
        found.append(Step(f"{task.data}-pace", partial(paces, task), task.share, modules=needs, read=read_pace))
        for method in METHODS:
            share = task.share * (0.6 if method == "natural" else 2.4)
            read = partial(read_training, task)
            found.append(
                Step(f"{task.data}-{method}", partial(training, task, method), share, modules=needs, read=read)
            )
        for protocol, share, others in PROTOCOLS:
            made, read = partial(evaluations, task, protocol), partial(read_evaluations, task)
            modules, share = (*needs, *others), task.share * share
            found.append(Step(f"{task.data}-{protocol}", made, share, modules=modules, read=read, workers=together))
    return found


def tasks(setting: Setting) -> list[Task]:
    """What can be trained here: the data sets in DATA, else digits."""
    if not setting.machine.gpu:
        return [TINY]
    data = setting.data
    found = [MNIST] if data and (data / "mnist").is_dir() else []
    if data and plain_cifar(data):
        found.append(CIFAR10)
    elif packed_cifar(setting):
        found.append(Task(**{**vars(CIFAR10), "note": "CIFAR-10 (JPEG copy)"}))
    return found or [DIGITS]


def plain_cifar(data: Path) -> bool:
    """Whether the originals are there."""
    return any((data / name).exists() for name in ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"))


def packed_cifar(setting: Setting) -> Path | None:
    """The folder with a JPEG copy of CIFAR-10 and its script that unpacks it, where the originals are not there."""
    data = setting.data
    if data is None or plain_cifar(data) or not (data / "cifar10-jpeg" / "images.tar.xz").is_file():
        return None
    return data if (data / "unpack_cifar10.py").is_file() else None


def unpacking(box: Box) -> list[Command]:
    """Writes the JPEG copy out in the layout of the originals."""
    script, target = box.setting.data / "unpack_cifar10.py", box.setting.work / "data"  # type: ignore[operator]
    return [Command("unpack", (sys.executable, str(script), str(target)))]


def options(setting: Setting, task: Task, method: str) -> list[str]:
    """What `afd train` and the pace have in common."""
    root = setting.work / "data" if task.data == "cifar10" and packed_cifar(setting) else setting.data
    placed = [] if task.data == "digits" else ["--data-root", str(root)]
    return [
        "--data", task.data, *placed, *task.options.split(), *METHODS[method].split(),
        "--lr-schedule", "one-cycle", "--precision", "auto", "--device", setting.device,
    ]  # fmt: skip


# --- How many epochs --------------------------------------------------------------------------------------------------


def paces(task: Task, box: Box) -> list[Command]:
    """The two kinds of runs: with and without the game."""
    return [
        Command(method, (sys.executable, "-m", "gpu_day.pace", str(box.folder / f"{method}.json"),
                         *options(box.setting, task, method)), {"PYTHONPATH": python_path(box.setting)})
        for method in ("wgan", "natural")
    ]  # fmt: skip


def python_path(setting: Setting) -> str:
    """For children that are part of this package."""
    return f"{Path(__file__).parents[1]}:{setting.environment['PYTHONPATH']}"


def read_pace(box: Box, exits: Sequence[Exit]) -> Findings:
    """Seconds an epoch."""
    found = {exit_.command.name: readers.read_json(box.folder / f"{exit_.command.name}.json") for exit_ in exits}
    return Findings({
        f"{name}: seconds an epoch": round(pace["seconds_an_epoch"], 2) for name, pace in found.items() if pace
    })  # fmt: skip


def epochs_in(seconds: float, pace: dict[str, float], most: int) -> int:
    """Epochs that fit beside the start and the last attack on the test images; at least one.

    Args:
        seconds: of the step.
        pace: what `pace` measured.
        most: never more.
    """
    left = SAFETY * seconds - START - pace["seconds_of_start"] - pace["seconds_of_test"]
    return max(1, min(most, math.floor(left / pace["seconds_an_epoch"])))


# --- Runs -------------------------------------------------------------------------------------------------------------


def run_folder(setting: Setting, task: Task, method: str) -> Path:
    """Where a run keeps its checkpoints."""
    return setting.results / "6-training" / f"{task.data}-{method}" / "run"


def training(task: Task, method: str, box: Box) -> list[Command]:
    """`afd train` for as many epochs as its box holds; one, where nothing was measured."""
    measured = box.folder.with_name(f"{task.data}-pace") / f"{'natural' if method == 'natural' else 'wgan'}.json"
    pace = readers.read_json(measured)
    epochs = epochs_in(box.seconds, pace, task.most[method]) if pace else 1
    run = str(run_folder(box.setting, task, method))
    words = [*options(box.setting, task, method), "--epochs", str(epochs), "--out", run]
    return [Command("train", (sys.executable, "-m", "afd", "train", *words))]


def read_training(task: Task, box: Box, exits: Sequence[Exit]) -> Findings:
    """Epochs and the last one's validation."""
    planned = exits[0].command.words[exits[0].command.words.index("--epochs") + 1]
    done = readers.epochs(box.folder / "run" / "log.jsonl")
    figures: dict[str, object] = {"epochs": f"{len(done)} of {planned}"}
    if done:
        last = done[-1]
        figures |= {"images/s": round(last["images_per_second"]), "validation natural": f"{last['natural']:.2%}"}
        figures |= {} if last["robust"] is None else {"validation PGD-20": f"{last['robust']:.2%}"}
    return Findings({**figures, **noted(task)})


def evaluations(task: Task, protocol: str, box: Box) -> list[Command]:
    """`afd evaluate` on the first test images, with the best checkpoint of each run that left one."""
    count = str(task.hard if protocol == "autoattack" else task.quick)
    found = []
    for method in METHODS:
        run = run_folder(box.setting, task, method)
        if checkpoint := next((path for path in (run / "best.pt", run / "last.pt") if path.is_file()), None):
            asked = ("--protocol", protocol, "--images", count, "--device", box.setting.device)
            words = ("evaluate", str(checkpoint), *asked, "--out", str(box.folder / method))
            found.append(Command(method, (sys.executable, "-m", "afd", *words)))
    return found


def read_evaluations(task: Task, box: Box, exits: Sequence[Exit]) -> Findings:
    """Clean accuracy, the worst case over all attacks, and whether the figures can be believed."""
    if not exits:
        return Findings(missing="no run has left a checkpoint")
    figures: dict[str, str] = {}
    problems = []
    for exit_ in exits:
        method = exit_.command.name
        results = readers.read_json(box.folder / method / "results.json")
        if results:
            worst = [
                f"{accuracy:.2%} at {eps} {norm}"
                for norm, of in results["worst_case"].items()
                for eps, accuracy in of.items()
            ]
            images = exit_.command.words[exit_.command.words.index("--images") + 1]
            figures[method] = (
                f"clean {results['clean']:.2%}, worst case {', '.join(worst)} (first {images} test images; "
                f"checks: {results['verdict']})"
            )
        elif exit_.well:
            problems.append(f"{method} left no results.json")
    return Findings({**figures, **noted(task)}, problems)


def noted(task: Task) -> dict[str, str]:
    """The remark that must stand beside a figure."""
    return {"note": task.note} if task.note else {}
