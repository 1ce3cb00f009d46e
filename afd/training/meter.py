"""Losses, kept on the device until somebody asks: one wait for the device an interval, none a round."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.training.distributed import Group


class NotFiniteError(ArithmeticError):
    """A loss stopped being finite: its name, its value, and how many rounds of the interval came before."""

    def __init__(self, name: str, value: float, rounds_before: int) -> None:
        super().__init__(f"the loss {name!r} became {value}")
        self.name, self.value, self.rounds_before = name, value, rounds_before


@dataclass
class Meter:
    """Means of an epoch's losses, and its speed, over all that was trained of it, before a stop, too.

    Attributes:
        group: of the processes.
        sums: of each loss over the rounds that were read so far. This and what follows goes into a checkpoint.
        rounds: that were read so far.
        images: this process has trained on.
        seconds: that took.
        waiting: losses that were not read yet, round by round.
    """

    group: Group
    sums: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes the detached losses of one round; does not look at them."""
        self.waiting.append(losses)

    def count(self, images: int, since: float) -> float:
        """Counts images, and the time since a reading of `perf_counter`; returns the reading now."""
        now = time.perf_counter()
        self.images, self.seconds = self.images + images, self.seconds + now - since
        return now

    def read(self) -> dict[str, float]:
        """Means over the rounds since the last reading (none: an empty dict); waits for the device.

        Raises:
            NotFiniteError: a loss of one of these rounds is not finite.
        """
        if not self.waiting:
            return {}
        names = list(self.waiting[0])
        table = self.group.mean(torch.stack([torch.stack([losses[name] for name in names]) for losses in self.waiting]))
        self.waiting = []
        rows = table.tolist()
        for number, row in enumerate(rows):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    raise NotFiniteError(name, value, number)
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.rounds += 1
        return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}

    def peek(self, rounds: int = 20) -> dict[str, float]:
        """Means over the last rounds that were not read yet, in this process (none: an empty dict); changes nothing.

        Waits for the device, like `read`, but for no other process.
        """
        latest = self.waiting[-rounds:]
        if not latest:
            return {}
        names = list(latest[0])
        table = torch.stack([torch.stack([losses[name] for name in names]) for losses in latest])
        return dict(zip(names, table.mean(0).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Means over all that was read."""
        return {name: value / self.rounds for name, value in self.sums.items()}

    @property
    def speed(self) -> float:
        """Images a second of this process."""
        return self.images / self.seconds if self.seconds else 0.0
