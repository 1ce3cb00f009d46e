"""The terminal: a progress bar while an epoch runs, one line when it is done."""

from __future__ import annotations

from types import TracebackType

from afd.extras import needed_by
from afd.training.reports import EpochReport, Report

with needed_by("afd.training.train"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Terminal:
    """A callback with a progress bar, to be entered as a context. There is no bar where the output is no terminal."""

    def __init__(self, console: Console, epochs: int, label: str) -> None:
        self.console, self.epochs, self.label = console, epochs, label
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task(label, total=None)

    def __enter__(self) -> Terminal:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def __call__(self, report: Report) -> None:
        """Moves the bar, or prints an epoch's line."""
        if not isinstance(report, EpochReport):
            text = f"{self.label} epoch {report.epoch}/{self.epochs}"
            self.progress.update(self.bar, completed=report.done, total=report.total, description=text)
            return
        losses = "  ".join(f"{name} {value:7.4f}" for name, value in report.losses.items())
        robust = "" if report.robust is None else f"  robust {report.robust:6.2%}"
        self.console.print(
            f"{self.label} {report.epoch:>3}/{self.epochs}  {losses}  natural {report.natural:6.2%}{robust}"
            f"  {report.images_per_second:,.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )
