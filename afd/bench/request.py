"""What every library is asked for, and afd's own answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from afd.attacks import APGD, PGD
from afd.attacks.settings import Norm
from afd.errors import AfdError

Run = Callable[[Tensor, Tensor], Tensor]
ATTACKS = ("pgd", "apgd")
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")


class NotOfferedError(AfdError):
    """A library has no such attack, or none on this device."""


@dataclass(frozen=True)
class Request:
    """An attack at given settings, from a random start.

    Attributes:
        attack: "pgd" or "apgd" (on cross-entropy).
        norm: "Linf", "L2" or "L1".
        eps: radius.
        alpha: step of PGD.
        steps: number of steps.
    """

    attack: str
    norm: Norm
    eps: float
    alpha: float
    steps: int

    @property
    def name(self) -> str:
        """As in PGD-10 Linf."""
        return f"{self.attack.upper()}-{self.steps} {self.norm}"

    @property
    def passes(self) -> int:
        """Forwards and input gradients that it takes: Auto-PGD looks at its start too."""
        return self.steps + (self.attack == "apgd")

    def only(self, library: str, offered: Mapping[str, tuple[str, ...]]) -> None:
        """Raises NotOfferedError unless `offered`, norms by attack, has this one."""
        if self.norm not in offered.get(self.attack, ()):
            raise NotOfferedError(f"{library} offers no {self.attack.upper()} in {self.norm}")


def requests(attacks: Sequence[str], norms: Sequence[Norm], steps: int, radii: Mapping[Norm, float]) -> list[Request]:
    """Every attack in every norm; PGD's steps together are 2.5 times as long as the radius (Madry et al. 2018)."""
    return [Request(kind, norm, radii[norm], radii[norm] * 2.5 / steps, steps) for kind in attacks for norm in norms]


def ours(model: nn.Module, request: Request, precision: str = "fp32") -> Run:
    """afd's own."""
    if request.attack == "apgd":
        return APGD(model, norm=request.norm, eps=request.eps, steps=request.steps, precision=precision)
    return PGD(model, norm=request.norm, eps=request.eps, alpha=request.alpha, steps=request.steps, precision=precision)
