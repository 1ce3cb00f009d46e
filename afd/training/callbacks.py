"""Reports of a training run, and the callbacks that write them: TensorBoard scalars and a JSON-lines log.

Both logs continue after an interruption without repeating.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afd.deprecated import OldAttributes, with_new_keys
from afd.errors import AfdError
from afd.files import FileError, append_whole, write_whole
from afd.installation import needed_by
from afd.runtime import Group
from afd.training.alarms import Alarm, RollbackReport


class TrainingError(AfdError):
    """Training cannot go on."""


class DivergedError(TrainingError):
    """A loss, or a weight, stopped being finite."""


@dataclass(frozen=True)
class IntervalReport(OldAttributes):
    """Where training stands, once every `log_every` steps and at the end of an epoch.

    Attributes:
        epoch: counted from 1.
        global_step: steps in all.
        done: steps of this epoch: batches trained on, each as often as the method repeats it.
        total: steps of an epoch.
        losses: mean of each loss over the interval.
        learning_rates: of each optimizer, in the interval's last step.
    """

    epoch: int
    global_step: int
    done: int
    total: int
    losses: dict[str, float]
    learning_rates: dict[str, float]


@dataclass(frozen=True)
class EpochReport(OldAttributes):
    """What one epoch did.

    Attributes:
        epoch: counted from 1.
        global_step: steps in all.
        losses: mean of each loss over the epoch.
        natural: clean accuracy on the validation images, in [0, 1].
        robust: accuracy there under the validation attack; None without one.
        images_per_second: training images over training time (attack included, validation not), of all processes. An
            image counts once for each step that is taken on it: divided by the batch size, these are steps a second.
        learning_rates: of each optimizer, in the epoch's last step.
        one_step: accuracy under an attack of one step on some of the validation images; None where it is not looked at.
        alarms: what went wrong by then (`afd.training.alarms`).
    """

    epoch: int
    global_step: int
    losses: dict[str, float]
    natural: float
    robust: float | None
    images_per_second: float
    learning_rates: dict[str, float]
    one_step: float | None = None
    alarms: tuple[Alarm, ...] = ()

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: robust accuracy where it was measured, else clean accuracy."""
        return self.natural if self.robust is None else self.robust

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> EpochReport:
        """The report that a checkpoint holds as a dict."""
        alarms = tuple(Alarm(**one) for one in entry.get("alarms", ()))
        return cls(**{**with_new_keys(entry), "alarms": alarms})

    @property
    def rank(self) -> tuple[float, int]:
        """What epochs are compared by: the score, and of equals the later one."""
        return self.score, self.epoch


Report = IntervalReport | EpochReport | RollbackReport
KINDS = {IntervalReport: "interval", EpochReport: "epoch", RollbackReport: "rollback"}

Callback = Callable[[Report], None]
"""Called with every report, in one process; with one of a rollback only where those were asked for. May call
`Trainer.stop`."""

Losses = Callable[[], dict[str, float]]
"""What the losses are just now, by name; waits for the device."""


class Progress(Protocol):
    """Shows how far a run has come. It is told often, so it must be quick, and wait for the device seldom."""

    def began(self, work: str, epoch: int | None, done: int, total: int | None, losses: Losses | None = None) -> None:
        """Work begins, or goes on.

        Args:
            work: in words: "training", "validation".
            epoch: that it belongs to, counted from 1; None for work that comes once, after all epochs.
            done: batches of it that are behind already.
            total: batches of it; None if nobody knows.
            losses: of the latest steps, where there are any.
        """

    def moved(self, images: int) -> None:
        """One batch more is done, of so many images in all processes."""


class Unseen:
    """The `Progress` of a run that shows none."""

    def began(self, work: str, epoch: int | None, done: int, total: int | None, losses: Losses | None = None) -> None:
        """Shows nothing."""

    def moved(self, images: int) -> None:
        """Shows nothing."""


UNSEEN = Unseen()


# --- Losses ---------------------------------------------------------------------------------------------------------


class NotFiniteError(ArithmeticError):
    """A loss stopped being finite: its name, its value, and how many steps of the interval came before."""

    def __init__(self, name: str, value: float, steps_before: int) -> None:
        super().__init__(f"the loss {name!r} became {value}")
        self.name, self.value, self.steps_before = name, value, steps_before


