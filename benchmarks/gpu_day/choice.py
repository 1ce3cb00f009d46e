"""What is asked for: which stages, which of their steps, and in how many seconds."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

LEAST_BUDGET = 30.0


class ChoiceError(ValueError):
    """Something that was asked for cannot be; the message says what can."""


def stages_named(text: str, known: Collection[int]) -> dict[int, str]:
    """The numbers in "1,2,4:resnet50", ascending, each with the word that its steps' names must have ("" for any).

    Raises:
        ChoiceError: an unknown number, a number twice, or none at all.
    """
    allowed = f"numbers from {min(known)} to {max(known)}, each once, as in 1,2,4 or 2,4:resnet50 (steps of that name)"
    found: dict[int, str] = {}
    for part in text.replace(" ", "").split(","):
        number, colon, word = part.partition(":")
        if not number.isdecimal() or int(number) not in known or int(number) in found or (colon and not word):
            raise ChoiceError(f"STAGES is {text!r}, where {part!r} cannot be used; allowed are {allowed}")
        found[int(number)] = word
    return dict(sorted(found.items()))


def seconds_named(text: str) -> float:
    """The budget.

    Raises:
        ChoiceError: no number of seconds, or too few to start anything.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST_BUDGET <= seconds < math.inf:
        raise ChoiceError(f"BUDGET is {text!r}; it must be a number of seconds, at least {LEAST_BUDGET:g}")
    return seconds


def box(left: float, shares: Sequence[float], least: float = 0.0) -> float:
    """The seconds of the first of the things that share the time left; what it does not use falls to the others.

    Args:
        left: seconds.
        shares: of this one and of all that follow.
        least: seconds that this one gets in any case, as far as there are any.
    """
    return min(left, max(least, left * shares[0] / sum(shares))) if left > 0 else 0.0
