"""What a training run tells: reports, and the plain functions that are called with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
