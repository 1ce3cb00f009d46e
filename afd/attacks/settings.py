"""What attacks can be told: their settings as dataclasses, checked and documented once, called by training methods."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from afd.attacks import batchnorm, inputs
from afd.attacks.ball import Norm, ball_of_norm
from afd.attacks.losses import Value, check_outputs, loss_of
from afd.deprecated import ATTACK_SETTINGS, today
from afd.errors import InputError, InputTypeError, one_of
from afd.execution import AttackExecution
from afd.ops import checks

Given = ParamSpec("Given")
Kind = TypeVar("Kind")
One = TypeVar("One")
LossName = Literal["ce", "margin", "dlr", "dlr-targeted", "kl"]
OutputsName = Literal["logits", "features"]
BatchNormMode = Literal["eval", "train", "batch", "clean"]
STEP_OF = {"eps": "alpha", "eps_l2": "alpha_l2", "eps_l1": "alpha_l1"}  # names of radii, and of the steps that go with
SIZES = (*STEP_OF, *STEP_OF.values())  # what an attack may have one of for each image, and a warm-up lets grow


class Attack(Protocol):
    """(x, y) -> x_adv, in the terms of `afd.attacks.PGD.__call__`."""

    def __call__(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """Adversarial images like x."""


AttackFactory = Callable[[nn.Module], Attack]


class Batch(Protocol):
    """What settings are called with: images x, labels y (or None), the seed of this step, and x's place in the data."""

    @property
    def x(self) -> Tensor:
        """Images [N, ...]."""

    @property
    def y(self) -> Tensor | None:
        """Labels, as in `afd.attacks.PGD.__call__`."""

    @property
    def seed(self) -> int | Tensor | None:
        """Of the attack's starts."""

    @property
    def first_sample(self) -> int:
        """Index of x's first row in the whole data set."""


@runtime_checkable
class KeepsAttacks(Protocol):
    """A model that attacks itself as settings say: it keeps the attacks that it has built from step to step."""

    def attacked(self, settings: AttackSettings, batch: Batch, target: Tensor | None, start: Tensor | None) -> Tensor:
        """Adversarial images, as of ``settings.build(...)`` called with the rest."""


