"""The units that an evaluation is made of: one stage, at one radius (or all), on one batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from afd.attacks import Attack
from afd.evaluation.catalogue import ATTACKS
from afd.evaluation.predictions import Predictions
from afd.evaluation.protocol import Stage
from afd.evaluation.target import shorten


@dataclass
class Batch:
    """One batch, and what this run has learned of it.

    Attributes:
        number: its number; its images are those from number * batch_size on.
        first: index of its first image.
        x: images [N, ...].
        y: labels [N].
        said: what the model says of the clean images.
        correct: whether that is right [N].
        taken: whether a cascade has broken it [N].
    """

    number: int
    first: int
    x: Tensor
    y: Tensor
    said: Predictions
    correct: Tensor
    taken: Tensor


@dataclass(frozen=True)
class Shortened:
    """An attack with what it finds pulled back into the ball of radius eps."""

    attack: Attack
    norm: str
    eps: float

    def __call__(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """See `Attack`."""
        x_adv = self.attack(x, y, seed=seed, first_sample=first_sample)
        return shorten(x_adv, x, self.norm, self.eps)


def work(stage: Stage) -> float:
    """Forwards and backwards that one unit of a stage costs an image, roughly."""
    kind = ATTACKS[stage.attack]
    return float(kind.passes(dict(stage.settings)))


def key_of(stage: Stage, positions: tuple[int, ...], batch: int) -> str:
    """The name of a unit in the store."""
    return f"{stage.name}.{'-'.join(map(str, positions))}.{batch}"


def label(stage: Stage, positions: tuple[int, ...]) -> str:
    """A unit in words."""
    return stage.name if stage.minimal else f"{stage.name} at ε = {stage.epsilons[positions[0]]}"
