"""Results of a benchmark: one JSON document of cases, candidates and their figures, with the environment they hang on.

A change since an earlier document counts where the two runs' bands from p20 to p80 do not overlap, each of at least
`FEWEST_REPEATS` repeats. That knows nothing of a machine that is slower as a whole today: the floor, or any candidate
that nobody touched, shows it.
"""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from afd._version import __version__
from afd.errors import AfdError
from afd.files import check_source, write_whole
from afd.runtime import commit

FORMAT, VERSION = "afd-bench", 2
FEWEST_REPEATS = 5

Figure = float | int | str | None


class DocumentError(AfdError):
    """A file is not the benchmark document that was asked for."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: percentiles over the repeats."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of what was read in the repeats."""
        return cls(*np.quantile(seconds, [0.2, 0.5, 0.8]).tolist())


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work."""

    seconds: Timing | None  # a call took; None where time was not the question
    figures: Mapping[str, Figure] = field(default_factory=dict)  # rates, ratios, bytes, accuracies, by name

    @property
    def median(self) -> float:
        """Seconds of the middle call; NaN if it was not timed."""
        return self.seconds.p50 if self.seconds else math.nan


@dataclass(frozen=True)
class Case:
    """One piece of work, done by several candidates in turn."""

    settings: Mapping[str, Figure]  # asked of all of them; times at other settings are not comparable
    candidates: Mapping[str, Candidate]  # by name, in the order they are shown
    measured: Mapping[str, Figure] = field(default_factory=dict)  # of the device: rates that figures are shares of

    @property
    def medians(self) -> dict[str, float]:
        """Seconds by candidate."""
        return {name: candidate.median for name, candidate in self.candidates.items()}

    @property
    def timings(self) -> dict[str, Timing]:
        """By candidate, without those that were not timed."""
        return {name: candidate.seconds for name, candidate in self.candidates.items() if candidate.seconds}


@dataclass(frozen=True)
class Document:
    """One run of one benchmark."""

    benchmark: str  # attacks, kernels, methods (once step), discriminator or agreement
    device: str  # its model
    device_type: str  # cpu or cuda
    threads: int  # of torch
    versions: Mapping[str, str]  # of afd, Python, torch and every library beside them
    commit: str | None  # of afd's own checkout ("-dirty" with local changes)
    time: str  # when its last case was measured, ISO 8601
    repeats: int  # timed calls of each candidate
    settings: Mapping[str, Figure]  # shared by all cases
    cases: Mapping[str, Case]
    finished: bool = True  # whether these are all cases of the run, which otherwise was cut off, or goes on

    @classmethod
    def here(cls, benchmark: str, device: torch.device, repeats: int, settings: Mapping[str, Figure],
             cases: Mapping[str, Case], packages: Iterable[str] = ()) -> Document:  # fmt: skip
        """What was just measured on this machine; `packages` are the other libraries that took part."""
        where = (device_name(device), device.type, torch.get_num_threads(), versions(packages), commit(), now())
        return cls(benchmark, *where, repeats, settings, cases)

    @property
    def machine(self) -> str:
        """The device, with what its speed hangs on: a GPU by its name, a CPU with the number of its threads."""
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}"
        return self.device + threads * (self.device_type != "cuda")

    @property
    def timed(self) -> bool:
        """Whether time was the question."""
        return any(case.timings for case in self.cases.values())

    def write(self, path: Path) -> None:
        """Writes JSON, whole or not at all; folders are made."""
        write_whole(path, json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n")


def read(path: Path, benchmark: str | None = None) -> Document:
    """A document as `Document.write` left it, of this version or of the one before, and of a benchmark.

    Raises:
        DocumentError: it is missing, no such document, of another version, or of another benchmark.
    """
    check_source("compare", path)
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{path} is not JSON: {error}") from error
    kind = (found.pop("format", None), found.pop("version", None)) if isinstance(found, dict) else (None, None)
    if kind not in ((FORMAT, VERSION), (FORMAT, 1)):
        held = f"format {kind[0]!r}, version {kind[1]!r}"
        raise DocumentError(f"{path} has {held}; afd bench reads format {FORMAT!r}, version {VERSION}")
    if kind[1] == 1:  # which said round for a training step, and rounds for repeats
        found |= {"repeats": found.pop("rounds")} if "rounds" in found else {}
        found |= {"benchmark": "step"} if found.get("benchmark") == "round" else {}
    if benchmark not in (None, found.get("benchmark")):
        raise DocumentError(f"{path} is of benchmark {found.get('benchmark')!r}; it must be of {benchmark!r}")
    try:
        for case in found["cases"].values():
            for one in case["candidates"].values():
                one["seconds"] = one["seconds"] and Timing(**one["seconds"])
            case["candidates"] = {name: Candidate(**one) for name, one in case["candidates"].items()}
        return Document(**{**found, "cases": {name: Case(**case) for name, case in found["cases"].items()}})
    except (KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} is of format {FORMAT!r}, version {kind[1]}, but damaged: {error}") from error


# --- Since an earlier run --------------------------------------------------------------------------------------------


def earlier(path: Path, here: Document) -> Document:
    """The run at `path`; a DocumentError unless it is comparable with one that begins here."""
    old = read(path, here.benchmark)
    if old.machine != here.machine:
        told = f"{path} was measured on {old.machine}; this run is on {here.machine}"
        raise DocumentError(f"{told}, so they cannot be compared")
    return old


def verdict(was: Timing, now: Timing, repeats: int) -> str:
    """Slower, faster, or neither as far as the spread tells."""
    if repeats < FEWEST_REPEATS:
        return f"too few repeats to tell ({repeats})"
    return "slower" if now.p20 > was.p80 else "faster" if now.p80 < was.p20 else "within noise"


def differences(old: Document, new: Document, case: str) -> str:
    """The settings of a case that the runs do not share, in words."""
    was, now = ({**one.settings, **(one.cases[case].settings if case in one.cases else {})} for one in (old, new))
    changed = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
    return ", ".join(f"{name} was {was.get(name)}, is {now.get(name)}" for name in changed)


# --- The environment: what a figure means nothing without ------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Of afd, Python, torch, and what else was used; a package that is imported from a bare folder has none."""
    found = {"afd": __version__, "python": sys.version.split()[0], "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def now() -> str:
    """The time, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
