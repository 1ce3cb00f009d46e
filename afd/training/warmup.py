"""The attack's radius over a run: it grows from almost nothing to its own value."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from afd.attacks.base import GradientAttack
from afd.errors import InputError
from afd.methods import Method, Step, Wrapper
from afd.methods.attacking import GivenAttack

SIZES = ("eps", "alpha")


class EpsWarmup:
    """Scales `eps` (and step size `alpha`, if any) of a step's attack by (round + 1) / rounds in the first rounds.

    The numbers lie on the device, so that a recorded step follows them.

    Args:
        method: whose attack grows.
        step: of the method; it goes on with these numbers.
        rounds: until the attack has its full radius; 0 leaves it alone.
        device: of the model.

    Raises:
        InputError: the attack has no `eps`.
    """

    def __init__(self, method: Method, step: Step, rounds: int, device: torch.device) -> None:
        self.rounds, self.done = rounds, False
        self._fill: list[Callable[[float], object]] = []
        step.adopt(method)
        if not rounds or method.attack is None:
            return
        given = isinstance(method.attack, GivenAttack)
        attack: Any = step.attacks.of(method.attack) if given else method.attack.resolved()
        if not hasattr(attack, "eps"):
            raise InputError(f"attack is a {type(attack).__name__}, which has no eps that a warm-up could scale")
        for name in (name for name in SIZES if hasattr(attack, name)):
            full = getattr(attack, name)
            if given and not isinstance(attack, GradientAttack):
                self._fill.append(lambda share, name=name, full=full: setattr(attack, name, _scaled(full, share)))  # type: ignore[misc]
                continue
            held = torch.as_tensor(full, dtype=torch.float64, device=device).clone()
            if isinstance(full, Tensor) and full.dim():
                held = full.clone()
            self._fill.append(lambda share, held=held, full=full: held.copy_(torch.as_tensor(_scaled(full, share))))  # type: ignore[misc]
            if given:
                setattr(attack, name, held)
            else:
                step.adopt(exchanged(step.method, ("attack", name), held))

    def share(self, played: int) -> float:
        """What share of its own radius the attack has in the round after `played` ones."""
        return min(1.0, (played + 1) / self.rounds) if self.rounds else 1.0

    def at(self, played: int) -> None:
        """Puts the attack's numbers where they are in the round after `played` ones."""
        share = self.share(played)
        if not self.done or share < 1:
            for fill in self._fill:
                fill(share)
        self.done = share == 1


def _scaled(full: Any, share: float) -> Any:
    return full if share == 1 else share * full


def exchanged(settings: Any, path: Sequence[str], value: Tensor) -> Any:
    """A copy of settings in which one number is a tensor on the device; they are not checked again.

    Args:
        settings: a method, or settings of an attack.
        path: of the field: its name, behind those of the settings that it is in.
        value: of shape [], or one per sample.
    """
    twin, (name, *rest) = copy.copy(settings), path
    if isinstance(settings, Wrapper) and name not in vars(settings):
        object.__setattr__(twin, "method", exchanged(settings.method, path, value))
        return twin
    object.__setattr__(twin, name, exchanged(getattr(settings, name), rest, value) if rest else value)
    return twin
