"""What an evaluation does: stages, each one attack over ascending radii."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from afd.attacks.settings import Norm
from afd.errors import InputError
from afd.evaluation.catalogue import ATTACKS
from afd.evaluation.epsilon import Epsilon, ascending
from afd.evaluation.target import check_radius
from afd.extras import require

Scope = Literal["all", "correct", "survivors", "remaining"]
Role = Literal["score", "transfer", "probe"]


@dataclass(frozen=True)
class Stage:
    """One attack over its radii.

    Attributes:
        name: unique in its protocol; names rows of tables and panels of plots.
        attack: a key of `catalogue.ATTACKS`.
        norm: "Linf", "L2" or "L1".
        epsilons: ascending radii > 0; at 0 the clean accuracy stands.
        settings: of the attack, in the words of its builder.
        scope: which images are attacked. "all": every one, at each radius on its own. "correct": those that the model
            gets right. "survivors": of these, those that this stage has not broken at a smaller radius: an adversarial
            image at 0.1 is one at 0.2 too, so the sweep goes on from what is left, and ends where nothing is.
            "remaining": those that no stage with this scope has broken yet (AutoAttack's cascade).
        role: "score": counts in the worst case. "transfer": attacks the surrogate, and is judged on the subject.
            "probe": only looks for self-deception.
        first: attack only so many images from the beginning; None for all.
    """

    name: str
    attack: str
    norm: Norm
    epsilons: tuple[Epsilon, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    scope: Scope = "survivors"
    role: Role = "score"
    first: int | None = None

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS:
            raise InputError(f"attack is {self.attack!r}; allowed are {', '.join(ATTACKS)}")
        if ascending(self.epsilons)[0].exact == 0:
            raise InputError(f"the radii of {self.name} start at 0; an attack needs radii > 0")

    @property
    def minimal(self) -> bool:
        """Whether one run looks for the nearest adversarial image, and serves every radius."""
        return ATTACKS[self.attack].minimal and self.role != "transfer"

    @property
    def units(self) -> list[tuple[int, ...]]:
        """The radii, by their position, that each run of the attack serves."""
        positions = tuple(range(len(self.epsilons)))
        return [positions] if self.minimal else [(position,) for position in positions]

    def as_json(self) -> dict[str, Any]:
        """Plain types that say all there is to know about the stage."""
        kind = ATTACKS[self.attack]
        return {
            "name": self.name,
            "attack": self.attack,
            "library": kind.library,
            "norm": self.norm,
            "minimal": self.minimal,
            "scope": self.scope,
            "role": self.role,
            "first": self.first,
            "settings": dict(self.settings),
            "epsilons": [epsilon.as_json() for epsilon in self.epsilons],
        }


@dataclass(frozen=True)
class Protocol:
    """A named list of stages.

    Attributes:
        name: "quick", "autoattack", "reference" or "paper".
        norm: the norm of the radius that the result is judged at.
        reference: that radius.
        stages: in the order in which they run on each batch.

    Raises:
        InputError: two stages have one name.
    """

    name: str
    norm: Norm
    reference: Epsilon
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"stages {sorted(twice)} are named twice; each name must be unique")

    def check_extras(self) -> None:
        """Raises ExtraMissingError, before anything is computed, if a stage comes from a library that is missing."""
        for stage in self.stages:
            library = ATTACKS[stage.attack].library
            if library != "afd":
                require(library, f"the stage {stage.name} of the {self.name} protocol")

    def check_classes(self, classes: int) -> None:
        """Raises InputError, before anything is computed, if a stage needs a model with more classes."""
        for stage in self.stages:
            least = ATTACKS[stage.attack].classes
            if classes < least:
                raise InputError(
                    f"the model has {classes} classes; the stage {stage.name} of the {self.name} protocol needs at "
                    f"least {least}"
                )

    def check_radii(self, pixels: int) -> None:
        """Raises InputError if a radius exceeds the distance of any two images of so many values in [0, 1].

        The paper's sweeps, which are those of other data sets too, and the probes are left alone.
        """
        for stage in self.stages:
            if self.name != "paper" and stage.role != "probe":
                check_radius(stage.epsilons[-1], stage.norm, pixels)

    def order(self) -> list[tuple[Stage, tuple[int, ...]]]:
        """(stage, radii by position) in the order in which one batch meets them.

        A cascade meets all its attacks at one radius before the next radius.
        """
        cascade = [stage for stage in self.stages if stage.scope == "remaining"]
        others = [(stage, unit) for stage in self.stages if stage.scope != "remaining" for unit in stage.units]
        rounds = max((len(stage.units) for stage in cascade), default=0)
        return [(stage, stage.units[i]) for i in range(rounds) for stage in cascade if i < len(stage.units)] + others

    def as_json(self) -> dict[str, Any]:
        """Plain types that say all there is to know about the protocol."""
        return {
            "name": self.name,
            "norm": self.norm,
            "reference": self.reference.as_json(),
            "stages": [stage.as_json() for stage in self.stages],
        }
