"""The outcome of a benchmark: its JSON with the environment, its table and picture, and what changed since another."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from afd._version import __version__
from afd.errors import AfdError
from afd.files import check_source, write_whole
from afd.installation import needed_by, save_picture
from afd.machine import device_name
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
    check_source("since", path)
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


# --- Table and picture ----------------------------------------------------------------------------------------------


with needed_by("a benchmark"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.segment import Segments
    from rich.table import Table

WIDEST = 240  # of a table, in characters
COLUMNS_OF_PANELS = 3
UNDRAWN = {"reference"}  # exact, not fast: beside its bar the others could not be told apart
OURS, FLOOR, OTHERS = "tab:blue", "0.45", "0.75"  # of bars


@dataclass(frozen=True)
class Column:
    """One figure of each candidate: its heading, its name in the document, and how it is written."""

    heading: str
    figure: str
    write: Callable[[float], str] | str = "{:.2f}"

    def cell(self, value: Figure) -> str:
        """The figure as text; empty where there is none."""
        if value is None or isinstance(value, str):
            return value or ""
        return self.write.format(value) if isinstance(self.write, str) else self.write(value)


def mebibytes(value: float) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:,.0f}"


def duration(seconds: float) -> str:
    """Three digits in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def title(document: Document) -> str:
    """Benchmark, settings and machine in a line."""
    settings = ", ".join(f"{name} {value}" for name, value in document.settings.items())
    asked = f"{document.benchmark}: {settings}" if settings else document.benchmark
    return f"{asked}; {document.machine}, torch {document.versions['torch']}, {document.repeats} repeats"


def table(document: Document, columns: Sequence[Column]) -> Table:
    """One row a candidate under its case's name: the times it took, and the figures of `columns` if anybody has any."""
    everybody = [one for case in document.cases.values() for one in case.candidates.values()]
    columns = [column for column in columns if any(column.cell(one.figures.get(column.figure)) for one in everybody)]
    times = ("p50", "p20 - p80") if document.timed else ()
    shown = _empty(title(document), *times, *(column.heading.replace(" ", "\n") for column in columns))
    for name, case in document.cases.items():
        shown.add_row(f"[bold]{name}")
        for candidate, found in case.candidates.items():
            taken = found.seconds
            times = (duration(taken.p50), f"{duration(taken.p20)} - {duration(taken.p80)}") if taken else ()
            figures = (column.cell(found.figures.get(column.figure)) for column in columns)
            shown.add_row(f"  {candidate}", *times, *figures)
    return shown


def comparison(old: Document, new: Document) -> Table:
    """A row for each candidate that either run timed: its medians, their ratio, and whether it counts."""
    cut_off = "" if old.finished else ", a run that was cut off: what it had measured by then"
    shown = _empty(f"since {old.time}{cut_off}", "was", "is", "ratio", "")
    for name in dict.fromkeys([*old.cases, *new.cases]):
        shown.add_row(f"[bold]{name}")
        before, after = (run.cases[name].timings if name in run.cases else {} for run in (old, new))
        others = differences(old, new, name)
        for candidate in dict.fromkeys([*before, *after]):
            was, now = before.get(candidate), after.get(candidate)
            times = (duration(was.p50) if was else "", duration(now.p50) if now else "")
            if was and now:
                told = f"not comparable: {others}" if others else verdict(was, now, min(old.repeats, new.repeats))
                shown.add_row(f"  {candidate}", *times, f"{now.p50 / was.p50:.2f}", told)
            else:
                shown.add_row(f"  {candidate}", *times, "", "only now" if now else "only then")
    return shown


def _empty(title: str, *headings: str) -> Table:
    shown = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in headings:
        shown.add_column(heading, justify="right")
    return shown


def whole(console: Console, table: Table) -> None:
    """Prints a table as wide as it is: figures that are cut to the width of a terminal, or of a log, cannot be read."""
    options = console.options.update(max_width=WIDEST)
    options = options.update(width=Measurement.get(console, options, table).maximum)
    console.print(Segments(console.render(table, options)), crop=False)


def chart(path: Path, document: Document) -> None:
    """Writes a PNG: a panel for each case, a bar for each candidate's median time, a whisker from p20 to p80."""
    cases = {name: case.timings for name, case in document.cases.items() if case.timings}
    across = min(COLUMNS_OF_PANELS, len(cases))
    down = math.ceil(len(cases) / across)
    size = (max(7.0, 4.8 * across), down * (0.24 * max(map(len, cases.values())) + 0.8) + 0.5)
    figure = Drawing(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(cases) :]:
        axes.set_visible(False)
    for axes, (name, timings) in zip(panels.flat, cases.items(), strict=False):
        _bars(axes, name, {who: taken for who, taken in timings.items() if who not in UNDRAWN})
    figure.suptitle(f"{title(document)}\nbars: medians, whiskers: p20 to p80", fontsize=9)
    save_picture(figure, path)


def _bars(axes: Axes, name: str, timings: Mapping[str, Timing]) -> None:
    spread = [[one.p50 - one.p20 for one in timings.values()], [one.p80 - one.p50 for one in timings.values()]]
    colors = [FLOOR if who in {"floor", "plain"} else OURS if who.split()[0] in {"afd", "native"} else OTHERS
              for who in timings]  # fmt: skip
    medians, whiskers = [one.p50 for one in timings.values()], {"ecolor": "0.2", "capsize": 2}
    bars = axes.barh(list(timings), medians, color=colors, xerr=spread, error_kw=whiskers)
    axes.bar_label(bars, [duration(median) for median in medians], padding=3, fontsize=7)
    axes.set_title(name, fontsize=9, loc="left")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(one.p80 for one in timings.values()))
    axes.set_xticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
