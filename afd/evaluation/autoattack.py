"""FAB-T and Square, the parts of AutoAttack that are not ours, and the whole as a reference: from pyautoattack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd.attacks import Attack
from afd.attacks.inputs import outside_inference
from afd.evaluation.foreign import PlainLogits, lent
from afd.evaluation.target import Target
from afd.extras import require

TARGET_CLASSES = 9  # of the standard version; fewer where the model has fewer others


def fab_targeted(target: Target, *, steps: int) -> Attack:
    """Targeted FAB (Croce & Hein 2020), one restart, nine target classes."""

    def build(model: PlainLogits, seed: int, device: torch.device) -> Any:
        from pyautoattack.fab_pt import FABAttack_PT

        return FABAttack_PT(
            model, norm=target.norm, n_restarts=1, n_iter=steps, eps=target.eps, seed=seed, targeted=True,
            device=device, n_target_classes=min(TARGET_CLASSES, target.classes - 1),
        )  # fmt: skip

    return _pyautoattack("FAB-T", target, build)


def square(target: Target, *, queries: int) -> Attack:
    """Square (Andriushchenko et al. 2020): random search, no gradients."""

    def build(model: PlainLogits, seed: int, device: torch.device) -> Any:
        from pyautoattack.square import SquareAttack

        return SquareAttack(
            model, norm=target.norm, n_queries=queries, eps=target.eps, p_init=0.8, n_restarts=1, seed=seed,
            resc_schedule=False, device=device,
        )  # fmt: skip

    return _pyautoattack("Square", target, build)


def whole(target: Target) -> Attack:
    """AutoAttack's standard version, all of it pyautoattack's; it needs ten classes."""

    def build(model: PlainLogits, seed: int, device: torch.device) -> Any:
        from pyautoattack import AutoAttack

        return _Whole(AutoAttack(model, norm=target.norm, eps=target.eps, seed=seed, device=device))

    return _pyautoattack("AutoAttack's reference", target, build)


class _Whole:
    """AutoAttack with the method by which its parts are called."""

    def __init__(self, auto: Any) -> None:
        self.auto = auto

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        x_adv: Tensor = self.auto.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return x_adv


def _pyautoattack(name: str, target: Target, build: Any) -> Attack:
    """An attack of pyautoattack as a call on a batch that leaves the global random state alone.

    Raises:
        ExtraMissingError: pyautoattack is not installed.
    """
    require("pyautoattack", name)

    def attack(x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        seed = (target.seed if seed is None else seed) + first_sample
        with lent(target.model, x) as plain:
            x, y = outside_inference(x.contiguous()), outside_inference(y)
            x_adv: Tensor = build(plain, seed, x.device).perturb(x, y)
        return x_adv.detach()

    return attack
