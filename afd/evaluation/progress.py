"""How far an evaluation has come, and how long it will still take."""

from __future__ import annotations

from types import TracebackType

from afd.extras import needed_by

with needed_by("the report of an evaluation"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )


class Bar:
    """A progress bar on a terminal; where the output is none, a line for every tenth of the work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total, self.done, self.told = 0.0, 0.0, 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=3600,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def start(self, work: float) -> None:
        """All the work there is."""
        self.total = work
        self.progress.update(self.task, total=work)

    def moved(self, work: float, text: str) -> None:
        """Some of it is done."""
        self.done += work
        self.progress.update(self.task, completed=self.done, description=text)
        tenth = int(10 * self.done / max(self.total, 1e-12) + 1e-9)
        if tenth > self.told and not self.console.is_terminal:
            self.told = tenth
            left = self.progress.tasks[0].time_remaining
            text = f"{10 * tenth:3d}% ({text})" + ("" if left is None or tenth == 10 else f", about {left:.0f} s left")
            self.console.print(text, highlight=False, soft_wrap=True)
