"""Attacks on classifiers: short algorithms over `afd.ops`, run by `afd.attacks.engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from afd.attacks.apgd import APGD
from afd.attacks.capture import CaptureWarning
from afd.attacks.fgsm import FGSM
from afd.attacks.mim import MIM
from afd.attacks.pgd import PGD
from afd.attacks.settings import (
    ATTACKS,
    APGDSettings,
    AttackSettings,
    FGSMSettings,
    KeepsAttacks,
    MIMSettings,
    PGDSettings,
    attack_named,
)
from afd.attacks.watch import Report
from afd.errors import ModelWarning

__all__ = ["APGD", "FGSM", "MIM", "PGD", "Attack", "AttackFactory", "CaptureWarning", "ModelWarning", "Report"]
__all__ += ["ATTACKS", "APGDSettings", "AttackSettings", "FGSMSettings", "MIMSettings", "PGDSettings"]
__all__ += ["KeepsAttacks", "attack_named"]


class Attack(Protocol):
    """(x, y) -> x_adv, in the terms of `PGD.__call__`."""

    def __call__(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """Adversarial images like x."""


AttackFactory = Callable[[nn.Module], Attack]
