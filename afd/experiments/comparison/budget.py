"""One cost for all methods: a time is measured once, as passes of adversarial training, and buys each its epochs.

What a run costs is counted and not timed (`afd.experiments.costs`), so all entries cost the same on any machine.
"""

from __future__ import annotations

import math
import re

from afd.errors import AfdError, InputError
from afd.experiments.costs import Cost, StepCosts

ROUNDS = 8  # of the search for a run that costs what was asked for
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
WRITTEN = re.compile(r"(?=.)(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?")


def seconds_in(text: str) -> float:
    """Seconds of a time written as 5m, 300s, 2h or 1h30m.

    Raises:
        InputError: it is written in another way, or no time at all.
    """
    found = WRITTEN.fullmatch(text.strip())
    parts = {} if found is None else {unit: float(one) for unit, one in found.groupdict().items() if one is not None}
    seconds = sum(UNITS[unit] * one for unit, one in parts.items())
    if not seconds > 0:
        raise InputError(f"budget is {text!r}; it must be a time such as 5m, 300s, 2h or 1h30m")
    return seconds


class BudgetError(AfdError):
    """A budget buys less than one epoch.

    Attributes:
        needed: passes of one.
    """

    def __init__(self, needed: float) -> None:
        super().__init__(f"one epoch takes {needed:.3g} passes")
        self.needed = needed


def within(steps: StepCosts, passes: float) -> Cost:
    """The run that costs so many, to a batch or so: in as many epochs as leave each nearest to all images once.

    1.4 epochs' worth are one epoch of 1.4 times as many images as there are; three quarters are the least.

    Raises:
        BudgetError: they are fewer than one epoch takes.
    """
    whole = len(steps.images)
    least = steps.passes(1, whole)
    images = passes * whole / least
    if images < whole:
        raise BudgetError(least)
    cost = best = _of(steps, images)
    for _ in range(ROUNDS):
        assert cost.passes is not None
        if abs(cost.passes - passes) < cost.passes / (cost.epochs * cost.epoch_images):
            return cost
        images = max(whole, images * passes / cost.passes)
        cost = _of(steps, images)
        best = min(best, cost, key=lambda one: abs((one.passes or 0.0) - passes))
    return best


def _of(steps: StepCosts, images: float) -> Cost:
    epochs = max(1, round(images / len(steps.images)))
    epoch_images = round(images / epochs)
    if epoch_images % steps.config.data.batch_size == 1:  # an image alone, which BatchNorm could not be shown
        epoch_images -= 1
    return Cost(epochs, epoch_images, steps.passes(epochs, epoch_images))


def too_small(entry: str, error: BudgetError, passes: float, seconds: float | None) -> InputError:
    """What is said of a budget that does not buy an entry an epoch.

    Args:
        entry: which.
        error: that was found.
        passes: that the budget is.
        seconds: likewise, where that was measured here and now.
    """
    told = f"the budget of {passes:.3g} passes is less than one epoch of {entry!r}, which takes {error.needed:.3g}"
    if seconds is None:  # measured at another time, elsewhere perhaps
        return InputError(told)
    wanted = seconds * error.needed / passes
    needed = f"{math.ceil(wanted / 60)}m" if wanted > 600 else f"{math.ceil(wanted)}s"
    return InputError(f"{told}: that needs a budget of {needed} here")
