"""Who listens to a training run: the terminal, TensorBoard, and the keeper of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from afd.training.trainer import EpochReport


class Terminal:
    """A progress bar while an epoch runs, one line when it is done. Quiet bars where the output is not a terminal."""

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

    def batch_done(self, epoch: int, done: int, total: int) -> None:
        """Moves the bar."""
        text = f"{self.label} epoch {epoch}/{self.epochs}"
        self.progress.update(self.bar, completed=done, total=total, description=text)

    def epoch_done(self, report: EpochReport) -> None:
        """Prints the epoch's line."""
        losses = "  ".join(f"{name} {value:7.4f}" for name, value in report.losses.items())
        robust = "" if report.robust is None else f"  robust {report.robust:6.2%}"
        self.console.print(
            f"{self.label} {report.epoch:>3}/{self.epochs}  {losses}  natural {report.natural:6.2%}{robust}"
            f"  {report.images_per_second:,.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )


class TensorBoard:
    """Scalars of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.writer = SummaryWriter(str(folder))

    def batch_done(self, epoch: int, done: int, total: int) -> None:
        """Nothing: one point an epoch is enough to see a curve."""

    def epoch_done(self, report: EpochReport) -> None:
        """Writes losses, accuracies, speed and learning rates."""
        scalars = {f"loss/{name}": value for name, value in report.losses.items()}
        scalars |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
        scalars |= {"validation/natural": report.natural, "speed/images_per_second": report.images_per_second}
        if report.robust is not None:
            scalars["validation/robust"] = report.robust
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, report.epoch)
        self.writer.flush()


class Keeper:
    """Saves ``last.pt`` after each epoch, and ``best.pt`` after each that has the best validation score so far."""

    def __init__(self, folder: Path, save: Callable[[Path, EpochReport], Any]) -> None:
        self.folder, self.save = folder, save
        self.best: EpochReport | None = None

    def batch_done(self, epoch: int, done: int, total: int) -> None:
        """Nothing: checkpoints are made between epochs."""

    def epoch_done(self, report: EpochReport) -> None:
        """Saves."""
        self.save(self.folder / "last.pt", report)
        if self.best is None or report.score > self.best.score:
            self.best = report
            self.save(self.folder / "best.pt", report)