@dataclass(frozen=True, kw_only=True)
class AttackSettings(ABC):
    """What every gradient attack can be told; ``PGD(model, **PGDSettings(eps=0.1))`` gives an attack all of it.

    Attributes:
        norm: of the ball: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of the image, >= 0. Either a number; or one per sample, a tensor [N]; or a
            live number, a floating-point tensor []. A live number on the images' device is read there at each call (by
            a recorded graph at each replay), so that filling it changes the attack, without a wait and without another
            recording; its value is checked once, when it is set. On another device it counts as the number that it is
            at a call.
        targeted: y is the class to reach, and the loss is descended.
        loss: that is ascended: "ce"; "margin"; or, untargeted, "dlr", "dlr-targeted" (at the likeliest other class) or
            "kl" (TRADES: from the clean prediction). Or a function (outputs, target) -> losses [N], which are summed,
            or one loss [] of the whole batch. For such a scalar the batch is never split (`chunk_size`), and no sample
            is left out early. outputs come in float32 or wider; target is what the call is given as such, or y. What
            else a function reads, a recorded graph does not see change.
        outputs: what a loss of your own is given: "logits", or "features", model.features(x) [N, D].
        bounds: lowest and highest value of an image.
        batchnorm: what BatchNorm layers normalise by during the attack: "eval", their running statistics; "train",
            those of the batch at hand, by which the running ones are updated; "batch", likewise but not updated;
            "clean", those of the clean batch. See `afd.attacks.batchnorm`. All but "eval" attack the batch as
            one, layer by layer and without CUDA graphs of the attack's own, whatever `chunk_size`, `fold_batchnorm` and
            `early_stop` say.
        precision: "fp32", "bf16" (the model runs in bfloat16, everything else in float32), or "auto" (bfloat16 where
            the device multiplies it in hardware). None: that of the training passes where a training method attacks,
            and "fp32" elsewhere.
        chunk_size: rows attacked together on a CPU; by default as many as keep the model's activations in its caches,
            and 64 to 256 where those hold fewer, or all where a forward hook of yours looks on.
        validate: check the values of what a call is given and of the model's outputs, which waits for the device before
            the first step and after the last; False is for loops that see to that themselves (a label that is no class
            is then an error of torch's, or, -100 with "ce", one that the loss leaves out).
        fold_batchnorm: let convolutions do the work of the BatchNorm behind them, which changes rounding only
            (`afd.attacks.joining`).

    Raises:
        InputTypeError: a setting of another type.
        InputError: a setting out of its range.
    """

    norm: Norm = "Linf"
    eps: float | Tensor = 8 / 255
    targeted: bool = False
    loss: LossName | Value = "ce"
    outputs: OutputsName = "logits"
    bounds: tuple[float, float] = (0.0, 1.0)
    batchnorm: BatchNormMode = "eval"
    precision: str | None = None
    chunk_size: int | None = None
    validate: bool = True
    fold_batchnorm: bool = True

    copies: ClassVar[int] = 1  # attacked images for each image, beside each other

    def __post_init__(self) -> None:
        ball_of_norm(self.norm)
        bounds = checks.split_bounds(self.bounds)
        checks.bounds(*bounds)
        one_of("batchnorm", self.batchnorm, batchnorm.MODES)
        self._set(bounds=bounds, chunk_size=self.execution.chunk_size)
        for name in self._radii():
            self._set(**{name: inputs.size(name, getattr(self, name))})
        for name in ("targeted", "validate", "fold_batchnorm"):
            self._set(**{name: inputs.truth(name, getattr(self, name))})
        check_outputs(self.outputs, self.loss)
        loss_of(self.loss, targeted=self.targeted)

    @property
    def execution(self) -> AttackExecution:
        """How the attack runs, as these settings say."""
        return AttackExecution("fp32" if self.precision is None else self.precision, chunk_size=self.chunk_size)

    def __call__(
        self, model: nn.Module, batch: Batch, *, target: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Adversarial images for a batch: made by the model itself if it `KeepsAttacks`, else by an attack built here.

        Args:
            model: classifier, images -> logits [N, classes].
            batch: has images x, labels y, seed and first_sample.
            target: as in `afd.attacks.PGD.__call__`.
            start: likewise.
        """
        if isinstance(model, KeepsAttacks):
            return model.attacked(self, batch, target, start)
        attack: Any = self.build(model)
        found: Tensor = attack(
            batch.x, batch.y, seed=batch.seed, first_sample=batch.first_sample, target=target, start=start
        )
        return found

    def build(self, model: nn.Module, **changes: Any) -> Attack:
        """The attack on a model; `changes` are settings that take the place of these."""
        return self._attack()(model, **{**self, **changes})

    def pgd(self, steps: int, seed: int = 0) -> AttackSettings:
        """PGD in the same ball, with steps of 2.5 eps / steps (Madry et al. 2018): what validation attacks with."""
        kind: Any = attack_named("pgd")
        found: AttackSettings = kind(norm=self.norm, eps=self.eps, bounds=self.bounds, steps=steps, seed=seed)
        return found

    def resolved(self) -> Self:
        """The same settings with what hangs on other settings, such as alpha, as the number that it is now."""
        return self

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by their names, as they are read from a file.

        Raises:
            InputError: this attack has no such setting.
        """
        own = sorted(field.name for field in fields(cls))
        given = today(given, ATTACK_SETTINGS, own)
        for name in given:
            if name not in own:
                raise InputError(f"the attack {cls.__name__} has no setting {name!r}; it has {', '.join(own)}")
        return dict(given)

    @property
    def balls(self) -> dict[Norm, float | Tensor]:
        """The radius in each norm in which it has a ball."""
        return {self.norm: self.eps}

    def _radii(self) -> Iterator[str]:
        """The names of the radii that it has."""
        yield "eps"

    def keys(self) -> Iterator[str]:
        """The settings' names, so that ``**settings`` gives them all."""
        return (field.name for field in fields(self))

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    @abstractmethod
    def _attack(self) -> Callable[..., Attack]:
        """The attack's class, which is made of these settings: `takes`."""

    def _set(self, **values: Any) -> None:
        """Puts checked values in the place of what was given, numbers of Python's in that of NumPy's, say."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def takes(
    settings: Callable[Given, Kind], **own: Any
) -> Callable[[Callable[[One, nn.Module, Kind], None]], Callable[Concatenate[One, nn.Module, Given], None]]:
    """Makes an attack's ``__init__(self, model, settings)`` one of ``(self, model, *, norm="Linf", eps=8 / 255, ...)``.

    Args:
        settings: the class of its settings, in which alone they are declared.
        own: defaults that take the place of the settings'.
    """
    signature = inspect.signature(settings)
    keywords = [one.replace(default=own.get(one.name, one.default)) for one in signature.parameters.values()]

    def decorated(
        init: Callable[[One, nn.Module, Kind], None],
    ) -> Callable[Concatenate[One, nn.Module, Given], None]:
        @functools.wraps(init)
        def __init__(self: One, model: nn.Module, **given: Any) -> None:  # noqa: N807
            try:
                chosen = settings(**(own | given))  # type: ignore[call-arg]
            except TypeError as error:
                for name in given:
                    if f"unexpected keyword argument '{name}'" in str(error):
                        allowed = ", ".join(signature.parameters)
                        raise InputTypeError(f"{name} is no setting of this attack; it takes {allowed}") from None
                raise
            init(self, model, chosen)

        first = list(inspect.signature(init).parameters.values())[:2]
        vars(__init__)["__signature__"] = signature.replace(parameters=[*first, *keywords], return_annotation=None)
        return __init__  # type: ignore[return-value]

    return decorated


ATTACKS: dict[str, type[AttackSettings]] = {}  # by name; `afd.attacks` registers them


def attack_named(name: str) -> type[AttackSettings]:
    """The settings of an attack by its name.

    Raises:
        InputError: unknown name.
    """
    one_of("attack", name, ATTACKS)
    return ATTACKS[name]


def step_size(alpha: float | Tensor | None, eps: float | Tensor, steps: int) -> float | Tensor:
    """alpha, or 2.5 eps / steps where there is none: enough to cross the ball, and to come back (Madry et al. 2018)."""
    if alpha is not None:
        return alpha
    if isinstance(eps, Tensor) and not eps.dim():
        eps = eps.to(torch.float64)  # rounded once, as a number is
    return 2.5 * eps / max(steps, 1)
