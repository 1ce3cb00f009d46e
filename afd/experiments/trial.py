"""A trial of a run, in a process of its own: a few of its steps and passes, timed, and the memory that they take.

What is slow is tried on fewer images, so that a trial ends about when it is asked to. The process prints what it has
found as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from afd.checkpoint import packed
from afd.config import TrainConfig
from afd.data import Splits
from afd.data.sizing import resolutions_of, side_in
from afd.errors import AfdError, in_a_line, out_of_memory
from afd.experiments.assembly import plain, splits_for, test_attack, train_batches
from afd.experiments.costs import StepCosts, TimedSteps
from afd.experiments.train import TEST_STEPS
from afd.machine import available_memory, device_with_threads, peak_memory
from afd.passes import KINDS, UncountableError, by_operations, counted
from afd.runtime import Group, device_named
from afd.training.data import Loader
from afd.training.trainer import Trainer
from afd.training.validation import shared_accuracy

# a trial of something slow begins with so many, twice as many (memory grows by two), and then so many times more
FEWEST_IMAGES, FASTER = 2, 4
MOST_TIMES = 50
COUNTED = 2  # images that passes are counted on
SHARES = {"steps": 0.55, "validation": 0.15, "test": 0.15, "loading": 0.15}  # of a trial's seconds
SKIPPED = 4  # batches that workers have ready by the time that somebody waits for them


@dataclass
class Found:
    """What something takes that was tried on some images at once.

    Attributes:
        images: of them at once.
        seconds: for each.
        memory: bytes that the process had held at most, after each number of images that was tried.
    """

    images: int = 0
    seconds: float = 0.0
    memory: dict[int, int] = field(default_factory=dict)

    def memory_at(self, images: int) -> int | None:
        """Bytes with so many images at once: as found, or along the line through the two largest numbers that were."""
        if images in self.memory:
            return self.memory[images]
        *_, (few, less), (many, more) = [(0, 0), *sorted(self.memory.items())]
        return None if not few else round(more + (images - many) * (more - less) / (many - few))


def tried(
    work: Callable[[int], object],
    most: int,
    seconds: float,
    *,
    begin: int = FEWEST_IMAGES,
    memory: Callable[[], int] = lambda: 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """What work on images takes, for as long as there is time: on so many at once as it is meant for, or on fewer.

    Args:
        work: done on so many images.
        most: that it is meant for.
        seconds: that there are; the calls for two numbers of images are made whatever they take.
        begin: images of the first call.
        memory: asked after each number of images.
        clock: in seconds.
    """
    end, images, found = clock() + seconds, min(begin, most), Found()

    def once() -> float:
        before = clock()
        work(images)
        return clock() - before

    while True:
        times = [once()]
        if clock() + times[0] <= end:  # the first one builds what stays
            times.append(once())
        found.memory[images] = memory()
        left, each = end - clock(), times[-1] / images
        more = min(most, FASTER * images if len(found.memory) > 1 else 2 * images)
        if images == most or (len(found.memory) > 1 and each * more > left):
            break
        images = most if 3 * each * most <= left else more
    while len(times) < MOST_TIMES and clock() + times[-1] <= end:
        times.append(once())
    found.images = images
    found.seconds = statistics.median(times[1:] or times) / images
    return found


def loading_speed(batches: Iterable[Any], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Images that loading gives in a second while nobody does anything with them.

    Args:
        batches: of the run, images first; those that were ready by the first request are left out.
        seconds: that there are; a batch at least is waited for.
        clock: in seconds.
    """
    end, count, since = clock() + seconds, 0, math.inf
    first = clock()
    loaded = list[int]()
    for number, item in enumerate(batches):
        loaded.append(len(item[0]))
        now = clock()
        if number < SKIPPED:
            since = now
        else:
            count += loaded[-1]
        if now >= end and number:
            break
    if count and now > since:
        return count / (now - since)
    return sum(loaded) / max(now - first, 1e-9)


# --- A trial ----------------------------------------------------------------------------------------------------------


