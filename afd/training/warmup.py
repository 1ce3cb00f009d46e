"""The attack's radius over a run: it grows from almost nothing to its own value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from afd.attacks.base import GradientAttack
from afd.errors import InputError
from afd.methods import Method, Step
from afd.methods.attacking import GivenAttack
from afd.methods.base import live_number

SIZES = ("eps", "alpha")


class EpsWarmup:
    """Scales `eps` (and step size `alpha`, if any) of a step's attack by (round + 1) / rounds in the first rounds.

    The numbers lie on the device, so that a recorded step follows them.

    Args:
        method: whose attack grows.
        step: of the method; it goes on with these numbers.
        rounds: until the attack has its full radius; 0 leaves it alone.

    Raises:
        InputError: the attack has no `eps`.
    """

    def __init__(self, method: Method, step: Step, rounds: int) -> None:
        self.rounds, self.grown = rounds, False
        self._fill: list[Callable[[float], object]] = []
        step.adopt(method)
        if not rounds or method.attack is None:
            return
        if isinstance(method.attack, GivenAttack):
            self._follow(step.attacks.of(method.attack))
        else:
            full = method.attack.resolved()
            for name in (name for name in SIZES if hasattr(full, name)):
                value = getattr(full, name)
                self._fill.append(partial(_fill, step.live(f"attack.{name}", value), value))

    def _follow(self, attack: Any) -> None:
        """An attack that somebody has built has its numbers set."""
        if not hasattr(attack, "eps"):
            raise InputError(f"attack is a {type(attack).__name__}, which has no eps that a warm-up could scale")
        for name in (name for name in SIZES if hasattr(attack, name)):
            value = getattr(attack, name)
            if not isinstance(attack, GradientAttack):  # takes numbers, as far as anybody knows
                self._fill.append(partial(_set, attack, name, value))
                continue
            held = live_number(value, attack.model)
            setattr(attack, name, held)
            self._fill.append(partial(_fill, held, value))

    def share(self, played: int) -> float:
        """What share of its own radius the attack has in the round after `played` ones."""
        return min(1.0, (played + 1) / self.rounds) if self.rounds else 1.0

    def at(self, played: int) -> None:
        """Puts the attack's numbers where they are in the round after `played` ones."""
        share = self.share(played)
        if not (self.grown and share == 1):
            for fill in self._fill:
                fill(share)
        self.grown = share == 1


def _scaled(full: Any, share: float) -> Any:
    return full if share == 1 else share * full


def _fill(held: Tensor, full: float | Tensor, share: float) -> None:
    value = _scaled(full, share)
    held.copy_(value) if isinstance(value, Tensor) else held.fill_(value)


def _set(attack: Any, name: str, full: Any, share: float) -> None:
    setattr(attack, name, _scaled(full, share))
