"""The folder of a run: this run's alone, never overwritten without a word, and gone again if nothing was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from afd.checkpoint import CheckpointError, CheckpointManager
from afd.config import TrainConfig
from afd.errors import InputError
from afd.files import FolderError, FolderLock, check_source, missing, new_folder, point_to, remove_empty
from afd.runtime import Group

ROOT = Path("runs")
LATEST = ROOT / "latest"
# beside checkpoints
RECORDS = ("seeds.json", "model.pt", "log.jsonl", "curves.png", "result.json", "events.out.tfevents.*")


@contextmanager
def run_folder(out: Path | None, resume: str | None, group: Group, *, overwrite: bool) -> Iterator[Path]:
    """A run's folder, this run's alone for as long as the context lasts.

    Where none is named, it is the next numbered one under ``runs``, and ``runs/latest`` leads to it; with
    ``resume="auto"`` it is the one that ``runs/latest`` leads to, if there is one. A new folder in which nothing was
    written is removed at the end.

    Args:
        out: the folder, if one is named.
        resume: what the run goes on from: "auto", a file, or None.
        group: of the processes; the leading one holds the folder, and all raise together.
        overwrite: whether another run's files there may be discarded.

    Raises:
        FolderError: it is used by another process, cannot be written to, or holds a run that is neither gone on with
            nor to be discarded.
    """
    folder = Path()
    with ExitStack() as stack:
        with group.together():
            if group.leads:
                numbered = out is None and not (resume == "auto" and LATEST.exists())
                above = missing(ROOT) if numbered else []
                stack.callback(remove_empty, above)
                folder = new_folder(ROOT) if numbered else out or _latest()
                made = [folder] if numbered else missing(folder)
                if made:
                    stack.callback(_forget_if_empty, made, _led_to())
                stack.enter_context(FolderLock(folder).held())
                if not overwrite:
                    _check_free(folder, resume)
                if numbered:
                    point_to(folder)
        yield group.gather(folder)[0]


def discard_records(folder: Path) -> None:
    """Removes what an earlier run has written beside its checkpoints."""
    for pattern in RECORDS:
        for path in folder.glob(pattern):
            path.unlink()


def check_files(config: TrainConfig) -> None:
    """Raises CheckpointError or InputError if a file to begin with is not there, or what is there would be spoilt."""
    _check_apart(config)
    resumed = Path(config.resume) if config.resume and config.resume != "auto" else None
    for argument, file in (("weights", config.weights), ("resume", resumed)):
        if file is None:
            continue
        if not file.exists():
            raise CheckpointError(f"there is no checkpoint {file}")
        check_source(argument, file)
        if file.is_dir():
            raise InputError(f"{argument} is {file}, which is a folder; name a checkpoint in it")
        if config.overwrite and config.out is not None and is_discarded(file, config.out):
            raise InputError(f"{argument} is {file}, which overwrite would discard; name another folder")


def _check_apart(config: TrainConfig) -> None:
    """Raises InputError if a run's folder would lie among the class folders of its images, as one of them."""
    kind, _, place = config.data.name.partition(":")
    if kind != "folder":
        return
    images, out = Path(place), (config.out or ROOT).absolute()
    inside = images / "train" if (images / "train").is_dir() else images
    if inside in (out, *out.parents):
        raise InputError(f"out is {config.out or ROOT}, among the class folders of {inside}; name another with --out")


def is_discarded(file: Path, folder: Path) -> bool:
    """Whether a file goes with the run in a folder, when that is discarded."""
    names = [*RECORDS, *(path.name for path in CheckpointManager(folder, print).present)]
    return file.resolve().parent == folder.resolve() and any(map(file.resolve().match, names))


def _latest() -> Path:
    return ROOT / LATEST.readlink() if LATEST.is_symlink() else LATEST


def _led_to() -> Path | None:
    return _latest() if LATEST.exists() else None


def _check_free(folder: Path, resume: str | None) -> None:
    """Raises FolderError if a run lies there and this one does not go on with it."""
    checkpoints = CheckpointManager(folder, print).present
    if resume == "auto" or (resume and checkpoints and Path(resume).resolve() == checkpoints[0].resolve()):
        return
    found = checkpoints or [path for pattern in RECORDS for path in sorted(folder.glob(pattern))]
    if found:
        raise FolderError(
            f"out is {folder}, which holds a run ({found[0].name}); go on with it by --resume auto, name another "
            "folder, or discard it by --overwrite"
        )


def _forget_if_empty(made: list[Path], before: Path | None) -> None:
    """Takes back a folder, and those above it, that nothing was written to; ``runs/latest`` leads where it led."""
    folder = made[0]
    remove_empty(made)
    if folder.exists():
        return
    if LATEST.is_symlink() and _latest() == folder:
        if before is not None:
            point_to(before)
        else:
            LATEST.unlink()
