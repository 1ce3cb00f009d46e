"""What a training method is: settings that build a step, and the step itself, which a trainer or any loop may call."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from afd.attacks import AttackSettings, PGDSettings
from afd.attacks.external import BOUNDS
from afd.attacks.inputs import copied, outside_inference
from afd.attacks.losses import LOSSES
from afd.errors import InputError, InputTypeError, fits
from afd.execution import Execution, Wrap, explained, isolated
from afd.methods.attacking import Attacks, judge_of, slice_of
from afd.methods.inputs import check_dtype, check_features, check_form, check_values, device_of
from afd.nn import Split

# what is said of a class, however it is annotated
CLASS_LEVEL = ("labels", "soft_labels", "uses_features", "of_optimizers", "of_host", "coupled", "takes_copies")
LOOKS = 3  # batches of a step of one's own whose values are looked at


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        x: images [N, ...] in [0, 1].
        y: classes [N] int64, soft labels [N, K] floating, or None.
        index: of the images in their data set, [N] int64; None if the loader has none.
        seed: of this step, for attacks; a tensor [] where a recorded step reads it.
        first_sample: index of the first row among those of all processes, so that their attacks start apart.
        steps: taken before this one; what hangs on it in Python, `kind` must tell.
        epoch: in progress, counted from 1; likewise.
    """

    x: Tensor
    y: Tensor | None = None
    index: Tensor | None = None
    seed: int | Tensor = 0
    first_sample: int = 0
    steps: int = 0
    epoch: int = 1

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Part(Batch):
    """Rows of a batch whose gradients are taken together.

    Attributes:
        rows: which they are.
        share: of the batch.
        first: whether they are its first.
        last: whether they are its last.
        x_adv: attacked copies of x, where the whole batch was attacked before; of several for each image, all.
    """

    rows: slice = field(default_factory=lambda: slice(None))
    share: float = 1.0
    first: bool = True
    last: bool = True
    x_adv: Tensor | None = None

    @property
    def classes(self) -> Tensor:
        """y of a method that asks for classes."""
        assert self.y is not None
        return self.y

    @property
    def attacked(self) -> Tensor:
        """x_adv of a method that attacks its batch beforehand."""
        assert self.x_adv is not None
        return self.x_adv


