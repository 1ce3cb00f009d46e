"""A run's folder of checkpoints: the newest, the one before it, and the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from afd.files import FolderError, FolderLock
from afd.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from afd.training.reports import EpochReport

Content = tuple[dict[str, Any], dict[str, Any]]


class Keeper:
    """Writes and finds the checkpoints of one run.

    ``last.pt`` is written first. Where it ends an epoch that is the best so far, it is written as ``best.pt``, too; a
    run that is killed between the two makes that up when it is resumed (`settle_best`).

    Args:
        folder: holds ``last.pt``, ``previous.pt`` (what ``last.pt`` was before) and ``best.pt``.
        warn: told of a checkpoint that is passed over because it is damaged.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn, self.lock = folder, warn, FolderLock(folder)
        self.last, self.previous, self.best = (folder / f"{name}.pt" for name in ("last", "previous", "best"))
        self.newest: Path | None = None  # of this process: what was written or read last
        self._written: tuple[int, int] | None = None  # which file ``last.pt`` was then

    @property
    def present(self) -> list[Path]:
        """The checkpoints that there are."""
        return [path for path in (self.last, self.previous, self.best) if path.exists()]

    def check_free(self, resume: Path | str | None, overwrite: bool) -> None:
        """Finds the folder free for a run that begins.

        Args:
            resume: what it goes on from: a checkpoint, "auto" for the newest in the folder, or None.
            overwrite: whether it may discard the checkpoints of another run.

        Raises:
            FolderError: it may not, and the folder holds checkpoints whose newest is not the one that is gone on from.
        """
        if overwrite or resume == "auto" or not self.present:
            return
        if resume is None or Path(resume).resolve() != self.present[0].resolve():
            raise FolderError(
                f"folder is {self.folder}, which holds the checkpoints of a run; go on with it by resume='auto', name "
                "another folder, or discard it with overwrite=True"
            )

    def check_untouched(self) -> None:
        """Raises FolderError if another run has written to the folder since this one did."""
        if self._written is not None and self._written != _identity(self.last):
            raise FolderError(f"another run has written to {self.folder} since this one did; name another folder")

    def discard(self) -> None:
        """Removes the checkpoints that there are."""
        for path in reversed(self.present):
            path.unlink()

    def save(self, state: dict[str, Any], metadata: dict[str, Any], *, best: bool) -> None:
        """Writes ``last.pt`` and, if it is the best so far, ``best.pt``.

        Raises:
            CheckpointError: a file cannot be written.
            FolderError: the folder has been removed, or is another run's now.
        """
        self.lock.check()
        save_checkpoint(self.last, state, metadata, self.previous)
        self.newest, self._written = self.last, _identity(self.last)
        if best:
            save_checkpoint(self.best, state, metadata)

    def load(self, path: Path, device: torch.device) -> Content:
        """What a checkpoint holds.

        Raises:
            CheckpointError: it cannot be read.
        """
        content = load_checkpoint(path, device)
        self.newest = path
        return content

    def load_newest(self, device: torch.device) -> Content | None:
        """The newest whole checkpoint, or None where there has been none.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        present = [path for path in (self.last, self.previous) if path.exists()]
        for path in present:
            try:
                return self.load(path, device)
            except CheckpointError as error:
                failure = error
                self.warn(f"{error}; trying the one before")
        if present:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; the last failure: {failure}")
        if self.best.exists():
            raise CheckpointError(f"there is no checkpoint to go on from in {self.folder}, which holds best.pt only")
        return None

    def settle_best(self, history: Sequence[EpochReport]) -> EpochReport | None:
        """Makes ``best.pt`` hold the best epoch of a run that is gone on with, and returns that epoch's report.

        Its weights are those of the file itself, of the checkpoint that is gone on from or the one before it, if that
        epoch was its last, or of the best one beside these (of a run that goes on in another folder).

        Args:
            history: of the run until the checkpoint that was read.

        Returns:
            None where there are no weights of a whole epoch.
        """
        resumed = self.newest
        if not history or resumed is None:
            return None
        wanted = max(history, key=lambda report: report.rank)
        found: dict[Path, EpochReport] = {}
        for path in dict.fromkeys((self.best, resumed, self.previous, resumed.with_name(self.best.name))):
            report = self._epoch_at_its_end(path)
            # best.pt may be ahead: of an epoch after the checkpoint, which is going to be trained once more
            if report is not None and (path == self.best or report in history):
                found[path] = report
                if report.rank >= wanted.rank:
                    break
        if not found:
            self.warn(f"the weights of epoch {wanted.epoch}, the best until now, are in none of the checkpoints")
            return None
        path = max(found, key=lambda path: found[path].rank)
        if path != self.best:
            save_checkpoint(self.best, *load_checkpoint(path))
        if found[path].rank < wanted.rank:
            self.warn(
                f"the weights of epoch {wanted.epoch}, the best until now, are in none of the checkpoints; the best of "
                f"which there are is epoch {found[path].epoch}"
            )
        return found[path]

    def _epoch_at_its_end(self, path: Path) -> EpochReport | None:
        """The report of the epoch whose end a checkpoint is; None where it is none's."""
        if not path.exists():
            return None
        try:
            _, metadata = load_checkpoint(path)
        except CheckpointError as error:
            self.warn(f"{error}; it is passed over")
            return None
        ends = metadata["history"] and metadata["position"]["batch"] == 0
        return EpochReport(**metadata["history"][-1]) if ends else None


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one that has taken its place."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
