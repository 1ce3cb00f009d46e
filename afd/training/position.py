"""How far a run has come, and what it has cost until then: both are kept in its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from afd.deprecated import OldAttributes, with_new_keys
from afd.machine import peak_memory


@dataclass
class Position(OldAttributes):
    """How far a run has come: the epoch in progress, steps of it that are done, and steps in all.

    A method takes one step on each batch, or as many as its `repeats`; `batch` counts each of them.
    """

    epoch: int = 1
    batch: int = 0
    global_step: int = 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `dataclasses.asdict` said."""
        for name, value in with_new_keys(state).items():
            setattr(self, name, value)


@dataclass
class Spent:
    """What a run has cost: time within `Trainer.fit`, pauses between two calls or processes left out, and memory.

    What a rollback undoes was spent all the same.

    Attributes:
        seconds: of the calls of `fit` that have ended, and of those before a checkpoint that was gone on from.
        images: that steps were taken on, of all processes, each as often as it was met.
        memory: bytes that a process has held at most, as of `afd.machine.peak_memory`; of several, the leading one.
        epochs: that were closed, those that a rollback has undone included.
    """

    seconds: float = 0.0
    images: int = 0
    memory: int = 0
    epochs: int = 0
    since: float | None = None

    def begin(self) -> None:
        """A call of `fit` begins."""
        self.since = time.perf_counter()

    def end(self) -> None:
        """It ends."""
        self.seconds, self.since = self.until_now, None

    @property
    def until_now(self) -> float:
        """Seconds, those of the call of `fit` in progress included."""
        return self.seconds + (0.0 if self.since is None else time.perf_counter() - self.since)

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """What there is until now, in plain JSON."""
        self.memory = max(self.memory, peak_memory(device))
        return {"seconds": self.until_now, "images": self.images, "memory": self.memory, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Adds what was spent before a checkpoint; those of earlier days do not say."""
        self.seconds += state.get("seconds", 0.0)
        self.images += state.get("images", 0)
        self.epochs += state.get("epochs", 0)
        self.memory = max(self.memory, state.get("memory", 0))
