"""What a run shows: on the terminal while it goes, and as a picture of its learning curves afterwards."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from afd.errors import InputError
from afd.files import check_path
from afd.installation import check_format, needed_by, save_picture
from afd.training.alarms import RollbackReport
from afd.training.callbacks import EpochReport, Losses, Report, logged

with needed_by("the picture of learning curves"):
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:  # a picture needs no terminal
    from rich.console import Console, RenderableType
    from rich.live import Live

FIRST, EVERY = 5.0, 60.0  # seconds without a line, in a log that is no terminal: at the beginning, and later on
PEEK = 1.0  # seconds between two looks at the losses
LATELY = 60.0  # seconds of work that its speed is measured over
BAR = 30  # columns


@dataclass
class Work:
    """One kind of work, done batch by batch and again in every epoch, and how fast it went lately.

    Attributes:
        total: batches of it; None if nobody knows.
        done: of these, in this epoch.
        seconds: that it took, all epochs together.
        marks: seconds, batches and images at moments of the last minute of it.
    """

    total: int | None = None
    done: int = 0
    seconds: float = 0.0
    batches: int = 0
    images: int = 0
    at: float = 0.0
    marks: deque[tuple[float, int, int]] = field(default_factory=lambda: deque([(0.0, 0, 0)]))

    def begin(self, done: int, total: int | None, now: float) -> None:
        """It begins, or goes on."""
        self.done, self.total, self.at = done, total, now

    def move(self, images: int, now: float) -> None:
        """One batch more is done."""
        self.seconds += now - self.at
        self.at, self.done, self.batches, self.images = now, self.done + 1, self.batches + 1, self.images + images
        if self.seconds - self.marks[-1][0] >= 1:
            self.marks.append((self.seconds, self.batches, self.images))
        while len(self.marks) > 2 and self.seconds - self.marks[1][0] > LATELY:
            self.marks.popleft()

    @property
    def speed(self) -> tuple[float, float]:
        """Batches and images a second; zeros before the first batch."""
        seconds, batches, images = self.marks[0]
        passed = self.seconds - seconds
        return ((self.batches - batches) / passed, (self.images - images) / passed) if passed > 0 else (0.0, 0.0)

    def left(self, done: int) -> float | None:
        """Seconds that it takes from batch `done` on; None where that cannot be told yet."""
        speed, _ = self.speed
        return (self.total - done) / speed if speed and self.total is not None else None


class Terminal:
    """A callback, and a `Progress`, with a bar; to be entered as a context.

    Where the output is no terminal there is a line after some seconds instead, and one whenever a minute has passed
    without any.

    Args:
        console: where to print.
        epochs: of the run.
        label: what is trained, in a few words.
        clock: seconds, from any moment on.
    """

    def __init__(
        self, console: Console, epochs: int, label: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        with needed_by("the terminal of a run"):
            from rich.live import Live

        self.console, self.epochs, self.label, self.clock = console, epochs, label, clock
        self.works: dict[str, Work] = {}  # those of an epoch, in their order
        self.begun: set[str] = set()  # of these, in this epoch
        self.name, self.work = "starting", Work()
        self.epoch: int | None = None
        self.measured = False  # whether an epoch was seen to its end
        self.peek: Losses | None = None
        self.losses: dict[str, float] = {}
        self.peeked = self.told = clock()
        self.wait = FIRST
        self.live: Live | None = None
        if console.is_terminal and not (console.is_dumb_terminal or console.quiet):
            self.live = Live(get_renderable=self._drawn, console=console, transient=True)

    def __enter__(self) -> Terminal:
        self.peeked = self.told = self.clock()
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, report: Report) -> None:
        """Keeps an interval's losses, or prints an epoch's line."""
        self.losses = report.losses
        kinds = "".join(f"  ALARM: {alarm.kind}" for alarm in getattr(report, "alarms", ()))
        if isinstance(report, RollbackReport):
            undone = f"{self.label} {report.epoch:>3}/{self.epochs}"
            self._print(f"{undone}  undone{kinds}; on from step {report.global_step} with {report.remedy}")
        if not isinstance(report, EpochReport):
            return
        self.measured = True
        robust = "" if report.robust is None else f"  robust {report.robust:6.2%}"
        self._print(
            f"{self.label} {report.epoch:>3}/{self.epochs}  {_losses(report.losses, ' 7.4f')}"
            f"  natural {report.natural:6.2%}{robust}  {report.images_per_second:,.0f} images/s{kinds}"
        )

    def began(self, work: str, epoch: int | None, done: int, total: int | None, losses: Losses | None = None) -> None:
        """See `Progress`."""
        if self.work.total is None:  # now one knows
            self.work.total = self.work.done
        if epoch != self.epoch:
            self.begun.clear()
        self.name, self.epoch, self.peek = work, epoch, losses
        self.work = self.works.setdefault(work, Work()) if epoch is not None else Work()
        self.begun.add(work)
        self.work.begin(done, self.work.total if total is None else total, self.clock())

    def moved(self, images: int) -> None:
        """See `Progress`."""
        now = self.clock()
        self.work.move(images, now)
        if self.live is not None:
            self._look(now)
        elif now - self.told >= self.wait:
            self._look(now)
            self._print("  ".join(part for part in (self._where(), self._count(), *self._details()) if part))

    def _look(self, now: float) -> None:
        """Takes the newest losses; seldom, as that waits for the device."""
        if self.peek is not None and now - self.peeked >= PEEK:
            self.losses, self.peeked = self.peek() or self.losses, now

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.told, self.wait = self.clock(), EVERY

    def _where(self) -> str:
        epoch = "" if self.epoch is None else f" {self.epoch:>3}/{self.epochs}"
        return f"{self.label}{epoch}  {self.name}"

    def _count(self) -> str:
        return "" if self.work.total is None else f"{self.work.done}/{self.work.total}"

    def _details(self) -> tuple[str, str]:
        """Losses and speed, and the time that is left."""
        _, images = self.work.speed
        speed = f"{images:,.{0 if images >= 10 else 1}f} images/s" if images else ""
        losses = _losses(self.losses, ".4f") if self.peek is not None else ""
        return "  ".join(part for part in (losses, speed) if part), self._left()

    def _left(self) -> str:
        """The time that is left, as far as it can be told."""
        left = self.work.left(self.work.done)
        if left is None:
            return ""
        left = max(left - (self.clock() - self.work.at), 0.0)
        if self.epoch is None:
            return f"left: {duration(left)}"
        works = list(self.works.items())
        left += sum(work.left(0) or 0.0 for name, work in works if name not in self.begun)
        whole = sum(work.left(0) or 0.0 for _, work in works)
        text = f"left: epoch {duration(left)}, all epochs {duration(left + (self.epochs - self.epoch) * whole)}"
        return text if self.measured else f"{text} (validation not counted yet)"

    def _drawn(self) -> RenderableType:
        """What a terminal shows; asked for by another thread."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.work.total, completed=self.work.done, width=BAR, pulse=self.work.total is None)
        line.add_row(Text(self._where(), no_wrap=True), bar, Text(self._count(), no_wrap=True))
        return Group(line, *(Text(part) for part in self._details() if part))


