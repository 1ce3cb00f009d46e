"""Supervised methods, told by one function from model and batch to losses: what is done once for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from afd.attacks.settings import AttackSettings
from afd.errors import InputError, InputTypeError, number, one_of
from afd.execution import Execution, Wrap, unsynchronised
from afd.methods.attacking import Attacks, check_attacks
from afd.methods.base import Batch, Method, Run, Step, parts, unwrapped
from afd.methods.inputs import as_split
from afd.methods.optimizers import (
    OPTIMIZERS,
    RATES,
    OptimizerFactory,
    check_factories,
    check_update,
    optimizer_for,
    reaching,
    take_step,
    trainable,
)
from afd.nn import Split
from afd.nn.modes import Statistics


@dataclass(frozen=True, kw_only=True)
class Optimized(Method):
    """Base of methods: how the model's weights are updated.

    Attributes:
        lr: learning rate of the model.
        momentum: of every SGD optimizer.
        weight_decay: on the model's weights.
        optimizer: of every player: "sgd", "adam" or "adamw".
        nesterov: momentum of SGD as Nesterov's.
        decay_norms: weight decay also on parameters of fewer than two dimensions (of norms, biases), and on those of a
            transformer's positions and tokens.
        layer_decay: the model's rates fall by this factor from each of its layers to the one before; None for one rate.
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
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    nesterov: bool = False
    decay_norms: bool = True
    optimizers: Mapping[str, OptimizerFactory] = field(default_factory=dict)
    label_smoothing: float = 0.0
    clip: float | None = None
    micro_batches: int = 1
    layer_decay: float | None = None

    of_optimizers: ClassVar[frozenset[str]] = frozenset({"lr", "momentum", "weight_decay"})
    players: ClassVar[tuple[str, ...]] = ("task",)  # that have an optimizer
    of_host: ClassVar[frozenset[str]] = frozenset({"label_smoothing", "clip"})  # numbers that torch reads there
    coupled: ClassVar[bool] = False  # whether the losses of a batch are more than a mean over its rows
    rates: ClassVar[Mapping[str, Mapping[str, float]]] = RATES  # that an optimizer wants where nobody names any

    def __post_init__(self) -> None:
        check_attacks(self)
        number("lr", self.lr, 1e-12)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        if self.coupled and self.micro_batches > 1:
            raise InputError(
                f"micro_batches is {self.micro_batches}, but the losses of {type(self).__name__} couple the rows of a "
                "batch, so that it cannot be passed in parts"
            )
        check_factories(self.optimizers, self.players, self.layer_decay)
        check_update(
            momentum=self.momentum,
            nesterov=self.nesterov and self.optimizer,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            clip=self.clip,
            micro_batches=self.micro_batches,
            layer_decay=self.layer_decay,
        )

    def optimizer_of(self, player: str, module: nn.Module) -> Optimizer:
        """The optimizer that the trainable parameters of a player's module are moved by."""
        return optimizer_for(self, player, module, lr=self.lr, weight_decay=self.weight_decay)

    def cross_entropy(self, logits: Tensor, y: Tensor | None) -> Tensor:
        """The mean cross-entropy [] of logits [N, K] and a batch's labels, smoothed as set."""
        if y is None:
            raise InputError("y is None; the loss needs labels")
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

    def classes_of(self, batch: Batch) -> Tensor:
        """The labels [N] of a batch whose loss is one of classes.

        Raises:
            InputError: it has none, or soft ones.
        """
        if batch.y is None or batch.y.dim() != 1:
            told = "None" if batch.y is None else f"soft labels {list(batch.y.shape)}"
            raise InputError(f"y is {told}; the loss of {type(self).__name__} is one of classes [N]")
        return batch.y


TERMS = 'it must be a dict of terms by name, such as {"task": loss}, each a tensor [] that is a mean over the rows'


