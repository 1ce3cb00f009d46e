"""Learning curves as a PNG, drawn from what runs have logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afd.errors import InputError
from afd.extras import check_format, needed_by, save_picture
from afd.files import check_path
from afd.training.logs import logged

with needed_by("the picture of learning curves"):
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

LOG = "log.jsonl"
TASK = "task"  # the optimizer of the model
LOSSES = {TASK: "cross-entropy", "discriminator": "discriminator's loss", "features": "features' loss"}
Entries = list[dict[str, Any]]


def plot_curves(path: Path | str, runs: Mapping[str, Path | str]) -> None:
    """Writes a PNG of validation accuracies, losses and learning rate over the epochs, one colour a run.

    Accuracies are those after each epoch; losses are means of the intervals between two lines of the log.

    Args:
        path: file to write.
        runs: folders that `afd train` has written, by the names to show.

    Raises:
        InputError: there is no run, a folder holds no log of a whole epoch, or the file's name ends in no format.
        FileError, FolderError: the picture cannot be written.
    """
    check_format(path, FigureCanvasBase.filetypes)
    logs = {name: read_log(folder) for name, folder in runs.items()}
    if not logs:
        raise InputError("runs is empty; there must be at least one run to draw")
    found = {name for entries in logs.values() for name in entries[0]["losses"]}
    losses = [*(name for name in LOSSES if name in found), *sorted(found - LOSSES.keys())]
    figure = Figure(figsize=(max(6.4, 2.6 * (len(losses) + 1)), 6.0), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, len(losses) + 1, height_ratios=(1.5, 1))
    wide, small = figure.add_subplot(grid[0, :]), [figure.add_subplot(grid[1, i]) for i in range(len(losses) + 1)]
    for number, (name, entries) in enumerate(logs.items()):
        _draw_accuracies(wide, _of_kind(entries, "epoch"), f"C{number}", name)
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
    if not (isinstance(entry, dict) and entry.get("kind") in ("interval", "epoch")):
        return False
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


def _draw(axes: Any, points: Sequence[tuple[float, float]], colour: str, width: float, **settings: Any) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, **settings)


def _of_kind(entries: Iterable[dict[str, Any]], kind: str) -> Entries:
    return [entry for entry in entries if entry["kind"] == kind]


def _when(entry: dict[str, Any]) -> float:
    """Epochs played when an entry was written."""
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
