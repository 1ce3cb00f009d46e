"""Spellings of earlier days: what they mean now, said with a DeprecationWarning. CHANGELOG.md lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from afd.attacks import AttackFactory, AttackSettings
from afd.errors import warn_caller
from afd.methods import METHODS, Method, Wrapper
from afd.methods.attacking import GivenAttack

WITHOUT_EFFECT = {  # of `afd train --method natural`, which took every option of afd
    "loss", "schedule", "lr-discriminator", "lr-features", "discriminator-rounds", "penalty", "attack", "attack-steps",
    "alpha", "eval-steps",
}  # fmt: skip


class OldSpellingWarning(DeprecationWarning):
    """Something is said as in earlier days, which will not be understood for ever."""


def without_method_option(words: Sequence[str]) -> list[str]:
    """The words of ``afd train`` with a method as the first of them instead of behind ``--method``.

    Somebody's own class may stand there as well as without it.
    """
    found, kept, words = None, [], list(words)
    while words:
        head, equals, value = words.pop(0).partition("=")
        if head != "--method" or not (equals or words):
            kept.append(f"{head}{equals}{value}")
            continue
        found = value if equals else words.pop(0)
    if found is None:
        return kept
    if found in METHODS:
        _old(f"--method {found} is now {found}: afd train {found} ...")
    return [found, *kept]


def without_effect(words: Sequence[str], method: str | None) -> list[str]:
    """The words but for options of AFD that natural training took, and took no notice of."""
    if method != "natural":
        return list(words)
    kept, words = [], list(words)
    while words:
        word = words.pop(0)
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if not word.startswith("--") or name not in WITHOUT_EFFECT:
            kept.append(word)
            continue
        _old(f"--{name} has no effect on natural training; leave it out")
        if "=" not in word and words:
            words.pop(0)
    return kept


def overridden(
    method: Method, attack: AttackFactory | None, validation_attack: AttackFactory | None, seed: int
) -> tuple[Method, Any]:
    """A trainer's method, and the attack that it is validated by, where ``Trainer(attack=)`` overrides them.

    Args:
        method: with attacks of its own.
        attack: instead of its training attack, as a function of the model.
        validation_attack: likewise; where only `attack` is given, there is none.
        seed: of the method's own validation attack.
    """
    given = {"attack": attack, "validation_attack": validation_attack}
    named = [f"{name}=" for name, one in given.items() if one is not None]
    if not named:
        return method, method.judge(seed)
    _old(
        f"Trainer({', '.join(named)}) is deprecated; a method owns its attacks, e.g. "
        "AFD(attack=PGDSettings(eps=0.3), validation_attack='pgd-20')"
    )
    if attack is not None and method.attack is not None:
        method = _against(method, attack if isinstance(attack, AttackSettings) else GivenAttack(attack))
    if validation_attack is not None:
        own = isinstance(validation_attack, AttackSettings)
        return method, validation_attack if own else GivenAttack(validation_attack, "validation_attack")
    return method, None if attack is not None else method.judge(seed)


def _against(method: Any, attack: Any) -> Any:
    if isinstance(method, Wrapper):
        return dataclasses.replace(method, method=_against(method.method, attack))
    return dataclasses.replace(method, attack=attack)


def _old(message: str) -> None:
    warn_caller(message, OldSpellingWarning)
