"""The terminal: what a run is at, how fast it goes, how long it will still take, and a line for each epoch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from afd.extras import needed_by
from afd.training.reports import EpochReport, Losses, Report

with needed_by("afd.training.train"):
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

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
        if not isinstance(report, EpochReport):
            return
        self.measured = True
        robust = "" if report.robust is None else f"  robust {report.robust:6.2%}"
        self._print(
            f"{self.label} {report.epoch:>3}/{self.epochs}  {_losses(report.losses, ' 7.4f')}"
            f"  natural {report.natural:6.2%}{robust}  {report.images_per_second:,.0f} images/s"
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
