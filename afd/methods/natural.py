"""Natural training: cross-entropy on clean images, the paper's NT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from afd.nn import FeatureClassifier


@dataclass(frozen=True)
class Natural:
    """SGD on L_C = CE(C(F(x)), y).

    Attributes:
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    uses_attack: ClassVar[bool] = False

    def build(self, model: FeatureClassifier) -> NaturalRound:
        """A round that trains `model`."""
        return NaturalRound(model, self)


class NaturalRound:
    """One step of natural training."""

    def __init__(self, model: FeatureClassifier, settings: Natural) -> None:
        self.model = model
        self.players: dict[str, nn.Module] = {}
        self.task = SGD(model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
        self.optimizers: dict[str, Optimizer] = {"task": self.task}

    def step(self, x: Tensor, y: Tensor, x_adv: Tensor) -> dict[str, Tensor]:  # noqa: ARG002  (no attack here)
        """Updates the model from images x and labels y."""
        loss = F.cross_entropy(self.model(x), y)
        self.task.zero_grad()
        torch.autograd.backward(loss)
        self.task.step()
        return {"task": loss.detach()}
