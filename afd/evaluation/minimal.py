"""Attacks that look for the nearest adversarial image, from Foolbox: one small adapter around three of them.

Each ignores the radius of its target: how far the image it returns lies is what answers for every radius.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afd.attacks import Attack
from afd.attacks.inputs import outside_inference
from afd.attacks.strangers import BOUNDS
from afd.evaluation.foreign import lent
from afd.evaluation.target import Target
from afd.extras import require


def ddn(target: Target, *, steps: int, init_epsilon: float = 1.0, gamma: float = 0.05) -> Attack:
    """Decoupled direction and norm, L2 (Rony et al. 2019)."""
    return _foolbox("DDNAttack", "L2", target, steps=steps, init_epsilon=init_epsilon, gamma=gamma)


def deepfool(target: Target, *, steps: int, overshoot: float = 0.02) -> Attack:
    """DeepFool, Linf (Moosavi-Dezfooli et al. 2016)."""
    return _foolbox("LinfDeepFoolAttack", "Linf", target, steps=steps, overshoot=overshoot)


def carlini_wagner(
    target: Target, *, steps: int, binary_search_steps: int = 9, stepsize: float = 0.01, initial_const: float = 1e-3
) -> Attack:
    """Carlini & Wagner, L2 (2017)."""
    return _foolbox(
        "L2CarliniWagnerAttack", "L2", target, steps=steps, binary_search_steps=binary_search_steps,
        stepsize=stepsize, initial_const=initial_const,
    )  # fmt: skip


def _foolbox(name: str, norm: str, target: Target, **settings: Any) -> Attack:
    """Foolbox's attack of that class name, as a call on a batch.

    Raises:
        ExtraMissingError: Foolbox is not installed.
    """
    require("foolbox", f"{name} ({norm})")

    def attack(x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        import foolbox

        # Foolbox draws from the global generator (DDN, where a gradient is zero): the draws depend on the batch only.
        with lent(target.model, x) as plain:
            torch.manual_seed((target.seed if seed is None else seed) + first_sample)
            model = foolbox.PyTorchModel(plain, bounds=BOUNDS, device=x.device)
            x, y = outside_inference(x), outside_inference(y)
            found: Tensor = getattr(foolbox.attacks, name)(**settings).run(model, x, foolbox.Misclassification(y))
        return found.detach().clamp(*BOUNDS)

    return attack
