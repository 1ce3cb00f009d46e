"""The settings of an update that all methods with optimizers share, and the wrapper around such methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from afd.errors import InputError, at_least, one_of
from afd.methods.attacking import check_attacks
from afd.methods.base import Method
from afd.methods.optimizers import OPTIMIZERS, OptimizerFactory, check_factories, check_update, optimizer_for


@dataclass(frozen=True, kw_only=True)
class Optimized(Method):
    """Base of methods: how the model's weights are updated.

    Attributes:
        lr: learning rate of the model.
        momentum: of every SGD optimizer.
        weight_decay: on the model's weights.
        optimizer: of every player: "sgd" or "adam".
        optimizers: the user's own instead, as {player: factory}; the model's is "task".
        label_smoothing: share of the label that is spread over all classes, as in `torch.nn.CrossEntropyLoss`.
        clip: largest norm of each optimizer's gradient; None for any.
        micro_batches: parts of the batch that are passed one by one, to save memory; updates are those of the whole
            batch (BatchNorm apart).

    Raises:
        InputError: an unknown optimizer, or a number out of range.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    optimizers: Mapping[str, OptimizerFactory] = field(default_factory=dict)
    label_smoothing: float = 0.0
    clip: float | None = None
    micro_batches: int = 1

    of_optimizers: ClassVar[frozenset[str]] = frozenset({"lr", "momentum", "weight_decay"})
    players: ClassVar[tuple[str, ...]] = ("task",)  # that have an optimizer
    rates: ClassVar[Mapping[str, Mapping[str, float]]] = {}  # that an optimizer wants where nobody names any

    def __post_init__(self) -> None:
        check_attacks(self)
        at_least("lr", self.lr, 1e-12)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_factories(self.optimizers, self.players)
        check_update(
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            clip=self.clip,
            micro_batches=self.micro_batches,
        )

    def optimizer_of(self, player: str, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer that a player's parameters are moved by."""
        return optimizer_for(
            parameters,
            self.optimizers.get(player),
            name=self.optimizer,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def cross_entropy(self, logits: Tensor, y: Tensor | None) -> Tensor:
        """The mean cross-entropy [] of logits [N, K] and a batch's labels, smoothed as set."""
        if y is None:
            raise InputError("y is None; the loss needs labels")
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
