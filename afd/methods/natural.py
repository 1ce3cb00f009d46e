"""Natural training: cross-entropy on clean images, the paper's NT."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from afd.attacks.inputs import outside_inference
from afd.errors import at_least, one_of
from afd.methods.base import parts, unwrapped
from afd.methods.execution import Execution, Wrap, explained, isolated, unsynchronised
from afd.methods.optimizers import (
    OPTIMIZERS,
    OptimizerFactory,
    check_factories,
    check_update,
    optimizer_for,
    reaching,
    take_step,
    trainable,
)
from afd.nn import Split


@dataclass(frozen=True)
class Natural:
    """SGD on L_C = CE(C(F(x)), y).

    Attributes:
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of the optimizer.
        optimizer: "sgd" or "adam".
        optimizers: the user's own, as {"task": factory}.
        label_smoothing: as in `torch.nn.CrossEntropyLoss`.
        clip: largest norm of the gradient; None for any.
        micro_batches: parts of the batch that are passed one by one, to save memory.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    optimizers: Mapping[str, OptimizerFactory] = field(default_factory=dict)
    label_smoothing: float = 0.0
    clip: float | None = None
    micro_batches: int = 1
    uses_attack: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least("lr", self.lr, 1e-12)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_factories(self.optimizers, ["task"])
        check_update(
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            clip=self.clip,
            micro_batches=self.micro_batches,
        )

    def build(self, model: Split, execution: Execution = Execution(), wrap: Wrap = unwrapped) -> NaturalRound:  # noqa: B008  (frozen)
        """A round that trains `model`."""
        return NaturalRound(wrap(execution.passes(model)), self)


class NaturalRound:
    """One step of natural training."""

    def __init__(self, passes: nn.Module, settings: Natural) -> None:
        self.passes, self.settings = passes, settings
        self.players: dict[str, nn.Module] = {}
        self.rounds = 0
        self.task = optimizer_for(
            trainable(passes),
            settings.optimizers.get("task"),
            name=settings.optimizer,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.optimizers: dict[str, Optimizer] = {"task": self.task}

    def course(self) -> None:
        """All steps go the same way."""

    def step(self, x: Tensor, y: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """Updates the model from images x and labels y."""
        self.rounds += 1
        self.task.zero_grad()
        losses = []
        with isolated(x.device), explained(self.settings.micro_batches):
            x, y, x_adv = (outside_inference(tensor) for tensor in (x, y, x_adv))
            for part in parts(x, y, x_adv, self.settings.micro_batches):
                with nullcontext() if part.last else unsynchronised(self.passes):
                    _, logits = self.passes(part.x)
                    loss = part.share * F.cross_entropy(logits, part.y, label_smoothing=self.settings.label_smoothing)
                    torch.autograd.backward(reaching(loss))
                losses.append(loss.detach())
            take_step(self.task, self.settings.clip)
            return {"task": sum(losses[1:], losses[0])}
