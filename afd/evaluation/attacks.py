"""Attacks that an evaluation can name, what each is built for (a model, and a ball), and stages: one over its radii."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from afd.attacks import APGD, FAB, FGSM, MIM, PGD, Attack, Norm, Square, external
from afd.attacks.ball import NORMS, Ball
from afd.attacks.inputs import rows_of
from afd.attacks.settings import LossName
from afd.errors import InputError, in_levels, one_of
from afd.metrics import predict

LARGEST = 1e9  # no image of floats is so far from another, and what is larger may be no float
TARGET_CLASSES = 9  # of AutoAttack's standard version


@dataclass(frozen=True, order=True)
class Epsilon:
    """A radius >= 0 in units of the image, kept as the fraction that was asked for.

    Attributes:
        exact: the radius.
    """

    exact: Fraction

    @classmethod
    def of(cls, value: str | float | Fraction) -> Self:
        """A radius from "8/255", "0.3", or a number (a float is read as the decimal that prints it).

        Raises:
            InputError: it is none of these, negative or not finite.
        """
        try:
            exact = value if isinstance(value, Fraction) else _fraction(str(value))
        except (ValueError, ZeroDivisionError):
            raise InputError(f"eps is {value!r}; it must be a number such as 0.3 or a fraction such as 8/255") from None
        if exact < 0:
            raise InputError(f"eps is {value}; it must be at least 0")
        if exact > LARGEST:
            raise InputError(f"eps is {value}; it must be at most {LARGEST:g}, in units of the image")
        return cls(exact)

    def __float__(self) -> float:
        return float(self.exact)

    def __str__(self) -> str:
        digits = f"{float(self.exact):.6g}"
        if Fraction(digits) == self.exact:
            return digits
        levels = self.exact * 255
        return f"{levels}/255" if levels.denominator == 1 else str(self.exact)

    def as_json(self) -> dict[str, str | float]:
        """The exact fraction, the float that the attack used, and how it is printed."""
        return {"fraction": str(self.exact), "float": float(self), "text": str(self)}


def _fraction(text: str) -> Fraction:
    """Of "0.3", "8/255" or "0.5/255".

    Raises:
        ValueError, ZeroDivisionError: it is none of these, or of too many digits to compute with.
    """
    top, slash, bottom = text.partition("/")
    return _exact(top) / _exact(bottom) if slash else _exact(top)


def _exact(text: str) -> Fraction:
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError(text) from None
    if not number.is_finite() or abs(number.adjusted()) > 5000 or len(text) > 5000:
        raise ValueError(text)
    return Fraction(number)


def ascending(values: Iterable[str | float | Fraction | Epsilon]) -> tuple[Epsilon, ...]:
    """Radii in strictly ascending order.

    Raises:
        InputError: there are none, one is not a radius, or one is not larger than the one before.
    """
    radii = tuple(value if isinstance(value, Epsilon) else Epsilon.of(value) for value in values)
    if not radii:
        raise InputError("eps is empty; it needs at least one radius")
    for before, after in pairwise(radii):
        if after <= before:
            listed = " ".join(map(str, radii))
            raise InputError(f"eps is {listed}; radii must ascend, and {after} does not exceed {before}")
    return radii


@dataclass(frozen=True)
class Target:
    """A model under attack.

    Attributes:
        model: images -> logits [N, classes].
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball, in units of the image.
        seed: of whatever the attack draws.
        classes: number of logits.
        precision: that our own attacks run the model in: "fp32", "bf16" or "auto".
    """

    model: nn.Module
    norm: Norm
    eps: float
    seed: int
    classes: int
    precision: str = "fp32"

    @property
    def ball(self) -> dict[str, Any]:
        """What each of our own attacks is told."""
        return {"norm": self.norm, "eps": self.eps, "precision": self.precision}


def check_radius(eps: float | Epsilon, norm: str, values: int) -> None:
    """Raises InputError if a radius exceeds the distance of any two images of so many values in [0, 1]."""
    one_of("norm", norm, NORMS)
    widest = NORMS[norm].diameter(values)
    if float(eps) > widest:
        raise InputError(
            f"eps is {eps} in {norm}; no two images in [0, 1] are further apart than {widest:g}"
            + (in_levels(float(eps)) if NORMS[norm].in_levels else ", so name a smaller radius")
        )


@dataclass(frozen=True)
class Shortened:
    """An attack with what it finds pulled back into the ball of radius eps."""

    attack: Attack
    ball: Ball

    def __call__(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """See `Attack`."""
        x_adv = self.attack(x, y, seed=seed, first_sample=first_sample)
        return self.ball.shorten(x_adv, x)


Builder = Callable[..., Attack]  # (target, **settings) -> a call on a batch


@dataclass(frozen=True)
class Kind:
    """How an attack is made.

    Attributes:
        build: (target, **settings) -> attack.
        passes: forwards and backwards that an image costs, roughly, from the settings; for the time left.
        library: where it comes from, "afd" for our own engine.
        minimal: looks for the nearest adversarial image instead of the worst one in a ball.
        classes: the least number of classes that a model must have.
        instead: the attack, told of its settings only `steps`, that takes its place in a model with fewer.
    """

    build: Builder
    passes: Callable[[dict[str, Any]], float]
    library: str = "afd"
    minimal: bool = False
    classes: int = 2
    instead: str = ""


def step_size(eps: float, steps: int, alpha: float | None = None) -> float:
    """The step of an iterative attack: as given, or 2.5 eps / steps (Madry et al. 2018)."""
    return 2.5 * eps / steps if alpha is None else alpha


def pgd(target: Target, *, steps: int, alpha: float | None = None) -> Attack:
    """PGD from a random start."""
    alpha = step_size(target.eps, steps, alpha)
    return PGD(target.model, **target.ball, alpha=alpha, steps=steps, seed=target.seed)


def fgsm(target: Target) -> Attack:
    """One step."""
    return FGSM(target.model, **target.ball)


def mim(target: Target, *, steps: int, decay: float = 1.0) -> Attack:
    """The momentum iterative method; its step is eps / steps, as in its paper."""
    return MIM(target.model, **target.ball, alpha=target.eps / steps, steps=steps, decay=decay)


def apgd(loss: LossName) -> Builder:
    """The builder of Auto-PGD on a loss that aims at no class."""
    return lambda target, *, steps, n_restarts=1: APGD(
        target.model, **target.ball, steps=steps, n_restarts=n_restarts, loss=loss, early_stop=True, seed=target.seed
    )


def apgd_t(target: Target, *, steps: int, n_target_classes: int) -> Attack:
    """Auto-PGD on the targeted DLR loss, at each of the likeliest other classes in turn; at all, if there are fewer."""
    return APGD(
        target.model, **target.ball, steps=steps, loss="dlr-targeted", early_stop=True,
        n_target_classes=min(n_target_classes, target.classes - 1), seed=target.seed,
    )  # fmt: skip


def noise(target: Target, *, draws: int) -> Attack:
    """Uniform noise in the ball: the first of `draws` that fools the model, else the last."""
    ball = Ball(target.norm, target.eps)

    def attack(x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        seed = target.seed if seed is None else seed
        result, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        for draw in range(draws):
            drawn = ball.start(x, seed=seed + draw, first_sample=first_sample)
            result = torch.where(rows_of(fooled, x), result, drawn)
            fooled |= predict(target.model, result).classes != y
        return result

    return attack


def fab_t(target: Target, *, steps: int, n_target_classes: int = TARGET_CLASSES) -> Attack:
    """Targeted FAB, at the likeliest other classes in turn; at all, if there are fewer."""
    classes = min(n_target_classes, target.classes - 1)
    return FAB(target.model, **target.ball, steps=steps, n_target_classes=classes, seed=target.seed)


def square(target: Target, *, queries: int) -> Attack:
    """Square: random search, no gradients."""
    return Square(target.model, **target.ball, queries=queries, seed=target.seed)


def autoattack(target: Target) -> Attack:
    """AutoAttack's standard version, all of it pyautoattack's."""
    return external.autoattack(target.model, norm=target.norm, eps=target.eps, seed=target.seed)


def nearest(build: Callable[..., Attack]) -> Builder:
    """The builder of an attack that ignores the radius: how far its image lies is what answers for every radius."""
    return lambda target, **settings: build(target.model, seed=target.seed, **settings)


ATTACKS = {
    "pgd": Kind(pgd, lambda settings: 2 * settings["steps"]),
    "fgsm": Kind(fgsm, lambda _: 2),
    "mim": Kind(mim, lambda settings: 2 * settings["steps"]),
    "apgd-ce": Kind(apgd("ce"), lambda settings: 2 * settings["steps"] * settings.get("n_restarts", 1)),
    "apgd-margin": Kind(apgd("margin"), lambda settings: 2 * settings["steps"]),
    "apgd-t": Kind(
        apgd_t, lambda settings: 2 * settings["steps"] * settings["n_target_classes"], classes=4, instead="apgd-margin"
    ),
    "noise": Kind(noise, lambda settings: settings["draws"]),
    "fab-t": Kind(fab_t, lambda settings: 27 * settings["steps"]),
    "square": Kind(square, lambda settings: settings["queries"]),
    "autoattack": Kind(autoattack, lambda _: 9700, "pyautoattack", classes=TARGET_CLASSES + 1),
    "ddn": Kind(nearest(external.ddn), lambda settings: 2 * settings["steps"], "foolbox", minimal=True),
    "deepfool": Kind(nearest(external.deepfool), lambda settings: 10 * settings["steps"], "foolbox", minimal=True),
    "cw": Kind(nearest(external.carlini_wagner), lambda settings: 18 * settings["steps"], "foolbox", minimal=True),
}


# --- One attack over ascending radii ----------------------------------------------------------------------------------

Scope = Literal["all", "correct", "survivors", "remaining", "withstood"]
Role = Literal["score", "transfer", "probe"]


@dataclass(frozen=True)
class Stage:
    """One attack over its radii.

    Attributes:
        name: unique in its protocol; names rows of tables and panels of plots.
        attack: a key of `attacks.ATTACKS`.
        norm: "Linf", "L2" or "L1".
        epsilons: ascending radii > 0; at 0 the clean accuracy stands.
        settings: of the attack, in the words of its builder.
        scope: which images are attacked. "all": every one, at each radius on its own. "correct": those that the model
            gets right. "survivors": of these, those that are robust to this stage at the smaller radii: an adversarial
            image at 0.1 is one at 0.2 too, so the sweep goes on from what is left, and ends where nothing is.
            "remaining": those that are robust to every stage with this scope and norm so far (AutoAttack's cascade).
            "withstood": those that no attack by gradients in this norm has fooled so far, at its radius or below.
        role: "score": counts in the worst case. "transfer": attacks the surrogate, and is judged on the model.
            "probe": only looks for self-deception.
        first: attack only so many images from the beginning; None for all.
        after: of these images only those that withstand the stage of this name (`Protocol.find`); "" for all.
        surrogate: number of the model that a transfer stage attacks.
    """

    name: str
    attack: str
    norm: Norm
    epsilons: tuple[Epsilon, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    scope: Scope = "survivors"
    role: Role = "score"
    first: int | None = None
    after: str = ""
    surrogate: int = 0

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS:
            raise InputError(f"attack is {self.attack!r}; allowed are {', '.join(ATTACKS)}")
        if ascending(self.epsilons)[0].exact == 0:
            raise InputError(f"the radii of {self.name} start at 0; an attack needs radii > 0")

    @property
    def minimal(self) -> bool:
        """Whether one run looks for the nearest adversarial image, and serves every radius."""
        return ATTACKS[self.attack].minimal and self.role != "transfer"

    @property
    def work_items(self) -> list[WorkItem]:
        """One for each radius, or one for them all."""
        positions = range(len(self.epsilons))
        return [WorkItem(self, tuple(positions))] if self.minimal else [WorkItem(self, (i,)) for i in positions]

    def serves(self, probe: Stage) -> bool:
        """Whether this stage, which counts, does at its first radius all that a probe would: the checks read it then.

        A cascade's Square meets all images that no attack by gradients has fooled, which are all that its probe meets.
        """
        if self.role != "score" or (self.attack, self.norm) != (probe.attack, probe.norm):
            return False
        if self.attack == "square" and self.scope == "remaining":
            return probe.epsilons[0] in self.epsilons and self.settings["queries"] >= probe.settings["queries"]
        alike = (self.epsilons[0], dict(self.settings)) == (probe.epsilons[0], dict(probe.settings))
        return alike and self.scope in ("correct", "survivors") and self.first is None

    def as_json(self) -> dict[str, Any]:
        """Plain types that say all there is to know about the stage."""
        kind = ATTACKS[self.attack]
        return {
            "name": self.name,
            "attack": self.attack,
            "library": kind.library,
            "norm": self.norm,
            "minimal": self.minimal,
            "scope": self.scope,
            "role": self.role,
            "first": self.first,
            "settings": dict(self.settings),
            "epsilons": [epsilon.as_json() for epsilon in self.epsilons],
            **({"after": self.after} if self.after else {}),
            **({"surrogate": self.surrogate} if self.surrogate else {}),
        }


@dataclass(frozen=True)
class WorkItem:
    """A stage at one radius, or at all where one run of its attack serves them all; done and kept batch by batch.

    Attributes:
        stage: what is done.
        positions: of the radii among the stage's.
    """

    stage: Stage
    positions: tuple[int, ...]

    def __str__(self) -> str:
        name, radius = self.stage.name, self.stage.epsilons[self.positions[0]]
        return name if self.stage.minimal else f"{name} at ε = {radius}"

    @property
    def largest(self) -> Epsilon:
        """The radius that the attack is made for."""
        return self.stage.epsilons[self.positions[-1]]

    @property
    def passes(self) -> float:
        """Forwards and backwards that it costs an image, roughly."""
        return float(ATTACKS[self.stage.attack].passes(dict(self.stage.settings)))

    def key(self, batch: int) -> str:
        """The name that what it finds on a batch has in the store."""
        return f"{self.stage.name}.{'-'.join(map(str, self.positions))}.{batch}"
