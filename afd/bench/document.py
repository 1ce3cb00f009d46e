"""What every benchmark writes: one JSON document of cases, candidates and their figures, with all that they hang on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from afd.bench.place import device_name, versions
from afd.bench.timing import Timing
from afd.errors import AfdError
from afd.files import check_source, write_whole
from afd.training.settings import commit

FORMAT, VERSION = "afd-bench", 1

Figure = float | int | str | None


class DocumentError(AfdError):
    """A file is not the benchmark document that was asked for."""


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work.

    Attributes:
        seconds: a call took; None where time was not the question.
        figures: what else is known of it, by name: rates, ratios, bytes, accuracies.
    """

    seconds: Timing | None
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds of the middle call.

        Raises:
            ValueError: it was not timed.
        """
        if self.seconds is None:
            raise ValueError("a candidate that was not timed has no median")
        return self.seconds.p50


@dataclass(frozen=True)
class Case:
    """One piece of work, done by several candidates in turn.

    Attributes:
        settings: what was asked of all of them; times at other settings are not comparable.
        candidates: by name, in the order they are shown.
        measured: of the device, meanwhile: rates that the candidates' figures are shares of.
    """

    settings: Mapping[str, Figure]
    candidates: Mapping[str, Candidate]
    measured: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """One run of one benchmark.

    Attributes:
        benchmark: attacks, kernels, round, discriminator or agreement.
        device: its model.
        device_type: cpu or cuda.
        threads: of torch.
        versions: of afd, Python, torch and every library beside them.
        commit: of afd's own checkout ("-dirty" with local changes), or None.
        time: when its last case was measured, ISO 8601.
        rounds: timed calls of each candidate.
        settings: shared by all cases.
        cases: by name.
        finished: whether these are all cases of the run, which otherwise was cut off, or goes on.
    """

    benchmark: str
    device: str
    device_type: str
    threads: int
    versions: Mapping[str, str]
    commit: str | None
    time: str
    rounds: int
    settings: Mapping[str, Figure]
    cases: Mapping[str, Case]
    finished: bool = True

    @classmethod
    def here(
        cls,
        benchmark: str,
        device: torch.device,
        rounds: int,
        settings: Mapping[str, Figure],
        cases: Mapping[str, Case],
        packages: Iterable[str] = (),
    ) -> Document:
        """What was just measured on this machine; `packages` are the other libraries that took part."""
        found, threads = versions(packages), torch.get_num_threads()
        where = (device_name(device), device.type, threads, found, commit(), now())
        return cls(benchmark, *where, rounds, settings, cases)

    def holding(self, cases: Mapping[str, Case], *, finished: bool) -> Document:
        """The same run with the cases that were measured by now."""
        return replace(self, cases=dict(cases), time=now(), finished=finished)

    @property
    def machine(self) -> str:
        """The device, with what its speed hangs on."""
        return machine(self.device, self.device_type, self.threads)

    def write(self, path: Path) -> None:
        """Writes JSON, whole or not at all; folders are made.

        Raises:
            FileError, FolderError: it cannot be written.
        """
        write_whole(path, json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n")


def now() -> str:
    """ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine(device: str, device_type: str, threads: int) -> str:
    """A GPU by its name, a CPU with the number of its threads."""
    return device if device_type == "cuda" else f"{device}, {threads} thread{'s' * (threads != 1)}"


def read(path: Path, benchmark: str | None = None) -> Document:
    """A document as `Document.write` left it.

    Args:
        path: JSON file.
        benchmark: it must be of; None for any.

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
    if kind != (FORMAT, VERSION):
        held = f"format {kind[0]!r}, version {kind[1]!r}"
        raise DocumentError(f"{path} has {held}; afd bench reads format {FORMAT!r}, version {VERSION}")
    if benchmark not in (None, found.get("benchmark")):
        raise DocumentError(f"{path} is of benchmark {found.get('benchmark')!r}; it must be of {benchmark!r}")
    try:
        cases = {name: _case(**case) for name, case in found.pop("cases").items()}
        return Document(**found, cases=cases)
    except (KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} is of format {FORMAT!r}, version {VERSION}, but damaged: {error}") from error


def _case(candidates: Mapping[str, Mapping[str, Any]], **others: Any) -> Case:
    def entry(seconds: Mapping[str, float] | None, figures: Mapping[str, Figure]) -> Candidate:
        return Candidate(Timing(**seconds) if seconds else None, figures)

    return Case(candidates={name: entry(**candidate) for name, candidate in candidates.items()}, **others)
