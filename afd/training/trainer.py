"""The loop, and only the loop: attack, round, validation, and what listens to them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR

from afd.attacks import Attack, AttackFactory
from afd.attacks.inputs import check_batch
from afd.errors import AfdError, InputError, at_least
from afd.evaluation import accuracy
from afd.methods import Method
from afd.nn import FeatureClassifier

Batch = tuple[Tensor, Tensor]
BOUNDS = (0.0, 1.0)  # of an image


class Loader(Protocol):
    """Any re-iterable of (images [N, C, H, W] in [0, 1], labels [N] int64) that knows its number of batches.

    Where it has a ``set_epoch(epoch)``, that is called before each pass (samplers order and augment by it).
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one pass."""

    def __len__(self) -> int:
        """Number of batches."""


class TrainingError(AfdError):
    """Training cannot go on."""


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did.

    Attributes:
        epoch: counted from 1.
        losses: mean of each loss over the epoch.
        natural: clean accuracy on the validation images, in [0, 1].
        robust: accuracy there under the validation attack; None without one.
        images_per_second: training images over training time (attack included, validation not).
        learning_rates: of each optimizer, during the epoch.
    """

    epoch: int
    losses: dict[str, float]
    natural: float
    robust: float | None
    images_per_second: float
    learning_rates: dict[str, float]

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: robust accuracy where it was measured, else clean accuracy."""
        return self.natural if self.robust is None else self.robust


class Listener(Protocol):
    """Watches a training run. `Trainer.fit` calls both methods, in the order of its listeners."""

    def batch_done(self, epoch: int, done: int, total: int) -> None:
        """A round is over; must not wait for the device."""

    def epoch_done(self, report: EpochReport) -> None:
        """An epoch and its validation are over."""


@dataclass
class Trainer:
    """Trains a classifier with a method against an attack.

    Attributes:
        model: trained in place, on the device it is on.
        method: settings of the training method, e.g. `afd.methods.AFD()`.
        attack: the training attack, without its model, e.g. `PGD.partial(eps=0.3)`; not used by natural training.
        validation_attack: likewise; measures robust accuracy after each epoch.
        epochs: passes over the training images.
        milestones: shares of the epochs after which all learning rates fall to a tenth.
        seed: of the attacks' random starts.
        listeners: told of each batch and each epoch.
    """

    model: FeatureClassifier
    method: Method
    attack: AttackFactory | None = None
    validation_attack: AttackFactory | None = None
    epochs: int = 1
    milestones: Sequence[float] = ()
    seed: int = 0
    listeners: Sequence[Listener] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("epochs", self.epochs, 0)
        if self.method.uses_attack and self.attack is None:
            raise InputError(f"attack is None; the method {type(self.method).__name__} trains against one")
        self.round = self.method.build(self.model)
        drops = [max(1, round(share * self.epochs)) for share in self.milestones]
        self.schedulers = [MultiStepLR(optimizer, drops) for optimizer in self.round.optimizers.values()]
        self.rounds = 0

    def fit(self, train: Loader, validation: Loader) -> list[EpochReport]:
        """Runs all epochs.

        Args:
            train: training batches.
            validation: batches that choose the best epoch; never test images.

        Returns:
            One report an epoch.

        Raises:
            InputError, InputTypeError: images are not finite floats in [0, 1], labels not int64 classes of the model.
            TrainingError: a loss stopped being finite.
        """
        attack = self.attack(self.model) if self.attack and self.method.uses_attack else None
        judge = self.validation_attack(self.model) if self.validation_attack else None
        reports = []
        for epoch in range(1, self.epochs + 1):
            losses, images_per_second = self._train_epoch(epoch, train, attack)
            report = EpochReport(
                epoch,
                losses,
                natural=accuracy(self.model, validation),
                robust=None if judge is None else accuracy(self.model, validation, judge),
                images_per_second=images_per_second,
                learning_rates={name: o.param_groups[0]["lr"] for name, o in self.round.optimizers.items()},
            )
            for scheduler in self.schedulers:
                scheduler.step()
            for listener in self.listeners:
                listener.epoch_done(report)
            reports.append(report)
        return reports

    def _train_epoch(self, epoch: int, train: Loader, attack: Attack | None) -> tuple[dict[str, float], float]:
        set_epoch: Callable[[int], None] | None = getattr(train, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        self.model.train()
        sums: dict[str, Tensor] = {}
        images, start = 0, time.perf_counter()
        total = len(train)
        for done, (x, y) in enumerate(train, start=1):
            if epoch == 1:
                self._check(x, y)
            x_adv = x if attack is None else attack(x, y, seed=self.seed + self.rounds)
            for name, loss in self.round.step(x, y, x_adv).items():
                sums[name] = sums[name] + loss if name in sums else loss.clone()
            self.rounds += 1
            images += len(y)
            for listener in self.listeners:
                listener.batch_done(epoch, done, total)
        if not images:
            raise InputError("train holds no images")
        losses = {name: float(value) / total for name, value in sums.items()}
        for name, value in losses.items():
            if not math.isfinite(value):
                rates = {name: f"{o.param_groups[0]['lr']:g}" for name, o in self.round.optimizers.items()}
                raise TrainingError(f"the loss {name!r} became {value} in epoch {epoch}; learning rates were {rates}")
        return losses, images / (time.perf_counter() - start)

    def _check(self, x: Tensor, y: Tensor) -> None:
        """Looks at the values of a batch; the first epoch shows every batch once."""
        largest, classes = check_batch(x, y, BOUNDS), self.model.num_classes
        if largest >= classes:
            raise InputError(f"y holds the label {largest}; the model has classes 0 ... {classes - 1}")
