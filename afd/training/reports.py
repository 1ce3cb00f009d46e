"""What a training run tells: reports, and the plain functions that are called with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from afd.errors import AfdError


class TrainingError(AfdError):
    """Training cannot go on."""


@dataclass(frozen=True)
class IntervalReport:
    """Where training stands, once every `log_every` rounds and at the end of an epoch.

    Attributes:
        epoch: counted from 1.
        round: rounds played in all.
        done: batches of this epoch played.
        total: batches of an epoch.
        losses: mean of each loss over the interval.
        learning_rates: of each optimizer, in the interval's last round.
    """

    epoch: int
    round: int
    done: int
    total: int
    losses: dict[str, float]
    learning_rates: dict[str, float]


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did.

    Attributes:
        epoch: counted from 1.
        round: rounds played in all.
        losses: mean of each loss over the epoch.
        natural: clean accuracy on the validation images, in [0, 1].
        robust: accuracy there under the validation attack; None without one.
        images_per_second: training images over training time (attack included, validation not), of all processes.
        learning_rates: of each optimizer, in the epoch's last round.
    """

    epoch: int
    round: int
    losses: dict[str, float]
    natural: float
    robust: float | None
    images_per_second: float
    learning_rates: dict[str, float]

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: robust accuracy where it was measured, else clean accuracy."""
        return self.natural if self.robust is None else self.robust

    @property
    def rank(self) -> tuple[float, int]:
        """What epochs are compared by: the score, and of equals the later one."""
        return self.score, self.epoch


Report = IntervalReport | EpochReport

Callback = Callable[[Report], None]
"""Called with every report, in one process. May call `Trainer.stop`."""

Losses = Callable[[], dict[str, float]]
"""What the losses are just now, by name; waits for the device."""


class Progress(Protocol):
    """Shows how far a run has come. It is told often, so it must be quick, and wait for the device seldom."""

    def began(self, work: str, epoch: int | None, done: int, total: int | None, losses: Losses | None = None) -> None:
        """Work begins, or goes on.

        Args:
            work: in words: "training", "validation".
            epoch: that it belongs to, counted from 1; None for work that comes once, after all epochs.
            done: batches of it that are behind already.
            total: batches of it; None if nobody knows.
            losses: of the rounds played lately, where there are any.
        """

    def moved(self, images: int) -> None:
        """One batch more is done, of so many images in all processes."""


class Unseen:
    """The `Progress` of a run that shows none."""

    def began(self, work: str, epoch: int | None, done: int, total: int | None, losses: Losses | None = None) -> None:
        """Shows nothing."""

    def moved(self, images: int) -> None:
        """Shows nothing."""


UNSEEN = Unseen()
