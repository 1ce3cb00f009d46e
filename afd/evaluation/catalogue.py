"""Every attack that an evaluation can name, behind one shape: (target, settings) -> a call on a batch.

This dict is the one place where a protocol's word for an attack meets the code that carries it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afd import ops
from afd.attacks import APGD, FGSM, MIM, PGD, Attack
from afd.attacks.strangers import BOUNDS
from afd.evaluation import autoattack, minimal
from afd.evaluation.predictions import predict
from afd.evaluation.target import Target, per_row

Builder = Callable[..., Attack]


@dataclass(frozen=True)
class Kind:
    """How an attack is made.

    Attributes:
        build: (target, **settings) -> attack.
        passes: forwards and backwards that an image costs, roughly, from the settings; for the time left.
        library: where it comes from, "afd" for our own engine.
        minimal: looks for the nearest adversarial image instead of the worst one in a ball.
        classes: the least number of classes that a model must have.
    """

    build: Builder
    passes: Callable[[dict[str, Any]], float]
    library: str = "afd"
    minimal: bool = False
    classes: int = 2


def step_size(eps: float, steps: int, alpha: float | None = None) -> float:
    """The step of an iterative attack: as given, or 2.5 eps / steps (Madry et al. 2018)."""
    return 2.5 * eps / steps if alpha is None else alpha


def pgd(target: Target, *, steps: int, alpha: float | None = None) -> Attack:
    """PGD from a random start."""
    alpha = step_size(target.eps, steps, alpha)
    return PGD(target.model, norm=target.norm, eps=target.eps, alpha=alpha, steps=steps, seed=target.seed)


def fgsm(target: Target) -> Attack:
    """One step."""
    return FGSM(target.model, norm=target.norm, eps=target.eps)


def mim(target: Target, *, steps: int, decay: float = 1.0) -> Attack:
    """The momentum iterative method; its step is eps / steps, as in its paper."""
    return MIM(
        target.model, norm=target.norm, eps=target.eps, alpha=target.eps / steps, steps=steps, decay=decay
    )  # fmt: skip


def apgd_ce(target: Target, *, steps: int, n_restarts: int = 1) -> Attack:
    """Auto-PGD on the cross-entropy."""
    return APGD(
        target.model, norm=target.norm, eps=target.eps, steps=steps, n_restarts=n_restarts, early_stop=True,
        seed=target.seed,
    )  # fmt: skip


def apgd_t(target: Target, *, steps: int, n_target_classes: int) -> Attack:
    """Auto-PGD on the targeted DLR loss, at each of the likeliest other classes in turn; at all, if there are fewer."""
    return APGD(
        target.model, norm=target.norm, eps=target.eps, steps=steps, loss="dlr-targeted", early_stop=True,
        n_target_classes=min(n_target_classes, target.classes - 1), seed=target.seed,
    )  # fmt: skip


def noise(target: Target, *, draws: int) -> Attack:
    """Uniform noise in the ball: the first of `draws` that fools the model, else the last."""

    def attack(x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        seed = target.seed if seed is None else seed
        result, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        for draw in range(draws):
            drawn = ops.random_start(
                x, eps=target.eps, bounds=BOUNDS, norm=target.norm, seed=seed + draw, first_sample=first_sample
            )
            result = torch.where(per_row(fooled, x), result, drawn)
            fooled |= predict(target.model, result).classes != y
        return result

    return attack


ATTACKS = {
    "pgd": Kind(pgd, lambda settings: 2 * settings["steps"]),
    "fgsm": Kind(fgsm, lambda _: 2),
    "mim": Kind(mim, lambda settings: 2 * settings["steps"]),
    "apgd-ce": Kind(apgd_ce, lambda settings: 2 * settings["steps"] * settings.get("n_restarts", 1)),
    "apgd-t": Kind(apgd_t, lambda settings: 2 * settings["steps"] * settings["n_target_classes"], classes=4),
    "noise": Kind(noise, lambda settings: settings["draws"]),
    "fab-t": Kind(autoattack.fab_targeted, lambda settings: 27 * settings["steps"], "pyautoattack"),
    "square": Kind(autoattack.square, lambda settings: settings["queries"], "pyautoattack"),
    "autoattack": Kind(autoattack.whole, lambda _: 9700, "pyautoattack", classes=autoattack.TARGET_CLASSES + 1),
    "ddn": Kind(minimal.ddn, lambda settings: 2 * settings["steps"], "foolbox", minimal=True),
    "deepfool": Kind(minimal.deepfool, lambda settings: 10 * settings["steps"], "foolbox", minimal=True),
    "cw": Kind(minimal.carlini_wagner, lambda settings: 18 * settings["steps"], "foolbox", minimal=True),
}
