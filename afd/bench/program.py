"""What every benchmark shares: its options, and the way from a measurement to table, JSON, picture and comparison."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch

from afd.attacks.capture import guard
from afd.bench import compare, show
from afd.bench.at_work import AtWork, begin, telling
from afd.bench.document import Case, Document, Figure
from afd.bench.place import device_name, slug
from afd.bench.show import Column
from afd.errors import InputError, count, one_of
from afd.evaluation.place import device_named
from afd.extras import needed_by
from afd.files import check_file_target, check_path, check_writable, missing, remove_empty

with needed_by("a benchmark"):
    from rich.console import Console

Say = Callable[[str], None]
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """The options that all benchmarks have, and what each must know."""

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    rounds: int = 9
    """Timed calls of each candidate, all candidates in turn."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path | None = None
    """JSON file; a PNG goes beside it. Default: benchmarks/results/<what>-<device>.json."""
    compare: Path | None = None
    """JSON of an earlier run on this device: says what changed beyond noise."""

    @abstractmethod
    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """The cases by name, each as soon as all its candidates are timed; one that comes again has more figures.

        `say` tells the user what was left out or changed.
        """

    @property
    def subject(self) -> str:
        """What of the file's name comes after the benchmark's."""
        return ""

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Of all cases."""
        return {}

    @property
    def packages(self) -> Iterable[str]:
        """Libraries beside torch whose versions matter."""
        return ()

    def check(self) -> None:
        """Raises InputError, before anything is timed or written, if an option has a value that is not allowed."""
        count("rounds", self.rounds, 1)

    def file(self, device: torch.device) -> Path:
        """Where the figures go.

        Raises:
            InputError: that is a folder.
        """
        out = self.out or RESULTS / f"{slug(f'{self.name} {self.subject} {device_name(device)}')}.json"
        check_path("out", out)
        if out.is_dir() or not out.name:
            raise InputError(f"out is {str(out)!r}; it must be the name of a JSON file")
        check_file_target("out", out)
        return out

    def remarks(self, cases: Mapping[str, Case]) -> Iterable[str]:
        """Lines below the table, such as which bars are reached."""
        del cases
        return ()


def run(benchmark: Benchmark, console: Console) -> Document:
    """Measures, records, prints and compares; the file holds each case from when it was measured.

    Raises:
        InputError: an option has a value that is not allowed, or the device is not there.
        FolderError: the folder of the file cannot be used.
        DocumentError: the earlier run cannot be compared with this one.
    """
    benchmark.check()
    device = device_named(benchmark.device)
    old = compare.earlier(benchmark.compare, benchmark.name, device) if benchmark.compare else None
    out = benchmark.file(device)
    with ExitStack() as stack:
        stack.callback(remove_empty, missing(out.parent))
        check_writable(out.parent)
        told = stack.enter_context(telling(console, f"bench {benchmark.name}"))
        begin("starting")
        return _measured(benchmark, device, out, old, told)


def _measured(benchmark: Benchmark, device: torch.device, out: Path, old: Document | None, told: AtWork) -> Document:
    console = told.console

    def say(line: str) -> None:
        told.clear()
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    cases: dict[str, Case] = {}
    begun = Document.here(benchmark.name, device, benchmark.rounds, benchmark.settings, cases, benchmark.packages)
    with guard(device):
        for name, case in benchmark.measure(device, say):
            cases[name] = case
            begun.holding(cases, finished=False).write(out)
    document = begun.holding(cases, finished=True)
    document.write(out)
    told.clear()
    show.whole(console, show.table(document, benchmark.columns))
    for line in benchmark.remarks(cases):
        say(line)
    written = [out]
    if any(candidate.seconds for case in cases.values() for candidate in case.candidates.values()):
        written.append(out.with_suffix(".png"))
        show.chart(written[-1], document)
    say(f"written: {', '.join(map(str, written))}")
    if old:
        show.whole(console, compare.table(old, document))
    return document


Name = TypeVar("Name", bound=str)


def listed(option: str, text: str, allowed: Iterable[Name]) -> list[Name]:
    """The names in a comma-separated option.

    Raises:
        InputError: one is not allowed, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {str(name): name for name in allowed}
    if not names:
        raise InputError(f"{option} names nothing; allowed are {', '.join(known)}")
    for name in names:
        one_of(option, name, known)
    return [known[name] for name in dict.fromkeys(names)]


def reached(bars: Mapping[str, bool]) -> str:
    """Bars in words, each with a yes or a NO."""
    return ", ".join(f"{bar}? {'yes' if met else 'NO'}" for bar, met in bars.items())
