"""Attacks on classifiers: short algorithms over `afd.ops`, run by `afd.attacks.engine`."""

from __future__ import annotations

from afd.attacks.apgd import APGD, APGDSettings
from afd.attacks.ball import NORMS, Ball, Norm
from afd.attacks.base import GradientAttack
from afd.attacks.diagnostics import Report
from afd.attacks.fab import FAB, FABSettings
from afd.attacks.pgd import FGSM, MIM, PGD, FGSMSettings, MIMSettings, PGDSettings
from afd.attacks.settings import ATTACKS, Attack, AttackFactory, AttackSettings, KeepsAttacks, attack_named
from afd.attacks.square import Square, SquareSettings
from afd.attacks.union import Union, UnionSettings
from afd.deprecated import ATTACK_SETTINGS, understand
from afd.errors import ModelWarning
from afd.graphs import CaptureWarning

__all__ = ["APGD", "FAB", "FGSM", "MIM", "PGD", "Attack", "AttackFactory", "CaptureWarning", "ModelWarning", "Report"]
__all__ += ["ATTACKS", "APGDSettings", "AttackSettings", "FABSettings", "FGSMSettings", "MIMSettings", "PGDSettings"]
__all__ += [
    "NORMS",
    "Ball",
    "KeepsAttacks",
    "Norm",
    "Square",
    "SquareSettings",
    "Union",
    "UnionSettings",
    "attack_named",
]

ATTACKS |= {"pgd": PGDSettings, "apgd": APGDSettings, "fgsm": FGSMSettings, "mim": MIMSettings, "union": UnionSettings}

_WITH_EARLIER_NAMES: tuple[type[object], ...] = (AttackSettings, GradientAttack, *ATTACKS.values())
for _kind in _WITH_EARLIER_NAMES:
    understand(_kind, ATTACK_SETTINGS)