def trial(config: TrainConfig, seconds: float, *, whole: bool) -> dict[str, Any]:
    """What a run takes with its batch size: speeds, memory and, where it is the `whole` trial, all else.

    Args:
        config: the run, settled.
        seconds: that there are.
        whole: whether passes, loading and the test are asked for, too.

    Raises:
        AfdError: it cannot be trained so.
    """
    device = device_named(config.device)
    found: dict[str, Any] = {"device": device_with_threads(device), "available": available_memory(device)}
    splits = splits_for(config)
    steps = TimedSteps(at_largest(config), splits.train, device)
    stepping = list[float]()
    untrained = {name: one.clone() for name, one in steps.trainer.network.state_dict().items() if torch.is_tensor(one)}

    def step(images: int) -> None:
        steps.take(images)
        stepping.append(steps.stepping / images)

    size = min(config.data.batch_size, len(splits.train))
    begin = size if device.type == "cuda" or config.compile else FEWEST_IMAGES
    taken = tried(step, size, SHARES["steps"] * seconds, begin=begin, memory=lambda: peak_memory(device))
    before = peak_memory(device)
    # what a few steps on few images have made of it may be anything, NaN included
    steps.trainer.network.load_state_dict(untrained, strict=False)
    trainer, held_out = steps.trainer, plain(splits.validation, device)
    validated = _measured(trainer, held_out, trainer.judge, SHARES["validation"] * seconds)
    state = trainer.state_dict()
    metadata = state.pop("metadata")
    found |= {
        "images": taken.images,
        "seconds": taken.seconds,
        "stepping": statistics.median(stepping[-len(stepping) // 2 :]),
        "validation": validated.seconds,
        "checkpoint": len(packed(state, metadata)),
        "weights": sum(one.numel() * one.element_size() for one in trainer.network.state_dict().values()),
    }
    # validation and checkpoints take theirs beside what steps are extrapolated to
    expected = taken.memory_at(size)
    beside = max(0, peak_memory(device) - before)
    found["memory"] = None if expected is None else max(expected + beside, peak_memory(device))
    if whole:
        found |= _counts(config, splits, device)
        attack = test_attack(config, TEST_STEPS).build(trainer.network)
        found["test"] = _measured(trainer, plain(splits.test, device), attack, SHARES["test"] * seconds).seconds
        if ":" in config.data.name:
            loader = train_batches(at_largest(config), splits.train, device)
            found["loading"] = loading_speed(loader, SHARES["loading"] * seconds)
    return found


def at_largest(config: TrainConfig) -> TrainConfig:
    """The run with the largest of its resolutions from the beginning, as that is what has to fit."""
    sides = [one.side for one in resolutions_of(config.data.resolutions)]
    kept = (f"{max(sides)}:1",) if sides else ()
    return replace(config, data=replace(config.data, resolutions=kept))


def growth(config: TrainConfig) -> float:
    """The mean over the epochs of a run of an image's area, over that of the largest."""
    resolutions, usual = resolutions_of(config.data.resolutions), config.data.image_size
    if not resolutions or usual is None:
        return 1.0
    assert config.epochs is not None
    areas = [side_in(resolutions, epoch, usual) ** 2 for epoch in range(1, config.epochs + 1)]
    return statistics.mean(areas) / max(one.side for one in resolutions) ** 2


def _measured(trainer: Trainer, batches: Loader, attack: Any, seconds: float) -> Found:
    """What it takes to measure accuracy, natural and, where there is an attack, under it."""
    x, y = next(iter(batches))[:2]

    def work(images: int) -> None:
        some: Any = [(x[:images], y[:images])]
        for one in (None, attack)[: 1 + (attack is not None)]:
            shared_accuracy(trainer.evaluated if attack is trainer.judge else trainer.network, some, one, Group())

    return tried(work, len(x), seconds)


def _counts(config: TrainConfig, splits: Splits[Any], device: torch.device) -> dict[str, Any]:
    """How many images there are, and the passes of the run; none where nobody can count them."""
    assert config.epochs is not None
    epoch = config.data.epoch_images or len(splits.train)
    sizes = {"epoch": epoch, "validation": len(splits.validation), "test": len(splits.test)}
    found: dict[str, Any] = {"sizes": sizes, "passes": None}
    for count, by in ((counted, "convolutions"), (by_operations, "operations")):
        try:
            steps = StepCosts(config, splits.train, device, count, rows=COUNTED)
        except UncountableError:
            continue
        ways = steps.ways(config.epochs, epoch)
        images = config.epochs * epoch
        kinds = {kind: sum(many * getattr(one, kind) for one, many in ways.items()) / images for kind in KINDS}
        found["passes"] = {
            "by": by,
            "image": kinds if count is counted else None,
            "cost": sum(kinds.values()),
            "run": images * sum(kinds.values()),
            "timed": steps.first.cost * steps.trainer.method.repeats,
        }
        break
    return found


# --- The process ------------------------------------------------------------------------------------------------------


def main() -> None:
    """What the process does: reads a run from its input, prints what it has found, or why it cannot be tried."""
    _first_to_go()
    asked = json.load(sys.stdin)
    answer, sys.stdout = sys.stdout, sys.stderr  # what a network prints is not for whoever reads the answer
    config = TrainConfig.from_json(asked["config"])
    if not asked["whole"]:
        config = replace(config, data=replace(config.data, batch_size=asked["batch"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself gives them
            found = trial(config, asked["seconds"], whole=asked["whole"])
    except AfdError as error:
        found = {"error": str(error)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        found = {"fits": False, "told": in_a_line(error)}
    print(json.dumps(found), file=answer, flush=True)


def _first_to_go() -> None:
    """Where the machine's memory is short, Linux ends this process rather than another one."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{os.getpid()}/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
