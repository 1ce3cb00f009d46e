"""What the trainer asks of a training method: settings that build a round, and a round that takes one step."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from afd.nn import FeatureClassifier


class Round(Protocol):
    """One method at work on one model: its extra networks, its optimizers and the step itself."""

    players: dict[str, nn.Module]  # trained beside the model, saved with it
    optimizers: dict[str, Optimizer]

    def step(self, x: Tensor, y: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """Updates everything once from images [N, C, H, W], labels [N] and attacked images; returns detached losses."""


class Method(Protocol):
    """The settings of a training method."""

    uses_attack: ClassVar[bool]  # whether `step` wants attacked images (else it is given x again)

    def build(self, model: FeatureClassifier) -> Round:
        """A round that trains `model`."""
