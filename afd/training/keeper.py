"""A run's folder of checkpoints: the newest, the one before it, and the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from afd.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

Content = tuple[dict[str, Any], dict[str, Any]]


class Keeper:
    """Writes and finds the checkpoints of one run.

    Args:
        folder: holds ``last.pt``, ``previous.pt`` (what ``last.pt`` was before) and ``best.pt``.
        warn: told of a checkpoint that is passed over because it is damaged.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.last, self.previous, self.best = (folder / f"{name}.pt" for name in ("last", "previous", "best"))
        self.warn = warn
        self.newest: Path | None = None  # of this process: what was written or read last

    def save(self, state: dict[str, Any], metadata: dict[str, Any], *, best: bool) -> None:
        """Writes ``last.pt`` and, if it is the best so far, ``best.pt``.

        Raises:
            CheckpointError: a file cannot be written.
        """
        save_checkpoint(self.last, state, metadata, self.previous)
        self.newest = self.last
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
            raise CheckpointError(f"no checkpoint in {self.last.parent} can be read; the last failure: {failure}")
        return None
