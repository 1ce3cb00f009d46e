"""Attacks without a model: their settings as dataclasses, checked, documented once, and called by training methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from afd.attacks import batchnorm, execution, inputs, starts
from afd.attacks.losses import Value, check_outputs, loss_of
from afd.errors import InputError, one_of
from afd.ops import checks
from afd.ops import settings as op_settings

if TYPE_CHECKING:
    from afd.attacks.base import GradientAttack


Norm = Literal["Linf", "L2", "L1"]
LossName = Literal["ce", "margin", "dlr", "dlr-targeted", "kl"]
OutputsName = Literal["logits", "features"]
BatchNormMode = Literal["eval", "train", "batch", "clean"]
Init = Literal["uniform", "gaussian", "coin-flip"]


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
            or one loss [] of the whole batch. For such a scalar the batch is never split (`piece`), and no sample is
            left out early. outputs come in float32 or wider; target is what the call is given as such, or y. What else
            a function reads, a recorded graph does not see change.
        outputs: what a loss of your own is given: "logits", or "features", model.features(x) [N, D].
        bounds: lowest and highest value of an image.
        batchnorm: what BatchNorm layers normalise by during the attack: "eval", their running statistics; "train",
            those of the batch at hand, by which the running ones are updated; "batch", likewise but not updated;
            "clean", those of the clean batch. See `afd.attacks.batchnorm`. All but "eval" attack the batch in one
            piece, layer by layer and without CUDA graphs of the attack's own, whatever `piece`, `fold` and
            `early_stop` say.
        precision: "fp32", "bf16" (the model runs in bfloat16, everything else in float32), or "auto" (bfloat16 where
            the device multiplies it in hardware). None: that of the training passes where a training method attacks,
            and "fp32" elsewhere.
        piece: rows attacked together on a CPU; by default as many as keep the model's activations in its caches, or
            all where a forward hook of yours looks on.
        look: check the values of what a call is given and of the model's outputs, which waits for the device before the
            first step and after the last; False is for loops that see to that themselves (a label that is no class is
            then an error of torch's, or, -100 with "ce", one that the loss leaves out).
        fold: let convolutions do the work of the BatchNorm behind them, which changes rounding only
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
    piece: int | None = None
    look: bool = True
    fold: bool = True

    def __post_init__(self) -> None:
        checks.norm(self.norm)
        bounds = op_settings.box(self.bounds)
        checks.bounds(*bounds)
        one_of("batchnorm", self.batchnorm, batchnorm.MODES)
        self._settle(bounds=bounds, piece=execution.check_execution(self.precision, self.piece))
        self._settle(eps=inputs.size("eps", self.eps))
        for name in ("targeted", "look", "fold"):
            self._settle(**{name: inputs.truth(name, getattr(self, name))})
        check_outputs(self.outputs, self.loss)
        loss_of(self.loss, targeted=self.targeted)

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
        attack = self.build(model)
        return attack(
            batch.x, batch.y, seed=batch.seed, first_sample=batch.first_sample, target=target, start=start
        )  # fmt: skip

    def build(self, model: nn.Module, **changes: Any) -> GradientAttack:
        """The attack on a model; `changes` are settings that take the place of these."""
        attack: GradientAttack = self._kind()(model, **{**self, **changes})
        return attack

    def pgd(self, steps: int, seed: int = 0) -> PGDSettings:
        """PGD in the same ball, with steps of 2.5 eps / steps (Madry et al. 2018): what validation attacks with."""
        return PGDSettings(norm=self.norm, eps=self.eps, bounds=self.bounds, steps=steps, seed=seed)

    def resolved(self) -> Self:
        """The same settings with what hangs on other settings, such as alpha, as the number that it is now."""
        return self

    def keys(self) -> Iterator[str]:
        """The settings' names, so that ``**settings`` gives them all."""
        return (field.name for field in fields(self))

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    @abstractmethod
    def _kind(self) -> Any:
        """The attack's class, which is imported when it is asked for: it is made of these settings."""

    def _settle(self, **values: Any) -> None:
        """Puts checked values in the place of what was given, numbers of Python's in that of NumPy's, say."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class PGDSettings(AttackSettings):
    """What `afd.attacks.PGD` can be told, beside `AttackSettings`.

    Attributes:
        alpha: step size, in units of the image; None is 2.5 * eps / max(steps, 1). Of the same kinds as eps.
        steps: number of steps, >= 0.
        random_start: start at a random point instead of at x. A call may be given its start.
        init: the random point: "uniform" in the ball; "gaussian", x + start_scale * N(0, 1), not projected before the
            first step (the released code of TRADES and MART); or "coin-flip", each element of x moved by start_scale up
            or down, projected (GAT). Drawn from seed, sample and element, so that it is equal for any split of the
            batch.
        start_scale: of a start that is not uniform, in units of the image, >= 0; None is 0.001 for "gaussian", eps for
            "coin-flip".
        seed: of the random start; the same seed gives the same result.
    """

    alpha: float | Tensor | None = None
    steps: int = 10
    random_start: bool = True
    init: Init = "uniform"
    start_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_steps(self)
        random_start = inputs.truth("random_start", self.random_start)
        scale = starts.check_start(self.init, self.start_scale, random_start)
        self._settle(random_start=random_start, start_scale=scale, seed=inputs.counter("seed", self.seed))

    def resolved(self) -> Self:
        """See `AttackSettings`."""
        return replace(self, alpha=step_size(self.alpha, self.eps, self.steps))

    def _kind(self) -> Any:
        from afd.attacks.pgd import PGD

        return PGD


@dataclass(frozen=True, kw_only=True)
class FGSMSettings(AttackSettings):
    """What `afd.attacks.FGSM` can be told: `AttackSettings`, eps being the length of the step."""

    def _kind(self) -> Any:
        from afd.attacks.fgsm import FGSM

        return FGSM


@dataclass(frozen=True, kw_only=True)
class MIMSettings(AttackSettings):
    """What `afd.attacks.MIM` can be told, beside `AttackSettings`.

    Attributes:
        alpha: step size, as in `PGDSettings`.
        steps: number of steps, >= 0.
        decay: μ, of the gathered gradient, >= 0.
    """

    alpha: float | Tensor | None = None
    steps: int = 10
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_steps(self)
        self._settle(decay=inputs.number("decay", self.decay, 0.0))

    def resolved(self) -> Self:
        """See `AttackSettings`."""
        return replace(self, alpha=step_size(self.alpha, self.eps, self.steps))

    def _kind(self) -> Any:
        from afd.attacks.mim import MIM

        return MIM


@dataclass(frozen=True, kw_only=True)
class APGDSettings(AttackSettings):
    """What `afd.attacks.APGD` can be told, beside `AttackSettings`.

    With loss "dlr-targeted" (APGD-T) each restart runs once for every target class.

    Attributes:
        steps: number of steps, >= 0.
        n_restarts: number of runs, >= 1, each from its own random start (the first from the call's, if it has one).
        rho: share of steps in which the loss must rise, or the step is halved; in [0, 1]; no matter in L1.
        eot_iter: evaluations of the model that are averaged at each point, >= 1; for models that draw at random.
        n_target_classes: the likeliest other classes that "dlr-targeted" aims at, one after the other.
        early_stop: stop working on a sample once the model is fooled, or at once if it is wrong at x. The same samples
            are broken, in less time; only the points found for them differ, which are earlier ones of the same runs.
            Each step waits for the device.
        seed: of the random starts; the same seed gives the same result.
    """

    steps: int = 100
    n_restarts: int = 1
    rho: float = 0.75
    eot_iter: int = 1
    n_target_classes: int = 9
    early_stop: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle(
            steps=inputs.count("steps", self.steps, 0), n_restarts=inputs.count("n_restarts", self.n_restarts, 1)
        )
        self._settle(eot_iter=inputs.count("eot_iter", self.eot_iter, 1), seed=inputs.counter("seed", self.seed))
        self._settle(n_target_classes=inputs.count("n_target_classes", self.n_target_classes, 1))
        rho, early_stop = inputs.number("rho", self.rho, 0.0), inputs.truth("early_stop", self.early_stop)
        if rho > 1:
            raise InputError(f"rho is {rho}; it must be in [0, 1]")
        self._settle(rho=rho, early_stop=early_stop)

    def _kind(self) -> Any:
        from afd.attacks.apgd import APGD

        return APGD


ATTACKS: dict[str, type[AttackSettings]] = {
    "pgd": PGDSettings,
    "apgd": APGDSettings,
    "fgsm": FGSMSettings,
    "mim": MIMSettings,
}


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


def _settle_steps(settings: PGDSettings | MIMSettings) -> None:
    alpha = None if settings.alpha is None else inputs.size("alpha", settings.alpha)
    settings._settle(steps=inputs.count("steps", settings.steps, 0), alpha=alpha)
