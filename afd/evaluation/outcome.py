"""Which image was broken by which attack at which radius, and the figures that follow from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afd.errors import AfdError, InputError
from afd.evaluation.place import Place
from afd.evaluation.protocol import Protocol, Stage
from afd.evaluation.state import Unit


class ShardingError(AfdError):
    """The processes did not see each image exactly once."""


@dataclass
class Outcome:
    """What a protocol found on N images.

    Attributes:
        protocol: what was done.
        seen: how often each image was evaluated [N]; 1, once gathered.
        correct: whether the model is right on the clean image [N].
        found: by stage, whether an adversarial image was found at that very radius, bool [radii, N].
        counts: by stage, sums of attacked and illegal images, of milliseconds over all processes, and of whatever was
            watched.
    """

    protocol: Protocol
    seen: Tensor
    correct: Tensor
    found: dict[str, Tensor]
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def empty(cls, protocol: Protocol, images: int) -> Outcome:
        """Nothing known yet of so many images."""
        seen = torch.zeros(images, dtype=torch.int64, device="cpu")
        none = torch.zeros_like(seen, dtype=torch.bool)
        found = {stage.name: none.repeat(len(stage.epsilons), 1) for stage in protocol.stages}
        return cls(protocol, seen, none, found)

    def clean(self, first: int, correct: Tensor, counts: dict[str, int]) -> None:
        """Notes a batch that begins at image `first`."""
        rows = slice(first, first + len(correct))
        self.seen[rows] += 1
        self.correct[rows] = correct.cpu()
        self.count("clean", counts)

    def undefined(self, first: int, images: Tensor) -> None:
        """Notes the images, from `first` on, that the model has no class for; stages that attack all find them so."""
        rows = slice(first, first + len(images))
        for stage in self.protocol.stages:
            if stage.scope == "all":
                self.found[stage.name][:, rows] |= images.cpu()

    def broken(self, stage: Stage, position: int, images: Tensor, unit: Unit) -> None:
        """Notes the images that a unit broke at a radius; what it counted is noted with its first radius."""
        self.found[stage.name][position, images] = True
        if stage.minimal and position:
            return
        spent = {"attacked": unit.attacked, "illegal": unit.illegal, "milliseconds": round(1000 * unit.seconds)}
        self.count(stage.name, {**spent, **unit.counts})

    def count(self, stage: str, counts: dict[str, int]) -> None:
        """Adds to the counts of a stage."""
        self.counts.setdefault(stage, Counter()).update(counts)

    def gathered(self, place: Place) -> Outcome:
        """The same over all processes.

        Raises:
            ShardingError: an image was evaluated twice, or not at all.
        """
        self.seen, self.correct = place.total(self.seen), place.total(self.correct.int()).bool()
        if wrong := int((self.seen != 1).sum()):
            raise ShardingError(f"{wrong} of {len(self.seen)} images were not evaluated exactly once")
        for name in sorted(self.found):
            self.found[name] = place.total(self.found[name].int()).bool()
        self.counts = place.merged(self.counts)
        return self

    def standing(self, stage: Stage) -> Tensor:
        """Whether each image stands against a stage at each of its radii, bool [radii, N].

        What is broken at one radius is broken at all larger ones, unless the stage takes each radius on its own; an
        image that the model gets wrong anyway never stands, unless the stage attacked those too.
        """
        broken = self.found[stage.name]
        if stage.scope in ("survivors", "remaining"):
            broken = broken.int().cummax(0).values.bool()
        if stage.scope == "remaining":
            for other in self.protocol.stages:
                if other.name == stage.name:
                    break
                if other.scope == "remaining":
                    broken = broken | self.found[other.name].int().cummax(0).values.bool()
        return ~broken if stage.scope == "all" else self.correct & ~broken

    def accuracies(self, stage: Stage) -> list[float]:
        """Share of images that stand against a stage, at each of its radii; of those it looked at."""
        looked_at = slice(stage.first)
        return [float(row[looked_at].double().mean()) for row in self.standing(stage)]

    def blind(self, stage: Stage) -> list[int | None]:
        """How many images stand against a stage, at each of its radii, whose attack could not aim at any time.

        None where no attack said what it saw: those of other libraries do not.
        """
        counts = self.counts.get(stage.name, Counter())
        return [counts.get(f"{position} blind and standing") for position in range(len(stage.epsilons))]

    def worst_case(self, norm: str) -> dict[str, float]:
        """Share of images that stand against every attack in a norm together, by radius (as printed).

        An image falls at a radius if any attack that counts, or was transferred, broke it there or at a smaller one.
        """
        stages = [stage for stage in self.protocol.stages if stage.norm == norm and stage.role != "probe"]
        radii = sorted({epsilon for stage in stages if stage.role == "score" for epsilon in stage.epsilons})
        result = {}
        for radius in radii:
            standing = self.correct.clone()
            for stage in stages:
                reached = [i for i, epsilon in enumerate(stage.epsilons) if epsilon <= radius]
                standing &= ~self.found[stage.name][reached].any(0)
            result[str(radius)] = float(standing.double().mean())
        return result


def normalised_area(radii: list[float], accuracies: list[float]) -> float:
    """Area under accuracy against ε by trapezoids, over that of a model that is always right: in [0, 1].

    Args:
        radii: ascending, from 0.
        accuracies: in [0, 1], one for each radius.

    Raises:
        InputError: the radii do not ascend from 0, or are not as many as the accuracies.
    """
    if len(radii) != len(accuracies) or len(radii) < 2 or radii[0] != 0 or sorted(set(radii)) != radii:
        raise InputError(f"radii are {radii} for {len(accuracies)} accuracies; they must ascend from 0, one for each")
    heights, places = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (accuracies, radii))
    return float(torch.trapezoid(heights, places)) / radii[-1]
