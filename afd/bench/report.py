"""A report of results: a table, a picture of its times, and a table of what changed since an earlier run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from afd.bench.results import Document, Figure, Timing, differences, verdict
from afd.extras import needed_by, save_picture

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
