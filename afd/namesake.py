"""The other `afd` of the package index: a tool of our name, whose files lie among ours where both are installed."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from afd.errors import AfdError

OURS = "Adversarial Feature Desensitization"  # so the summary of this library begins, which once was called afd itself


class NamesakeError(AfdError):
    """Another package of our name has put its files among ours."""


class Namesake(NamedTuple):
    """A distribution called afd that is not this one.

    Attributes:
        version: of it.
        summary: what it says of itself.
        mixed: whether its files lie in the very folder of this package.
    """

    version: str
    summary: str
    mixed: bool

    @property
    def told(self) -> str:
        """What it is and what to do, in one line."""
        what = f"another package is installed as afd: afd {self.version} ({self.summary}), which is not this library"
        if self.mixed:
            return (
                f"{what} and lies in one folder with it, so that neither works; run `pip uninstall afd`, then "
                "`pip install --force-reinstall --no-deps afd-torch` (or the path that you installed this one from)"
            )
        return f"{what}; `import afd` and the command afd may be that one's until you run `pip uninstall afd`"


def namesake() -> Namesake | None:
    """The stranger that is installed under our name, if there is one."""
    here = Path(__file__).resolve().parent
    for found in metadata.distributions(name="afd"):
        told = found.metadata
        summary = " ".join((told["Summary"] or "no summary").split())
        if not summary.startswith(OURS):
            theirs = Path(str(found.locate_file("afd"))).resolve()
            return Namesake(str(told["Version"] or "of no version"), summary, theirs == here)
    return None


def apart() -> None:
    """Says that there is a namesake, which may be called instead of us.

    Raises:
        NamesakeError: its files lie among ours, so that nothing can be relied on.
    """
    found = namesake()
    if found is None:
        return
    if found.mixed:
        raise NamesakeError(found.told)
    print(f"afd: warning: {found.told}", file=sys.stderr)
