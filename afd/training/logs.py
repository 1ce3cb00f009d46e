"""Reports on disk: TensorBoard scalars and a JSON-lines log. Both continue after an interruption without repeating."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from afd.extras import needed_by
from afd.files import FileError, append_whole, write_whole
from afd.training.reports import Callback, EpochReport, Report


def tensorboard(folder: Path | str) -> Callback:
    """Scalars of every interval and epoch, by round; the file is begun with the first report.

    Each report is written before the callback returns, the whole of it or nothing: TensorBoard's own writer leaves that
    to a thread, which dies with a traceback of its own when the disk is full.

    Raises:
        ExtraMissingError: TensorBoard is not installed.
        FileError, FolderError: raised by the callback, which cannot write (a full disk, say).
    """
    with needed_by("the callback tensorboard"):
        from afd.training import events

    path: Path | None = None

    def write(report: Report) -> None:
        nonlocal path
        content = events.scalars(_scalars(report), report.round)
        if path is None:
            begun = Path(folder) / events.file_name()
            append_whole(begun, events.opening(report.round) + content)
            path = begun
        else:
            append_whole(path, content)

    return write


def json_lines(path: Path | str) -> Callback:
    """One JSON object a report: its fields, and "kind" ("interval" or "epoch").

    Raises (the callback):
        FileError, FolderError: the file cannot be written (a full disk, say), and is as it was; or it is no log.
    """
    file, begun = Path(path), False

    def write(report: Report) -> None:
        nonlocal begun
        if not begun:
            _forget(file, report.round)
            begun = True
        kind = "epoch" if isinstance(report, EpochReport) else "interval"
        append_whole(file, _line({"kind": kind, **dataclasses.asdict(report)}))

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
        if not isinstance(entry, dict) or not entry.keys() >= {"kind", "epoch", "round", "losses", "learning_rates"}:
            raise FileError(f"{path} is no log of a run: its line {number} is no report")
        entries.append(entry)
    return entries


def _scalars(report: Report) -> dict[str, float]:
    scalars = {f"loss/{name}": value for name, value in report.losses.items()}
    scalars |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
    if not isinstance(report, EpochReport):
        return scalars
    scalars = {f"epoch/{name}": value for name, value in scalars.items()}
    scalars |= {"validation/natural": report.natural, "speed/images_per_second": report.images_per_second}
    if report.robust is not None:
        scalars["validation/robust"] = report.robust
    return scalars


def _forget(path: Path, since: int) -> None:
    """Drops lines of the given round and later ones, and a half-written last line."""
    if path.exists():
        write_whole(path, "".join(_line(entry) for entry in logged(path) if entry["round"] < since))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