def duration(seconds: float) -> str:
    """As one says it: 35 s, 4 min, 2 h 05 min."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _losses(losses: dict[str, float], form: str) -> str:
    return "  ".join(f"{name} {value:{form}}" for name, value in losses.items())


# --- Learning curves ------------------------------------------------------------------------------------------------


LOG = "log.jsonl"
TASK = "task"  # the optimizer of the model
LOSSES = {TASK: "cross-entropy", "discriminator": "discriminator's loss", "features": "features' loss"}
Entries = list[dict[str, Any]]


def plot_curves(path: Path | str, runs: Mapping[str, Path | str]) -> None:
    """Writes a PNG of validation accuracies, losses and learning rate over the epochs, one colour a run.

    Crosses mark epochs with alarms, dotted lines those that were undone.

    Accuracies are those after each epoch; losses are means of the intervals between two lines of the log.

    Args:
        path: file to write.
        runs: folders that `afd train` has written, by the names to show.

    Raises:
        InputError: there is no run, a folder holds no log of a whole epoch, or the file's name ends in no format.
        FileError, FolderError: the picture cannot be written.
    """
    check_format(path, FigureCanvasBase.filetypes)
    whole = {name: read_log(folder) for name, folder in runs.items()}
    logs = {name: [entry for entry in entries if entry["kind"] != "rollback"] for name, entries in whole.items()}
    if not logs:
        raise InputError("runs is empty; there must be at least one run to draw")
    found = {name for entries in logs.values() for name in entries[0]["losses"]}
    losses = [*(name for name in LOSSES if name in found), *sorted(found - LOSSES.keys())]
    figure = Figure(figsize=(max(6.4, 2.6 * (len(losses) + 1)), 6.0), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, len(losses) + 1, height_ratios=(1.5, 1))
    wide, small = figure.add_subplot(grid[0, :]), [figure.add_subplot(grid[1, i]) for i in range(len(losses) + 1)]
    for number, (name, entries) in enumerate(logs.items()):
        _draw_accuracies(wide, _of_kind(entries, "epoch"), f"C{number}", name)
        _draw_alarms(wide, whole[name], f"C{number}")
        intervals = _of_kind(entries, "interval") or _of_kind(entries, "epoch")
        for axes, loss in zip(small, losses, strict=False):
            if loss in entries[0]["losses"]:
                _draw(axes, [(_when(entry), entry["losses"][loss]) for entry in intervals], f"C{number}", 1.2)
        rates = [(_when(entry), entry["learning_rates"][TASK]) for entry in intervals]
        _draw(small[-1], rates, f"C{number}", 1.2 + 1.5 * (len(logs) - 1 - number))  # equal rates: seen side by side
    wide.set(ylabel="accuracy (%)", title="on the validation images")
    wide.legend(fontsize=8, loc="lower right")
    for axes, title in zip(small, [*(LOSSES.get(name, name) for name in losses), "learning rate"], strict=True):
        axes.set_title(title)
        axes.tick_params(labelsize=8)
    for axes in (wide, *small):
        axes.title.set_fontsize(10)
        axes.set(xlabel="epoch", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(8 if axes is wide else 4, integer=True))
        axes.grid(alpha=0.3)
    save_picture(figure, path)


def read_log(folder: Path | str) -> Entries:
    """The lines that a run has logged.

    Raises:
        InputError: there is no log, no epoch in it, or what no run has written.
        FileError: it cannot be read, or holds something else.
    """
    path = Path(folder) / LOG
    if not path.is_file():
        raise InputError(f"there is no {LOG} in {folder}; a run's folder has one")
    entries = logged(path)
    if not all(map(_drawable, entries)):
        raise InputError(f"{path} holds lines that are no reports of a training")
    if not _of_kind(entries, "epoch"):
        raise InputError(f"{path} holds no finished epoch; there is nothing to draw yet")
    return entries


def _drawable(entry: Any) -> bool:
    """Whether a line has what is drawn of it."""
    if not (isinstance(entry, dict) and entry.get("kind") in ("interval", "epoch", "rollback")):
        return False
    if entry["kind"] == "rollback":
        return entry.keys() >= {"epoch", "alarms"}
    wanted = {"epoch", "losses", "learning_rates"} | ({"natural", "robust"} if entry["kind"] == "epoch" else set())
    figures = [entry.get(name) for name in ("losses", "learning_rates")]
    return (
        wanted <= entry.keys()
        and all(isinstance(one, dict) and one for one in figures)
        and TASK in entry["learning_rates"]
    )


def _draw_accuracies(axes: Any, epochs: Entries, colour: str, name: str) -> None:
    """Accuracies of one run, its last ones in the legend."""
    for kind, words, style in (("natural", "clean", "--"), ("robust", "under attack", "-")):
        points = [(entry["epoch"], 100 * entry[kind]) for entry in epochs if entry[kind] is not None]
        if points:
            label = f"{name}, {words}: {points[-1][1]:.1f}% at the end"
            _draw(axes, points, colour, 1.5, linestyle=style, marker="o", markersize=3.5, label=label)


def _draw_alarms(axes: Any, entries: Entries, colour: str) -> None:
    """Crosses where alarms went off, by their first kind; dotted lines where an epoch was undone."""
    named: set[str] = set()
    for entry in (entry for entry in entries if entry.get("alarms")):
        kind = entry["alarms"][0]["kind"]
        label, height = None if kind in named else kind, entry.get("robust")
        if entry["kind"] == "rollback":
            axes.axvline(entry["epoch"], color=colour, linewidth=1.0, linestyle=":", label=label and f"undone: {kind}")
        else:
            at = 100 * (entry["natural"] if height is None else height)
            axes.plot([entry["epoch"]], [at], color=colour, linestyle="", marker="X", markersize=8, label=label)
        named.add(kind)


def _draw(axes: Any, points: Sequence[tuple[float, float]], colour: str, width: float, **settings: Any) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, **settings)


def _of_kind(entries: Iterable[dict[str, Any]], kind: str) -> Entries:
    return [entry for entry in entries if entry["kind"] == kind]


def _when(entry: dict[str, Any]) -> float:
    """Epochs that were over when an entry was written."""
    return entry["epoch"] - 1 + entry["done"] / entry["total"] if "done" in entry else float(entry["epoch"])


def named(runs: Sequence[str]) -> dict[str, Path]:
    """Folders by name, of runs given as FOLDER or NAME=FOLDER.

    Raises:
        InputError: two would have one name, or one has no folder.
    """
    parts = [run.rpartition("=") for run in runs]
    for run, (*_, folder) in zip(runs, parts, strict=True):
        if not folder:
            raise InputError(f"a run is {run!r}, without a folder; write NAME=FOLDER")
        check_path("a run", folder)
    folders = {name if equals else Path(folder).resolve().name: Path(folder) for name, equals, folder in parts}
    if len(folders) < len(runs):
        raise InputError(f"runs are {', '.join(runs)}, of which two are called alike; write NAME=FOLDER")
    return folders
