"""Learning rates over a run: a schedule is a function from progress, in [0, 1), to a factor of every learning rate.

All optimizers follow one schedule, so that the ratios of the players' rates stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

from torch import Tensor
from torch.optim import Optimizer

from afd.errors import InputError, InputTypeError, one_of

Schedule = Callable[[float], float]


def step(milestones: Sequence[float] = (0.5, 5 / 6), factor: float = 0.1) -> Schedule:
    """Multiplies by `factor` at each milestone, a share of the run (the paper's CIFAR: epochs 150 and 250 of 300).

    Raises:
        InputError: a milestone outside (0, 1].
    """
    if any(not 0 < share <= 1 for share in milestones):
        raise InputError(f"milestones are {tuple(milestones)}; each must be a share of the epochs, in (0, 1]")
    return lambda progress: factor ** sum(progress >= share for share in milestones)


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def one_cycle(progress: float, rise: float = 0.3, first: float = 1 / 25, last: float = 1e-4) -> float:
    """From `first` to 1 in the `rise`, then down to `last`, both along half a cosine (Smith & Topin 2018).

    The momentum stays: all players share it.
    """
    if progress < rise:
        return 1 - (1 - first) * cosine(progress / rise)
    return last + (1 - last) * cosine((progress - rise) / (1 - rise))


SCHEDULES: dict[str, Schedule] = {"step": step(), "cosine": cosine, "one-cycle": one_cycle}


def schedule_named(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or the user's own as it is.

    Raises:
        InputError: unknown name.
    """
    if callable(schedule):
        return schedule
    one_of("schedule", schedule, SCHEDULES)
    return SCHEDULES[schedule]


class Rates:
    """The learning rates of several optimizers in each round of a run.

    Set rather than stepped: there is no state that could be lost, and a player that sits out a round misses nothing.

    Args:
        optimizers: by name; their rates now are those of the factor 1.
        schedule: of progress.
        rounds: in the whole run.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], schedule: Schedule, rounds: int) -> None:
        self.optimizers, self.schedule, self.rounds = optimizers, schedule, rounds
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", float(group["lr"]))

    def factor(self, played: int) -> float:
        """What the schedule says for the round after `played` ones.

        Raises:
            InputTypeError, InputError: that is no finite number.
        """
        progress = played / self.rounds
        factor = self.schedule(progress)
        if not isinstance(factor, (Real, Tensor)):
            raise InputTypeError(f"schedule({progress:g}) is {factor!r}; it must be a number, a factor of the rates")
        if not math.isfinite(factor):
            raise InputError(f"schedule({progress:g}) is {float(factor)}; it must be a finite factor of the rates")
        return float(factor)

    def set(self, played: int) -> None:
        """Sets all rates for the round after `played` ones."""
        factor = self.factor(played)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                rate = group["initial_lr"] * factor
                if isinstance(group["lr"], Tensor):  # which a recorded step reads, so it stays where it is
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def of_round(self, number: int) -> dict[str, float]:
        """Each optimizer's rate in a round, counted from 1."""
        factor = self.factor(max(number, 1) - 1)
        return {name: o.param_groups[0]["initial_lr"] * factor for name, o in self.optimizers.items()}
