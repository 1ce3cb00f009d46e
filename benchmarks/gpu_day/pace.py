"""How long an epoch takes, measured on the run itself: ``python -m gpu_day.pace FILE --data mnist …``.

The options after FILE are those of ``afd train``. Two short epochs are trained, each with a whole validation, and a
part of the test images is attacked. The first epoch lets libraries choose and attacks record, the second counts.
Nothing of it is kept but the seconds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from afd import data
from afd.config import TrainConfig
from afd.data import Images
from afd.training import train

ROUNDS, TESTED = 40, 1000


class Clock(Console):
    """Notes when the trainer prints: after every epoch with its validation, and after the last attack."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[float] = []

    def print(self, *objects: Any, **settings: Any) -> None:
        """Prints, and reads the clock."""
        self.readings.append(time.perf_counter())
        super().print(*objects, **settings)


def main() -> None:
    """Measures and writes."""
    out, *words = sys.argv[1:]
    given = tyro.cli(Annotated[TrainConfig, tyro.conf.arg(name="")], args=words, config=(tyro.conf.OmitArgPrefixes,))
    whole = data.load(given.data.name, given.data.root, validation=given.data.validation, download=False)
    images, tested = min(len(whole.train), ROUNDS * given.data.batch_size), min(len(whole.test), TESTED)
    part = dataclasses.replace(whole, train=first(whole.train, images), test=first(whole.test, tested))
    clock, begin = Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(given, out=Path(folder), epochs=2), clock, part)
        reports = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    rate = next(report["images_per_second"] for report in reversed(reports) if report["kind"] == "epoch")
    one, two, end = clock.readings
    validation = max(0.0, two - one - images / rate)
    paced = {
        "images_per_second": rate,
        "seconds_an_epoch": len(whole.train) / rate + validation,
        "seconds_of_validation": validation,
        "seconds_of_start": max(0.0, one - begin - images / rate - validation),
        "seconds_of_test": (end - two) * len(whole.test) / tested,
    }
    Path(out).write_text(json.dumps(paced, indent=2) + "\n")
    print(paced)


def first(images: Images, count: int) -> Images:
    """The first images of a split."""
    return images.take(torch.arange(min(count, len(images))))


if __name__ == "__main__":
    main()
