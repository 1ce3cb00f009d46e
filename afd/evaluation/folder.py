"""An evaluation in a folder: from a model to its report, resumable; and the bar that shows how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from afd.attacks.external import ordinary_modes
from afd.data import Images
from afd.evaluation.measure import prepare
from afd.evaluation.model import Model, domain_counter, has_features
from afd.evaluation.outcome import read_results, write_results
from afd.evaluation.plots import examples, plot_divergence, plot_examples, plot_sweeps
from afd.evaluation.protocol import Protocol
from afd.evaluation.report import report, tables_of
from afd.evaluation.runner import Runner
from afd.evaluation.store import REPORT, Output, agreed
from afd.files import FileError, FolderError, write_whole
from afd.installation import needed_by
from afd.runtime import Group

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

__all__ = ["FolderError", "ProgressBar", "domain_counter", "evaluate_to_folder"]


@ordinary_modes()
def evaluate_to_folder(
    model: Model,
    images: Images,
    protocol: Protocol,
    out: Path | str | Output,
    *,
    surrogate: Model | None = None,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 250,
    precision: str = "fp32",
    group: Group | None = None,
    overwrite: bool = False,
    keep_images: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Attacks a model as a protocol says and writes results.json, curves.png, examples.png and report.html.

    What has been computed lies in the folder's ``state`` until the end: an evaluation that was stopped goes on from
    there when it is run again, and comes to the same result. Meanwhile no other process may use the folder.

    Args:
        model: what is evaluated.
        images: what to attack.
        protocol: how.
        out: folder of the report; must be new, or hold an unfinished run of this very evaluation. Or how one is to be
            found.
        surrogate: the model that transfer stages attack.
        split: which part of the data the images are, for the report.
        seed: of all attacks.
        batch_size: images that are attacked together.
        precision: that attacks run in: "fp32", or "auto" (`afd.evaluation.confirm`).
        group: device and share of the work; by default alone, on the device of the images.
        overwrite: discard a report, or an unfinished evaluation of another kind, in a folder `out`.
        keep_images: leave every adversarial image in the folder's ``state``.
        console: where to print; by default nowhere.

    Returns:
        The content of results.json, on the leading process; None on the others.

    Raises:
        InputError, InputTypeError: a number out of range, no surrogate for a protocol that transfers, or the model
            itself as one; a radius larger than the images' range; a protocol whose attacks need more classes.
        UnusableModelError: a model does not fit the images.
        ExtraMissingError: an attack comes from a library that is not installed.
        FolderError, StateError: the folder holds something else, or another process uses it.
        FileError: a file cannot be written, as on a full disk; what was computed is kept.
        AttackFailedError: an attack raised; what was computed is kept.
    """
    console = console if console is not None and (group is None or group.leads) else Console(quiet=True)
    ready = prepare(
        model, images, protocol, surrogates=[] if surrogate is None else [surrogate], seed=seed, batch_size=batch_size,
        precision=precision, group=group,
    )  # fmt: skip
    group = ready.group
    for note in ready.protocol.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    output = out if isinstance(out, Output) else Output(Path(out), overwrite)
    wanted = ready.fingerprint()
    agreed(group, lambda: output.check(wanted))
    featured = has_features(model.network, ready.images.images(torch.arange(min(2, len(images)), device="cpu")))
    content: dict[str, Any] | None
    with _told_to_go_on(), output.held(wanted, group) as store:
        assert output.folder is not None
        if output.written:
            content = read_results(output.folder)
        else:
            with ProgressBar(console) as bar:
                runner = ready.runner(store, bar)
                content = ready.run(runner, split=split, featured=featured, kept_images=keep_images)
            if content is not None:
                write_all(output.folder, content, runner)
        group.wait()
        if group.leads:
            output.close(keep_state=keep_images)
    return content if group.leads else None


def write_all(folder: Path, content: dict[str, Any], runner: Runner) -> None:
    """Writes pictures and report, and last of all results.json, which says that they are there."""
    title, shown = examples(runner)
    plot_examples(folder / "examples.png", shown, title=title)
    plot_sweeps(folder / "curves.png", [content])
    if content["divergence"]:
        plot_divergence(folder / "divergence.png", content)
    write_whole(folder / REPORT, report(content, folder, tables_of(content)))
    write_results(folder, content)


@contextmanager
def _told_to_go_on() -> Iterator[None]:
    """Says of a file that cannot be written, as on a full disk, that nothing else is lost."""
    try:
        yield
    except FileError as error:
        raise FileError(
            f"{error}; what was computed before is kept, and the same command goes on from there when that is mended"
        ) from error


class ProgressBar:
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

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def start(self, work: float) -> None:
        """All the work there is, from here on."""
        self.total, self.done, self.told = work, 0.0, 0
        self.progress.reset(self.task, total=work)

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
