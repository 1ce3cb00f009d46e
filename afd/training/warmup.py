"""The attack's radius over a run: it grows from almost nothing to its own value."""

from __future__ import annotations

from afd.attacks import Attack
from afd.attacks.base import GradientAttack
from afd.errors import InputError


def unwatched(attack: Attack) -> Attack:
    """The attack without its own look at values: the stream has checked the batches, and the losses show what is wrong.

    That spares two waits for the device a round, and warnings in mid-training, where gradients may well be zero.
    """
    if isinstance(attack, GradientAttack):
        attack.look = False
    return attack


class Warmup:
    """Scales an attack's `eps` (and step size `alpha`, where it has one) by (round + 1) / rounds in the first rounds.

    Args:
        attack: has an attribute `eps`, and is not shared with anybody else.
        rounds: until it has its full radius; 0 leaves it alone.

    Raises:
        InputError: the attack has no `eps`.
    """

    def __init__(self, attack: Attack, rounds: int) -> None:
        if rounds and not hasattr(attack, "eps"):
            raise InputError(f"attack is a {type(attack).__name__}, which has no eps that a warm-up could scale")
        self.attack, self.rounds = attack, rounds
        self.full = {name: getattr(attack, name) for name in ("eps", "alpha") if hasattr(attack, name)}

    def share(self, played: int) -> float:
        """What share of its own radius the attack has in the round after `played` ones."""
        return min(1.0, (played + 1) / self.rounds) if self.rounds else 1.0

    def at(self, played: int) -> Attack:
        """The attack for the round after `played` ones."""
        share = self.share(played)
        for name, value in self.full.items():
            setattr(self.attack, name, value if share == 1 else share * value)
        return self.attack