def parts(batch: Batch, count: int, x_adv: Tensor | None = None) -> Iterator[Part]:
    """The batch in at most `count` parts of nearly equal size, whose gradients add up to the batch's."""
    start = 0
    for size in _sizes(len(batch), count):
        rows = slice(start, start + size)
        x, y, index = (None if one is None else one[rows] for one in (batch.x, batch.y, batch.index))
        attacked = None if x_adv is None else x_adv[slice_of(rows, len(x_adv) // len(batch))]
        assert x is not None
        yield Part(
            x, y, index, batch.seed, batch.first_sample + start, batch.steps, batch.epoch, rows, size / len(batch),
            first=start == 0, last=rows.stop == len(batch), x_adv=attacked,
        )  # fmt: skip
        start += size


def of_each(rows: Tensor, attacked: Tensor) -> Tensor:
    """What belongs to images, [N, ...], as often as there are attacked copies of each, [N * copies, ...]."""
    return copied(rows, len(attacked) // len(rows))


def _sizes(images: int, count: int) -> list[int]:
    size = -(-images // count)
    sizes = [size] * (images // size) + [images % size] * (images % size > 0)
    if count < images and sizes[-1] == 1:  # which BatchNorm could not be shown
        count = max(1, min(count, images // 2))
        size, more = divmod(images, count)
        sizes = [size + 1] * more + [size] * (count - more)
    return sizes


@dataclass(frozen=True)
class Run:
    """How a method is going to be trained.

    Attributes:
        processes: that train together.
        recorded: whether whole steps are to be captured in CUDA graphs.
        soft: whether labels are soft, [N, K].
    """

    processes: int = 1
    recorded: bool = False
    soft: bool = False


class Method(ABC):
    """The settings of a training method: a frozen dataclass with its authors' defaults.

    Attributes:
        attack: that it trains against; None if it attacks nothing.
        validation_attack: by which robust accuracy is measured after each epoch: "pgd-20" for so many steps of PGD in
            the ball of `attack`, settings of another attack, or None to measure clean accuracy alone.
        labels: whether it asks for labels: the training batches of one that does not may be images alone.
        soft_labels: whether it takes soft labels [N, K] in the place of classes.
        uses_features: whether its losses ask for features, so that the model is looked at for where they are.
        takes_copies: whether it takes an attack that makes several images of each, as a union with "average" does.
        repeats: steps that are taken on each batch in a row; all that counts steps counts each of them.
        of_optimizers: names of the numbers that its optimizers are built with, and have by themselves from then on.
    """

    attack: Any = None
    validation_attack: Any = None
    labels: ClassVar[bool] = True
    soft_labels: ClassVar[bool] = True
    uses_features: ClassVar[bool] = False
    takes_copies: ClassVar[bool] = False
    of_optimizers: ClassVar[frozenset[str]] = frozenset()

    @property
    def repeats(self) -> int:
        """See above."""
        return 1

    def check_run(self, run: Run) -> None:
        """Finds that it can be trained so, before anything is.

        Raises:
            InputError: it cannot; the message says why.
        """
        if run.soft and not self.soft_labels:
            raise InputError(f"labels are soft, [N, K], and {type(self).__name__} asks for classes [N]")
        loss = self.attack.loss if isinstance(self.attack, AttackSettings) else None
        if run.soft and isinstance(loss, str) and LOSSES[loss].judged_by == "classes":
            raise InputError(
                f"labels are soft, [N, K], and the attack's loss {loss!r} asks for classes [N]; 'ce', 'kl' and "
                "functions take soft ones"
            )

    def running(self, network: Any, execution: Execution) -> Execution:  # noqa: ARG002
        """How its training passes run on a model, by default as the user chose.

        Raises:
            InputError: they cannot; the message says why.
        """
        return execution

    @abstractmethod
    def build(self, model: nn.Module | Split, execution: Execution = ..., wrap: Wrap = ...) -> Step:
        """A step that trains `model` in place; it needs no trainer.

        Args:
            model: any classifier that `afd.nn.split` takes, on its device; the caller sets its mode.
            execution: how its passes run.
            wrap: each trained module is handed through it, as DistributedDataParallel wants it.
        """

    def judge(self, seed: int = 0) -> Any:
        """Settings of the attack by which robust accuracy is measured, if any: `validation_attack` in full.

        Raises:
            InputError: it is a PGD in the ball of an attack that has none.
        """
        return judge_of(self.validation_attack, self.ball, seed)

    @property
    def ball(self) -> Any:
        """An attack in the ball that it trains against, if it does: its own, or a PGD where it attacks by itself."""
        own = getattr(self, "eps", None)
        if self.attack is not None or own is None:
            return self.attack
        return PGDSettings(norm=getattr(self, "norm", "Linf"), eps=own)


class Step(ABC):
    """One method at work on one model: a call takes one step on one batch.

    Attributes:
        method: its settings.
        network: the model that is trained.
        players: networks that are trained beside it and saved with it.
        optimizers: of all of them, by name; "task" moves the model.
        attacks: that it makes, built on the network.
        steps: taken so far.
        epoch: in progress, counted from 1: a trainer sets it, as may any loop.
        memory: tensors kept from batch to batch that are each process's own; a checkpoint holds those of all.
        looks: batches to come whose values are looked at, which waits for the device.
    """

    players: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]

    def __init__(self, method: Any, network: Split, execution: Execution) -> None:
        check_declared(type(method))
        self.method, self.network = method, network
        self.attacks = Attacks(network, execution.precision)
        device_of(network)  # it has one
        self.players, self.optimizers, self.steps, self.looks = {}, {}, 0, LOOKS
        self.epoch, self.memory = 1, dict[str, Tensor]()

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sample: int = 0,
        x_adv: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Updates everything once.

        Args:
            x: images [N, ...] in [0, 1], on the model's device.
            y: classes [N] int64, or what else the method takes (`Batch`).
            index: of the images in their data set, [N] int64.
            seed: of the attack's starts; by default the number of steps taken before.
            first_sample: as in `Batch`.
            x_adv: attacked copies of x, to train on instead of attacking; no matter to a method without an attack. Of
                an attack that makes several images of each, [N * copies, ...], all of an image beside each other.

        Returns:
            The losses by name, detached, on the device: reading them waits for it.

        Gradients, precision and inference mode are those of the step, whatever mode the caller is in; the mode of the
        model, training or evaluation, is the caller's.

        Raises:
            InputTypeError, InputError: an argument is not as described here (of values, the first batches are looked
                at), or the features are not those that the logits are made of.
        """
        check_form(x, y, index=index, x_adv=x_adv, copies=getattr(self.method.attack, "copies", 1))
        device = _device_now(self.network)
        if x.device != device:
            raise InputError(f"x is on {x.device}; it must be on the model's device, {device}")
        if self.looks:
            self._look(x, y, x_adv)
        batch = Batch(x, y, index, self.steps if seed is None else seed, first_sample, self.steps, self.epoch)
        self.steps += 1
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        micro_batches = getattr(getattr(self.method, "core", self.method), "micro_batches", 1)
        with isolated(x.device), explained(micro_batches), self.attacks.given(x_adv):
            return self.update(_outside_inference(batch))

    def _look(self, x: Tensor, y: Tensor | None, x_adv: Tensor | None) -> None:
        if not self.steps:
            check_dtype(self.network, x)
            if getattr(getattr(self.method, "core", self.method), "uses_features", False):
                check_features(self.network, x)
        classes = None if getattr(self.network, "settles", False) else self.network.num_classes
        check_form(x, y, classes)
        if y is not None and y.is_floating_point():
            self.method.check_run(Run(soft=True))
        check_values(x, y, classes, x_adv=x_adv, bounds=getattr(self.method.attack, "bounds", BOUNDS))
        self.looks -= 1

    @abstractmethod
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """All updates of one step, from gradients that are zero; returns the losses by name, detached."""

    def adopt(self, method: Any) -> None:
        """Goes on with other numbers of the same method; what was built of them, such as optimizers, stays."""
        self.method = method

    def live(self, name: str, value: float | Tensor) -> Tensor:
        """A tensor on the device in the place of one of the method's numbers, to be filled between steps.

        A step that is recorded in a CUDA graph follows it, without another recording.

        Args:
            name: of the number, such as ``beta``, or ``attack.eps`` of the attack's.
            value: to begin with: a number, or one per sample.

        Returns:
            [], float64, or like `value`, if that is one per sample.

        Raises:
            InputError: it is no number of the method, or one that its optimizers were built with.
        """
        held = live_number(value, self.network)
        self.adopt(_exchanged(self.method, name.split("."), held))
        return held

    def kind(self) -> Hashable:
        """Which way the next step goes: those that go the same way do the same work, whatever the batch holds."""
        return None


def check_declared(kind: type[Any]) -> None:
    """Raises InputTypeError if a method's class has settings of its own, but is no dataclass that knows them."""
    annotated = vars(kind).get("__annotations__", {})
    own = [name for name, told in annotated.items() if "ClassVar" not in str(told) and name not in CLASS_LEVEL]
    if own and "__dataclass_fields__" not in vars(kind):
        raise InputTypeError(
            f"the method {kind.__name__} declares {', '.join(own)}, but is no dataclass; write "
            "@dataclass(frozen=True, kw_only=True) above it"
        )


def live_number(value: float | Tensor, network: Any) -> Tensor:
    """A number as a tensor [] on a network's device, float64, or a tensor of one per sample like the one that it is."""
    if isinstance(value, Tensor) and value.dim():
        return value.clone()
    return torch.full((), float(value), dtype=torch.float64, device=_device_now(network))


def _device_now(network: Any) -> torch.device:
    """Where a model is, which may have been moved since its step was built."""
    device: torch.device = next(network.parameters()).device
    return device


def _exchanged(settings: Any, path: list[str], value: Tensor) -> Any:
    """A copy of settings, of a method or of its attack, in which one number is a tensor; it is not checked again."""
    name, *rest = path
    twin, inside = copy.copy(settings), vars(settings)
    if not rest and name in getattr(settings, "of_optimizers", ()):
        raise InputError(f"{name} is the optimizers' own since the step was built; set it in step.optimizers")
    if name in inside and not rest and not may_change(settings, name):
        raise InputError(f"{name} of {type(settings).__name__} is {inside[name]!r}, no number that may change")
    if name in inside:
        object.__setattr__(twin, name, _exchanged(inside[name], rest, value) if rest else value)
    elif "method" in inside:  # of a wrapper
        object.__setattr__(twin, "method", _exchanged(inside["method"], path, value))
    else:
        raise InputError(f"{type(settings).__name__} has no number {name!r}; it has {', '.join(inside)}")
    return twin


def may_change(settings: Any, name: str) -> bool:
    """Whether a number of a method, or of its attack, may be one on the device, which the host does not read."""
    hint = get_type_hints(type(settings))[name]
    if isinstance(settings, AttackSettings):
        return fits(torch.zeros(()), hint)
    return fits(0.5, hint) and name not in getattr(settings, "of_host", ())


def _outside_inference(batch: Batch) -> Batch:
    x, y, index = (None if one is None else outside_inference(one) for one in (batch.x, batch.y, batch.index))
    assert x is not None
    return replace(batch, x=x, y=y, index=index)


def unwrapped(module: nn.Module) -> nn.Module:
    """The `Wrap` of a single process: the module itself."""
    return module