@dataclass
class LossTracker:
    """Means of an epoch's losses, and its speed, over all that was trained of it, before a stop, too.

    Losses stay on the device until somebody asks: one wait for the device an interval, none a step.

    Attributes:
        group: of the processes.
        sums: of each loss over the steps that were read so far.
        steps: that were read so far.
        images: this process has trained on.
        seconds: that took.
        waiting: losses that were not read yet, step by step.
    """

    group: Group
    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes the detached losses of one step; does not look at them."""
        self.waiting.append(losses)

    def count(self, images: int, since: float) -> float:
        """Counts images, and the time since a reading of `perf_counter`; returns the reading now."""
        now = time.perf_counter()
        self.images, self.seconds = self.images + images, self.seconds + now - since
        return now

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading (none: an empty dict); waits for the device.

        Raises:
            NotFiniteError: a loss of one of these steps is not finite.
        """
        if not self.waiting:
            return {}
        names, rows = self._rows()
        self.waiting = []
        for number, row in enumerate(rows):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    raise NotFiniteError(name, value, number)
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.steps += 1
        return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}

    def _rows(self) -> tuple[list[str], list[list[float]]]:
        """The names of the losses, and what waits to be read, a row a step."""
        names = list(self.waiting[0])
        table = self.group.mean(torch.stack([torch.stack([losses[name] for name in names]) for losses in self.waiting]))
        return names, table.tolist()

    def peek(self, steps: int = 20) -> dict[str, float]:
        """Means over the last steps that were not read yet, in this process (none: an empty dict); changes nothing.

        Waits for the device, like `read`, but for no other process.
        """
        latest = self.waiting[-steps:]
        if not latest:
            return {}
        names = list(latest[0])
        table = torch.stack([torch.stack([losses[name] for name in names]) for losses in latest])
        return dict(zip(names, table.mean(0).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Means over all that was read."""
        return {name: value / self.steps for name, value in self.sums.items()}

    @property
    def speed(self) -> float:
        """Images a second of this process."""
        return self.images / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts; what waits to be read is in them, and goes on waiting here."""
        sums, steps = dict(self.sums), self.steps
        if self.waiting:
            names, rows = self._rows()
            steps += len(rows)
            for row in rows:
                sums |= {name: sums.get(name, 0.0) + value for name, value in zip(names, row, strict=True)}
        return {"sums": sums, "steps": steps, "images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` said."""
        self.waiting = []
        for name, value in with_new_keys(state).items():
            setattr(self, name, dict(value) if name == "sums" else value)


# --- Logs -----------------------------------------------------------------------------------------------------------


def tensorboard(folder: Path | str) -> Callback:
    """Scalars of every interval and epoch, by step; the file is begun with the first report.

    Each report is written before the callback returns, the whole of it or nothing: TensorBoard's own writer leaves that
    to a thread, which dies with a traceback of its own when the disk is full.

    Raises:
        ExtraMissingError: TensorBoard is not installed.
        FileError, FolderError: raised by the callback, which cannot write (a full disk, say).
    """
    file = _EventFile(Path(folder))

    def write(report: Report) -> None:
        if isinstance(report, RollbackReport):
            file.hide(report.global_step + 1)
        file.write(_scalars_of(report), report.global_step)

    return write


def json_lines(path: Path | str) -> Callback:
    """One JSON object a report: its fields, and "kind" ("interval", "epoch" or "rollback").

    A rollback takes the lines of the epochs that it undoes away, and says itself what they came to.

    Raises (the callback):
        FileError, FolderError: the file cannot be written (a full disk, say), and is as it was; or it is no log.
    """
    file, begun = Path(path), False

    def write(report: Report) -> None:
        nonlocal begun
        undone = isinstance(report, RollbackReport)
        if not begun or undone:
            _forget(file, report.global_step + undone)
            begun = True
        append_whole(file, _line({"kind": KINDS[type(report)], **dataclasses.asdict(report)}))

    return write


def logged(path: Path) -> list[dict[str, Any]]:
    """What the lines of a log say, without one that was half written when its process was killed.

    Raises:
        FileError: it cannot be read, or has a line that no run has written.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if line.startswith(b"{"):  # the process was killed while it wrote
                continue
            entry = None
        entry = with_new_keys(entry) if isinstance(entry, dict) else {}
        if not entry.keys() >= {"kind", "epoch", "global_step", "losses", "learning_rates"}:
            raise FileError(f"{path} is no log of a run: its line {number} is no report")
        entries.append(entry)
    return entries


def _scalars_of(report: Report) -> dict[str, float]:
    scalars = {f"loss/{name}": value for name, value in report.losses.items()}
    scalars |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
    if isinstance(report, IntervalReport):
        return scalars
    alarms = {f"alarm/{alarm.kind.replace(' ', '_')}": 1.0 for alarm in report.alarms}
    if isinstance(report, RollbackReport):
        return alarms | {"alarm/rollback_from_epoch": float(report.epoch)}
    scalars = {f"epoch/{name}": value for name, value in scalars.items()}
    scalars |= {"validation/natural": report.natural, "speed/images_per_second": report.images_per_second}
    measured = {"validation/robust": report.robust, "validation/one_step": report.one_step}
    return scalars | alarms | {name: value for name, value in measured.items() if value is not None}


def _forget(path: Path, since: int) -> None:
    """Drops lines of the given step and later ones, and a half-written last line."""
    if path.exists():
        write_whole(path, "".join(_line(entry) for entry in logged(path) if entry["global_step"] < since))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


class _EventFile:
    """An event file of TensorBoard's, in its own records; begun with the first scalars."""

    numbers = count()  # of the files of this process

    def __init__(self, folder: Path) -> None:
        with needed_by("the callback tensorboard"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
            from torch.utils.tensorboard.summary import scalar
        kinds: tuple[Any, ...] = (Event, SessionLog, RecordWriter, scalar)
        self._event, self._session, self._writer, self._scalar = kinds
        self.folder, self.path = folder, Path()

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Appends numbers by name, at one step."""
        content = self._records(*(self._event(step=step, summary=self._scalar(name, values[name])) for name in values))
        if self.path != Path():
            append_whole(self.path, content)
            return
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(self.numbers)}"
        append_whole(self.folder / name, self._opening(step) + content)
        self.path = self.folder / name

    def hide(self, since: int) -> None:
        """Has TensorBoard show nothing of what was written of that step and later ones."""
        if self.path != Path():
            append_whole(self.path, self._records(self._start(since)))

    def _start(self, step: int) -> Any:
        return self._event(step=step, session_log=self._session(status=self._session.START))

    def _opening(self, first: int) -> bytes:
        """What a file begins with; it hides what an interrupted run wrote of step `first` and later ones."""
        return self._records(
            self._event(file_version="brain.Event:2"),
            self._event(step=first, file_version="brain.Event:2"),
            self._start(first),
        )

    def _records(self, *events: Any) -> bytes:
        written = io.BytesIO()
        records = self._writer(written)
        for event in events:
            event.wall_time = time.time()
            records.write(event.SerializeToString())
        return written.getvalue()
