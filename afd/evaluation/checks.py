"""Signs of self-deception, each with its number and a verdict. A figure with a failed check is not to be believed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "warn", "fail", "skipped"]
SEVERITY: tuple[Verdict, ...] = ("skipped", "pass", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """One sign, looked for.

    Attributes:
        name: of the check.
        verdict: "pass", "warn", "fail", or "skipped" where something it needs is not there.
        number: what was measured; None if skipped.
        unit: of the number.
        allowed: the largest number that passes.
        meaning: what a number above that says, or why the check was skipped.
    """

    name: str
    verdict: Verdict
    number: float | None
    unit: str
    allowed: float
    meaning: str

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def judge(
    name: str, number: float, unit: str, *, allowed: float, fails_above: float, meaning: str, one: float = 0.0
) -> Check:
    """A check whose verdict follows from its number.

    Args:
        name: of the check.
        number: what was measured.
        unit: of the number.
        allowed: up to here it passes.
        fails_above: above here it fails; between the two it warns.
        meaning: what a number above `allowed` says.
        one: what a single image weighs in the number: no more than that is never worse than a warning.
    """
    slack = 1e-9  # of sums of percentages
    if number <= allowed + slack:
        verdict: Verdict = "pass"
    elif number <= max(fails_above, one) + slack:
        verdict = "warn"
    else:  # NaN too
        verdict = "fail"
    return Check(name, verdict, number, unit, allowed, meaning)


def skipped(name: str, reason: str) -> Check:
    """A check that could not be made."""
    return Check(name, "skipped", None, "", 0.0, reason)


def overall(checks: Iterable[Check]) -> Verdict:
    """The worst verdict."""
    return max((check.verdict for check in checks), key=SEVERITY.index, default="skipped")
