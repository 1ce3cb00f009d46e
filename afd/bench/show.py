"""A document for people: a table, and a picture of its times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from afd.bench.document import Case, Document, Figure
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
    return f"{asked}; {document.machine}, torch {document.versions['torch']}, {document.rounds} rounds"


def table(document: Document, columns: Sequence[Column]) -> Table:
    """One row a candidate under its case's name: the times it took, and the figures that `columns` name.

    A column that says nothing of anybody is left out.
    """
    everybody = [one for case in document.cases.values() for one in case.candidates.values()]
    columns = [column for column in columns if any(column.cell(one.figures.get(column.figure)) for one in everybody)]
    shown = Table("", title=title(document), title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    timed = any(one.seconds for one in everybody)
    for heading in (
        *(("p50", "p20 - p80") if timed else ()),
        *(column.heading.replace(" ", "\n") for column in columns),
    ):
        shown.add_column(heading, justify="right")
    for name, case in document.cases.items():
        shown.add_row(f"[bold]{name}")
        for candidate, found in case.candidates.items():
            taken = found.seconds
            times = (duration(taken.p50), f"{duration(taken.p20)} - {duration(taken.p80)}") if taken else ()
            shown.add_row(
                f"  {candidate}", *times, *(column.cell(found.figures.get(column.figure)) for column in columns)
            )
    return shown


def whole(console: Console, table: Table) -> None:
    """Prints a table as wide as it is: figures that are cut to the width of a terminal, or of a log, cannot be read."""
    options = console.options.update(max_width=WIDEST)
    options = options.update(width=Measurement.get(console, options, table).maximum)
    console.print(Segments(console.render(table, options)), crop=False)


def chart(path: Path, document: Document) -> None:
    """Writes a PNG: a panel for each case, a bar for each candidate's median time, a whisker from p20 to p80."""
    cases = {name: case for name, case in document.cases.items() if any(c.seconds for c in case.candidates.values())}
    across = min(COLUMNS_OF_PANELS, len(cases))
    down = math.ceil(len(cases) / across)
    bars = max(len(case.candidates) for case in cases.values())
    size = (max(7.0, 4.8 * across), down * (0.24 * bars + 0.8) + 0.5)
    figure = Drawing(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(cases) :]:
        axes.set_visible(False)
    for axes, (name, case) in zip(panels.flat, cases.items(), strict=False):
        _bars(axes, name, case)
    figure.suptitle(f"{title(document)}\nbars: medians, whiskers: p20 to p80", fontsize=9)
    save_picture(figure, path)


def _bars(axes: Axes, name: str, case: Case) -> None:
    timed = {who: found.seconds for who, found in case.candidates.items() if found.seconds and who not in UNDRAWN}
    unit, word = next(((u, w) for u, w in ((1.0, "s"), (1e-3, "ms")) if max(t.p50 for t in timed.values()) >= u),
                      (1e-6, "µs"))  # fmt: skip
    medians = [taken.p50 / unit for taken in timed.values()]
    spread = [[(t.p50 - t.p20) / unit for t in timed.values()], [(t.p80 - t.p50) / unit for t in timed.values()]]
    colors = [_color(candidate) for candidate in timed]
    axes.barh(list(timed), medians, color=colors, xerr=spread, error_kw={"ecolor": "0.2", "capsize": 2})
    for row, taken in enumerate(timed.values()):
        axes.annotate(f" {duration(taken.p50)}", (taken.p80 / unit, row), va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(taken.p80 for taken in timed.values()) / unit)
    axes.set_title(f"{name}, {word}", fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _color(candidate: str) -> str:
    if candidate in {"floor", "plain"}:
        return FLOOR
    return OURS if candidate.split()[0] in {"afd", "native"} else OTHERS
