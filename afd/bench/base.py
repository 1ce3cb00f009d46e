"""A benchmark: its options, and the way from a measurement to table, JSON, picture and comparison.

What it is at is told between timed calls, by the thread that makes them (a spinner of its own would take time from
them): on a terminal as a line that changes, in a log as a line now and then.
"""

from __future__ import annotations

import argparse
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch

from afd.bench import results
from afd.bench.results import Case, Column, Document, Figure, earlier, now
from afd.errors import InputError, count, one_of
from afd.files import check_file_target, check_path, check_writable, missing, remove_empty
from afd.graphs import guard
from afd.installation import needed_by
from afd.machine import device_name
from afd.runtime import device_named

with needed_by("a benchmark"):
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

Say = Callable[[str], None]
RESULTS = Path("benchmarks/results")
ON_TERMINAL, IN_LOG = 0.1, 10.0  # seconds from one line of progress to the next


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """The options that all benchmarks have, and what each must know."""

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]  # of the table
    labels: ClassVar[tuple[str, ...]] = ()  # options that are part of the file's name
    shared: ClassVar[tuple[str, ...]] = ()  # options that times hang on in all cases
    counts: ClassVar[tuple[str, ...]] = ()  # options that must be 1 or more
    lists: ClassVar[Mapping[str, Iterable[str]]] = {}  # options of comma-separated names, with what is allowed

    repeats: int = 9
    """Timed calls of each candidate, all candidates in turn."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path | None = None
    """JSON file; a PNG goes beside it. Default: benchmarks/results/<what>-<device>.json."""
    since: Path | None = None
    """JSON of an earlier run on this device: says what changed beyond noise."""

    @abstractmethod
    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Case]]:
        """The cases by name, each as soon as all its candidates are timed; one that comes again has more figures.

        `say` tells the user what was left out or changed.
        """

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Of all cases."""
        return {name: getattr(self, name) for name in self.shared}

    @property
    def packages(self) -> Iterable[str]:
        """Libraries beside torch whose versions matter."""
        return ()

    def check(self) -> None:
        """Raises InputError, before anything is timed or written, if an option has a value that is not allowed."""
        for name in ("repeats", *self.counts):
            if getattr(self, name) is not None:
                count(name, getattr(self, name), 1)
        for name in self.lists:
            self.listed(name)

    def listed(self, option: str, allowed: Iterable[str] = ()) -> list[Any]:
        """The names in a comma-separated option; an InputError unless they are allowed, here or in `lists`."""
        names = [name.strip() for name in getattr(self, option).split(",") if name.strip()]
        allowed = list(allowed or self.lists[option])
        if not names:
            raise InputError(f"{option} names nothing; allowed are {', '.join(allowed)}")
        for name in names:
            one_of(option, name, allowed)
        return list(dict.fromkeys(names))

    def file(self, device: torch.device) -> Path:
        """Where the figures go; an InputError if that is a folder."""
        words = (self.name, *(str(getattr(self, name)) for name in self.labels), device_name(device))
        name = " ".join(words).lower().replace("(r)", "").replace("(tm)", "")
        out = self.out or RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"
        check_path("out", out)
        if out.is_dir() or not out.name:
            raise InputError(f"out is {str(out)!r}; it must be the name of a JSON file")
        check_file_target("out", out)
        return out


def run(benchmark: Benchmark, console: Console) -> Document:
    """Measures, records, prints and compares; the file holds each case from when it was measured."""
    benchmark.check()
    device = device_named(benchmark.device)
    settings = benchmark.repeats, benchmark.settings
    document = Document.here(benchmark.name, device, *settings, {}, benchmark.packages)
    old = earlier(benchmark.since, document) if benchmark.since else None
    out = benchmark.file(device)
    with ExitStack() as stack:
        stack.callback(remove_empty, missing(out.parent))
        check_writable(out.parent)
        progress = stack.enter_context(telling(console, f"bench {benchmark.name}"))
        begin("starting")
        stack.enter_context(guard(device))
        for name, case in benchmark.measure(device, progress.say):
            document = replace(document, cases={**document.cases, name: case}, time=now(), finished=False)
            document.write(out)
        document = replace(document, finished=True)
        document.write(out)
        results.whole(console, results.table(document, benchmark.columns))
        written = [out, out.with_suffix(".png")][: 1 + document.timed]
        if document.timed:
            results.chart(written[-1], document)
        progress.say(f"written: {', '.join(map(str, written))}")
        if old:
            results.whole(console, results.comparison(old, document))
    return document


# --- Words -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reads words, and words its errors as ours."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(message)


def built(kinds: Iterable[type[Benchmark]], words: Sequence[str]) -> Benchmark:
    """The benchmark that the first word names, its options given as key=value; of two of a key, the last counts."""
    parser = Parser(prog="afd.bench")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    known = {kind.name: kind for kind in kinds}
    for name, kind in known.items():
        options, hints = benchmarks.add_parser(name, allow_abbrev=False), get_type_hints(kind)
        for option in fields(kind):
            options.add_argument(f"--{option.name}", default=option.default, **reader(hints[option.name]))
    given = vars(parser.parse_args([*words[:1], *(f"--{word.lstrip('-')}" for word in words[1:])]))
    return known[given.pop("benchmark")](**given)


def reader(hint: Any) -> dict[str, Any]:
    """How argparse reads an option of a type."""
    if type(None) in get_args(hint):
        return reader(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": integers if get_origin(hint) is tuple else hint}


def integers(text: str) -> tuple[int, ...]:
    """As in 3,32,32."""
    return tuple(map(int, text.split(",")))


# --- What is being done ----------------------------------------------------------------------------------------------


class Progress(Live):
    """Tells a console what is being done, after the benchmark's name."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.name, self.doing, self.next = name, "", 0.0

    def tell(self, text: str, always: bool = False) -> None:
        """Shows a text, unless another has just been shown."""
        if (moment := time.monotonic()) >= self.next or always:
            self.next = moment + (ON_TERMINAL if self.console.is_terminal else IN_LOG)
            line = f"{self.name}: {text}"
            if self.console.is_terminal:
                self.update(Text(line, no_wrap=True, overflow="crop"), refresh=True)
            else:
                self.say(line)

    def say(self, line: str) -> None:
        """Shows a line that stays."""
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)


_present: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def telling(console: Console, name: str) -> Iterator[Progress]:
    """For as long as the context lasts, `begin` and `detail` are shown there."""
    with Progress(console, name) as progress:
        token = _present.set(progress)
        try:
            yield progress
        finally:
            _present.reset(token)


def begin(case: str) -> None:
    """A piece of work begins, of which `detail` tells more; in a log, each is told."""
    if progress := _present.get():
        progress.doing = case
        progress.tell(case, always=True)


def detail(text: str) -> None:
    """What of it is being done."""
    if progress := _present.get():
        progress.tell(f"{progress.doing}: {text}" if progress.doing else text)