class ByLosses(Method):
    """Base of methods whose steps rest on `losses`: supervised ones, and wrappers around them."""

    @property
    @abstractmethod
    def core(self) -> Supervised:
        """The innermost method, which has the settings of the update."""

    @abstractmethod
    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """The terms [] by name whose sum is differentiated, as means over the batch's rows.

        Args:
            model: gives logits, or features, in training; ``self.attack(model, batch)`` attacks it.
            batch: all of a step's, or one of its micro-batches.
        """

    @abstractmethod
    def update(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """What is done with one batch; returns the losses."""

    @abstractmethod
    def descend(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer on a batch; returns the losses."""

    def kind(self, step: SupervisedStep) -> Hashable:  # noqa: ARG002
        """Which way the next step goes, as of `Step.kind`; for most there is one."""
        return None

    def build(
        self,
        model: nn.Module | Split,
        execution: Execution = Execution(),
        wrap: Wrap = unwrapped,
    ) -> SupervisedStep:
        """A step that trains `model`."""
        return SupervisedStep(self, as_split(model), execution, wrap)


@dataclass(frozen=True, kw_only=True)
class Supervised(ByLosses, Optimized):
    """Base of methods that are told by their losses; all else is done once for all of them, by `SupervisedStep`."""

    def update(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """What is done with one batch: by default, one step of the optimizer; returns the losses."""
        return step.descend(batch)

    def descend(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer on a batch; returns the losses."""
        losses = step.gather(batch)
        step.apply()
        return losses

    @property
    def core(self) -> Supervised:
        """This method, where no wrapper is around it."""
        return self


@dataclass(frozen=True)
class Wrapper(ByLosses):
    """Base of methods around a supervised one, which attack and lose as it does: ``AWP(TRADES(beta=6))``.

    A subclass says in `descend` how one step of the optimizer is taken, by ``step.gather`` and ``step.apply``.

    Attributes:
        method: inside.
    """

    method: ByLosses

    def __post_init__(self) -> None:
        if not isinstance(self.method, ByLosses):
            told = f"{type(self).__name__} goes around a supervised method, which {type(self.method).__name__} is not"
            raise InputTypeError(told)

    @property
    def attack(self) -> Any:
        """That of the method inside."""
        return self.method.attack

    @property
    def validation_attack(self) -> Any:
        """That of the method inside."""
        return self.method.validation_attack

    @property
    def labels(self) -> bool:  # type: ignore[override]
        """Whether the method inside asks for them."""
        return self.method.labels

    @property
    def soft_labels(self) -> bool:  # type: ignore[override]
        """Whether the method inside takes them."""
        return self.method.soft_labels

    @property
    def repeats(self) -> int:
        """Those of the method inside."""
        return self.method.repeats

    def check_run(self, run: Run) -> None:
        """See `Method`; asks the method inside."""
        self.method.check_run(run)

    @property
    def ball(self) -> Any:
        """That of the method inside."""
        return self.method.ball

    @property
    def core(self) -> Supervised:
        """The innermost method, which has the settings of the update."""
        return self.method.core

    def kind(self, step: SupervisedStep) -> Hashable:
        """That of the method inside."""
        return self.method.kind(step)

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Those of the method inside."""
        return self.method.losses(model, batch)

    def update(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """What the method inside does with one batch; its steps of the optimizer are this one's."""
        return self.method.update(step, batch)

    def descend(self, step: SupervisedStep, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer on a batch, as the method inside takes it."""
        return self.method.descend(step, batch)


class TrainedModel(nn.Module):
    """The model as losses see it: training passes in the chosen precision, attacks that stay built.

    Args:
        passes: x -> (features, logits), or x, False -> (features,).
        attacks: on the same model.
    """

    def __init__(self, passes: nn.Module, attacks: Attacks) -> None:
        super().__init__()
        self.passes, self.attacks = passes, attacks

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of images [N, ...]."""
        logits: Tensor = self.passes(x)[1]
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Features [N, D] of images."""
        z: Tensor = self.passes(x, False)[0]
        return z

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one pass."""
        z, logits = self.passes(x)
        return z, logits

    def attacked(
        self, settings: AttackSettings, batch: Batch, target: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Attacked copies of a batch's images: what ``self.attack(model, batch)`` asks for."""
        return self.attacks(settings, batch, target, start)

    def eval_logits(self, batch: Batch) -> Tensor:
        """Logits [N, K] of a batch's images, of the model in evaluation mode and without a graph."""
        return self.attacks.eval_logits(batch)

    @contextmanager
    def statistics(self) -> Iterator[Statistics]:
        """What the passes inside do to BatchNorm's running statistics, to be done again without a pass."""
        with Statistics.noted(self.passes) as found:
            yield found


class Losses(nn.Module):
    """All passes of a step up to its losses as one module: what DistributedDataParallel sees is one forward."""

    def __init__(self, method: ByLosses, model: TrainedModel) -> None:
        super().__init__()
        self.method, self.model = method, model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms by name."""
        return self.method.losses(self.model, batch)


class SupervisedStep(Step):
    """One step of a supervised method: `update` by the method, out of `gather` and `apply`.

    Attributes:
        model: what the method's losses are given.
        parameters: those of the model that are trained.
    """

    def __init__(self, method: ByLosses, network: Split, execution: Execution, wrap: Wrap) -> None:
        super().__init__(method, network, execution)
        self.settings = method.core
        self.model = TrainedModel(self.settings.running(network, execution).passes(network), self.attacks)
        self.parameters = trainable(self.model.passes)
        self.optimizers = {"task": self.settings.optimizer_of("task", self.model.passes)}
        self._losses = Losses(method, self.model)
        self._wrapped = wrap(self._losses)

    def adopt(self, method: Any) -> None:
        """See `Step.adopt`."""
        self.method = self._losses.method = method
        self.settings = method.core

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """See `Step.update`."""
        self.forget()
        losses: dict[str, Tensor] = self.method.update(self, batch)
        return losses

    def descend(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimizer on a batch, as method and wrappers take it; returns the losses."""
        losses: dict[str, Tensor] = self.method.descend(self, batch)
        return losses

    def gather(self, batch: Batch) -> dict[str, Tensor]:
        """Adds the gradients of the sum of the losses to the parameters'; returns the losses by name, detached.

        Raises:
            InputError: no trainable parameter has a part in the losses.
        """
        self.attacks.again()
        if batch.x.requires_grad:
            batch.x.grad = None  # of a method that moves the images by it
        found: dict[str, Tensor] = {}
        for part in parts(batch, self.settings.micro_batches):
            with nullcontext() if part.last else unsynchronised(self._wrapped):
                terms = self._wrapped(part)
                self._check(terms)
                shares = {name: part.share * term for name, term in terms.items()}
                torch.autograd.backward(reaching(_sum(list(shares.values()))))
            for name, share in shares.items():
                found[name] = found[name] + share.detach() if name in found else share.detach()
        return found

    def _check(self, terms: Any) -> None:
        """Raises InputTypeError or InputError unless a method's losses are terms by name, tensors []."""
        told = f"the losses of {type(self.settings).__name__}"
        if not isinstance(terms, dict) or not terms:
            raise InputTypeError(
                f"{told} are {'an empty dict' if terms == {} else f'a {type(terms).__name__}'}; {TERMS}"
            )
        for name, term in terms.items():
            if not isinstance(term, Tensor):
                raise InputTypeError(f"{told} have {name!r}, which is a {type(term).__name__}; {TERMS}")
            if term.dim():
                raise InputError(f"{told} have {name!r} of shape {list(term.shape)}; {TERMS}")

    def kind(self) -> Hashable:
        """See `Step.kind`."""
        kind: Hashable = self.method.kind(self)
        return kind

    def forget(self) -> None:
        """Lets go of the gradients gathered, also of weights that an optimizer of somebody's own leaves alone."""
        for parameter in self.parameters:
            parameter.grad = None

    def apply(self) -> None:
        """One step of the optimizer on the gradients gathered, which are then gone."""
        take_step(self.optimizers["task"], self.settings.clip)
        self.forget()


def _sum(terms: list[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0])
