"""Reports on disk: TensorBoard scalars and a JSON-lines log. Both continue after an interruption without repeating."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from afd.extras import needed_by
from afd.files import make_folder, write_whole
from afd.training.reports import Callback, EpochReport, Report


def tensorboard(folder: Path | str) -> Callback:
    """Scalars of every interval and epoch, by round; the file is begun with the first report.

    Raises:
        ExtraMissingError: TensorBoard is not installed.
    """
    with needed_by("the callback tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def write(report: Report) -> None:
        nonlocal writer
        # what an interrupted run wrote beyond its checkpoint is hidden by what is written now
        writer = writer or SummaryWriter(str(folder), purge_step=report.round)
        for name, value in _scalars(report).items():
            writer.add_scalar(name, value, report.round)
        writer.flush()

    return write


def json_lines(path: Path | str) -> Callback:
    """One JSON object a report: its fields, and "kind" ("interval" or "epoch")."""
    path, begun = Path(path), False

    def write(report: Report) -> None:
        nonlocal begun
        if not begun:
            make_folder(path.parent)
            _forget(path, report.round)
            begun = True
        kind = "epoch" if isinstance(report, EpochReport) else "interval"
        with path.open("a") as file:
            file.write(json.dumps({"kind": kind, **dataclasses.asdict(report)}) + "\n")

    return write


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
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # the process was killed while it wrote
            continue
        if entry["round"] < since:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))
