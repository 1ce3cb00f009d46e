"""What changed since an earlier run of the same benchmark, beyond noise.

A change counts where the two runs' bands from p20 to p80 do not overlap, each of at least `FEWEST_ROUNDS` rounds. That
knows nothing of a machine that is slower as a whole today: the floor, or any candidate that nobody touched, shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from afd.bench.document import Document, DocumentError, Figure, machine, read
from afd.bench.place import device_name
from afd.bench.show import duration
from afd.bench.timing import Timing
from afd.extras import needed_by

with needed_by("a benchmark"):
    from rich import box
    from rich.table import Table

FEWEST_ROUNDS = 5


def earlier(path: Path, benchmark: str, device: torch.device) -> Document:
    """The run at `path`, once it is known to be comparable with one on this machine.

    Raises:
        DocumentError: it cannot be read, is of another benchmark, or ran on another device or number of threads.
    """
    old = read(path, benchmark)
    here = machine(device_name(device), device.type, torch.get_num_threads())
    if old.machine != here:
        raise DocumentError(f"{path} was measured on {old.machine}; this run is on {here}, so they cannot be compared")
    return old


def table(old: Document, new: Document) -> Table:
    """A row for each candidate that either run timed: its medians, their ratio, and whether it counts."""
    title = f"since {old.time}{'' if old.finished else ', a run that was cut off: what it had measured by then'}"
    shown = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in ("was", "is", "ratio", ""):
        shown.add_column(heading, justify="right")
    rounds = min(old.rounds, new.rounds)
    for name in dict.fromkeys([*old.cases, *new.cases]):
        shown.add_row(f"[bold]{name}")
        before, after = _timings(old, name), _timings(new, name)
        others = ", ".join(_differences(old, new, name))
        for candidate in dict.fromkeys([*before, *after]):
            was, now = before.get(candidate), after.get(candidate)
            times = (duration(was.p50) if was else "", duration(now.p50) if now else "")
            if was and now:
                told = f"not comparable: {others}" if others else verdict(was, now, rounds)
                shown.add_row(f"  {candidate}", *times, f"{now.p50 / was.p50:.2f}", told)
            else:
                shown.add_row(f"  {candidate}", *times, "", "only now" if now else "only then")
    return shown


def verdict(was: Timing, now: Timing, rounds: int) -> str:
    """Slower, faster, or neither as far as the spread tells."""
    if rounds < FEWEST_ROUNDS:
        return f"too few rounds to tell ({rounds})"
    if now.p20 > was.p80:
        return "slower"
    return "faster" if now.p80 < was.p20 else "within noise"


def _timings(document: Document, case: str) -> Mapping[str, Timing]:
    found = document.cases[case].candidates if case in document.cases else {}
    return {name: candidate.seconds for name, candidate in found.items() if candidate.seconds}


def _differences(old: Document, new: Document, case: str) -> Iterator[str]:
    """The settings that the runs do not share, in words."""
    was, now = _settings(old, case), _settings(new, case)
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            yield f"{name} was {was.get(name)}, is {now.get(name)}"


def _settings(document: Document, case: str) -> Mapping[str, Figure]:
    return {**document.settings, **(document.cases[case].settings if case in document.cases else {})}
