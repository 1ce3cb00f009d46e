"""The outcome of an evaluation: which attack found an adversarial image of what, and what results.json says of it."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd._version import __version__
from afd.attacks.ball import NORMS
from afd.data import Images
from afd.errors import AfdError, InputError
from afd.evaluation.attacks import Epsilon, Stage
from afd.evaluation.model import Model, describe, divergence
from afd.evaluation.protocol import Protocol
from afd.files import check_source, write_whole
from afd.machine import device_with_threads
from afd.metrics import interval, packed
from afd.runtime import Group

BLACK_BOX = ("noise", "square", "autoattack")  # attacks that ask for no gradient, or not for gradients alone
FORMAT, VERSION = "afd-evaluation", 1
RESULTS = "results.json"
BLIND_AND_ROBUST = "blind and standing"  # a count's name in the store of earlier versions, too
LEFT_IN_BF16, BROKEN_IN_FP32 = "left in bfloat16", "broken in float32"  # counts of attacks that ran in bfloat16


@dataclass(frozen=True)
class ItemResult:
    """What a work item found on a batch.

    Attributes:
        rows: positions in the batch of the images that fooled the model, int64 [M].
        images: their adversarial images [M, ...], float32, exactly as the model was shown them.
        lengths: distance of each from its original, float64 [M].
        attacked: how many images were attacked.
        illegal: how many came back outside of the ball or of [0, 1], or not finite; none of these is adversarial.
        counts: whatever else was counted, by name.
        seconds: how long it took.
    """

    rows: Tensor
    images: Tensor
    lengths: Tensor
    attacked: int
    illegal: int
    counts: dict[str, int]
    seconds: float


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
            counted.
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

    def adversarial(self, stage: Stage, position: int, images: Tensor, result: ItemResult) -> None:
        """Notes images of which one was found at a radius; what the result counted is noted with its first radius."""
        self.found[stage.name][position, images] = True
        if stage.minimal and position:
            return
        spent = {"attacked": result.attacked, "illegal": result.illegal, "milliseconds": round(1000 * result.seconds)}
        self.count(stage.name, {**spent, **result.counts})

    def count(self, stage: str, counts: dict[str, int]) -> None:
        """Adds to the counts of a stage."""
        self.counts.setdefault(stage, Counter()).update(counts)

    def gathered(self, group: Group) -> Outcome:
        """The same over all processes.

        Raises:
            ShardingError: an image was evaluated twice, or not at all.
        """
        self.seen, self.correct = group.total(self.seen), group.total(self.correct.int()).bool()
        if wrong := int((self.seen != 1).sum()):
            raise ShardingError(f"{wrong} of {len(self.seen)} images were not evaluated exactly once")
        for name in sorted(self.found):
            self.found[name] = group.total(self.found[name].int()).bool()
        self.counts = group.merged(self.counts)
        return self

    def reached(self, stage: Stage, radius: Epsilon) -> Tensor:
        """Where a stage fooled the model at a radius or below it, bool [N]."""
        positions = [i for i, epsilon in enumerate(stage.epsilons) if epsilon <= radius]
        return self.found[stage.name][positions].any(0)

    def white_box(self, norm: str, radius: Epsilon) -> Tensor:
        """Where any attack by gradients in a norm fooled the model it looks at, at a radius or below it, bool [N]."""
        found = torch.zeros_like(self.correct)
        for stage in self.protocol.stages:
            if stage.norm == norm and stage.attack not in BLACK_BOX and stage.role != "transfer":
                found |= self.reached(stage, radius)
        return found

    def robust(self, stage: Stage) -> Tensor:
        """Whether the model is robust on each image to a stage at each of its radii, bool [radii, N].

        What is adversarial at one radius is so at all larger ones, unless the stage takes each radius on its own; on an
        image that the model gets wrong anyway it is never robust, unless the stage attacked those too.
        """
        fooled = self.found[stage.name]
        if stage.scope in ("survivors", "remaining"):
            fooled = fooled.int().cummax(0).values.bool()
        if stage.scope == "remaining":
            for other in self.protocol.stages:
                if other.name == stage.name:
                    break
                if other.scope == "remaining" and other.norm == stage.norm:
                    fooled = fooled | self.found[other.name].int().cummax(0).values.bool()
        return ~fooled if stage.scope == "all" else self.correct & ~fooled

    def accuracies(self, stage: Stage) -> list[float]:
        """Robust accuracy under a stage at each of its radii, on the images that it looked at."""
        looked_at = slice(stage.first)
        return [float(row[looked_at].double().mean()) for row in self.robust(stage)]

    def blind(self, stage: Stage) -> list[int | None]:
        """On how many images the model is robust to a stage, at each radius, whose attack could not aim at any time.

        None where no attack said what it saw: those of other libraries do not.
        """
        counts = self.counts.get(stage.name, Counter())
        return [counts.get(f"{position} {BLIND_AND_ROBUST}") for position in range(len(stage.epsilons))]

    def worst_case(self, norm: str) -> dict[str, float]:
        """Robust accuracy under every attack in a norm together, by radius (as printed).

        An image is lost at a radius if any attack that counts, or was transferred, fooled the model there or below.
        """
        return {str(radius): float(self.withstands(norm, radius).double().mean()) for radius in self.radii(norm)}

    def radii(self, norm: str) -> list[Epsilon]:
        """All radii, ascending, of the stages in a norm that count."""
        stages = [stage for stage in self.protocol.stages if stage.norm == norm and stage.role == "score"]
        return sorted({epsilon for stage in stages for epsilon in stage.epsilons})

    def withstands(self, norm: str, radius: Epsilon) -> Tensor:
        """Whether the model is robust on each image to all that counts in a norm up to a radius, bool [N]."""
        robust = self.correct.clone()
        for stage in self.protocol.stages:
            if stage.norm == norm and stage.role != "probe":
                robust &= ~self.reached(stage, radius)
        return robust

    def robust_to_all(self) -> Tensor:
        """Whether the model withstands on each image all that counts in each ball that it is judged in, bool [N]."""
        return torch.stack([self.withstands(norm, eps) for norm, eps in self.protocol.balls.items()]).all(0)

    def union(self) -> dict[str, Any] | None:
        """Robust accuracy in each ball of the protocol's union, and in all of them together; None of one ball."""
        balls = self.protocol.union
        if not balls:
            return None
        robust = {norm: self.withstands(norm, eps) for norm, eps in balls.items()}
        return {
            "balls": [
                {"norm": norm, **eps.as_json(), "accuracy": float(robust[norm].double().mean())}
                for norm, eps in balls.items()
            ],
            "accuracy": (share := float(self.robust_to_all().double().mean())),
            "interval": between(share, len(self.correct)),
        }


def between(share: float, images: int) -> list[float]:
    """Where a share that was found on so many images lies with 95% confidence."""
    return list(interval(share * images, images))


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


def divergences(outcome: Outcome) -> list[dict[str, Any]]:
    """The HΔH distance beside the gap (attacked error - natural error), for each scoring attack and radius."""
    natural = outcome.counts.get("clean", Counter())
    if not natural:
        return []
    clean = float(outcome.correct.double().mean())
    found = []
    for stage in outcome.protocol.stages:
        counts = outcome.counts.get(stage.name, Counter())
        for i, accuracy in enumerate(outcome.accuracies(stage) if stage.role == "score" else []):
            at = {name: counts[f"{i} {name}"] for name in ("judged", "natural", "attacked")}
            distance = divergence(natural, at)
            if distance is not None:
                gap = clean - accuracy
                found.append({"attack": stage.name, "eps": str(stage.epsilons[i]), "distance": distance, "gap": gap})
    return found


class ResultsError(AfdError):
    """A folder holds no results that this afd can read."""


def withstood(outcome: Outcome) -> dict[str, Any]:
    """Which images the model is right on: clean, by stage (but probes) and by norm in the worst case; `packed`."""
    by_radius = {
        stage.name: dict(zip(map(str, stage.epsilons), map(packed, outcome.robust(stage)), strict=True))
        for stage in outcome.protocol.stages
        if stage.role != "probe"
    }
    worst = {norm: {str(eps): packed(outcome.withstands(norm, eps)) for eps in outcome.radii(norm)} for norm in NORMS}
    worst_case = {norm: images for norm, images in worst.items() if images}
    return {"clean": packed(outcome.correct), "stages": by_radius, "worst_case": worst_case}


def summarize(
    outcome: Outcome,
    *,
    model: Model,
    surrogates: Sequence[Model],
    images: Images,
    split: str,
    checks: list[dict[str, Any]],
    verdict: str,
    features: dict[str, Any] | None,
    divergence: list[dict[str, Any]],
    precision: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Everything there is to say about an evaluation, in plain types.

    Args:
        outcome: gathered over all processes.
        model: the model.
        surrogates: the models that transfer attacks were made on.
        images: what was attacked, from the first of their split on.
        split: which part of the data they are.
        checks: for self-deception, in plain types.
        verdict: the worst of theirs.
        features: see `features.feature_summary`.
        divergence: see `features.divergences`.
        precision: that was asked for, that attacks ran in, and what float32 confirmed.
        settings: seed, batch size, processes and whatever else the run was given.
    """
    protocol, count = outcome.protocol, len(images)
    clean = float(outcome.correct.double().mean())
    worst_case = {norm: worst for norm in NORMS if (worst := outcome.worst_case(norm))}
    described = [describe(one) for one in surrogates]
    return {
        "format": FORMAT,
        "version": VERSION,
        "subject": describe(model),
        "surrogate": described[0] if described else None,
        **({"surrogates": described} if len(described) > 1 else {}),
        "data": {
            "name": images.name,
            "split": split,
            "images": images.chosen.format(count),
            "count": count,
            "shape": list(images.shape),
            "classes": images.num_classes,
        },
        "protocol": protocol.as_json(),
        "verdict": verdict,
        "clean": clean,
        "attacks": [attack_summary(outcome, stage) for stage in protocol.stages],
        "worst_case": worst_case,
        "intervals": {
            "level": 0.95,
            "clean": between(clean, count),
            "worst_case": {
                norm: {eps: between(share, count) for eps, share in worst.items()} for norm, worst in worst_case.items()
            },
        },
        "withstood": withstood(outcome),
        "precision": precision,
        "union": outcome.union(),
        "checks": checks,
        "features": features,
        "divergence": divergence,
        "settings": settings,
        "versions": {"afd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": device_with_threads(images.device), "system": platform.system()},
    }


def attack_summary(outcome: Outcome, stage: Stage) -> dict[str, Any]:
    """A stage with its accuracies and the area under them."""
    accuracies, counts = outcome.accuracies(stage), outcome.counts.get(stage.name, Counter())
    curve = [float(outcome.correct[: stage.first].double().mean()), *accuracies]
    count = len(outcome.correct[: stage.first])
    points = [
        {**epsilon.as_json(), "accuracy": accuracy, "interval": between(accuracy, count), "blind": blind}
        for epsilon, accuracy, blind in zip(stage.epsilons, accuracies, outcome.blind(stage), strict=True)
    ]
    return {
        **stage.as_json(),
        "accuracies": points,
        "area": normalised_area([0.0, *map(float, stage.epsilons)], curve),
        "attacked": counts.get("attacked", 0),
        "illegal": counts.get("illegal", 0),
        "not_finite": counts.get("not finite", 0),
        "seconds": counts.get("milliseconds", 0) / 1000,
    }


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    write_whole(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """The results in a folder of an evaluation, or in its results.json.

    Raises:
        ResultsError: there are none, or they are of another version.
    """
    check_source("results", path)
    file = path / RESULTS if path.is_dir() else path
    check_source("results", file)
    if not file.is_file():
        raise ResultsError(f"{path} holds no {RESULTS}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{file} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ResultsError(f"{file} is not the result of an afd evaluation")
    if results.get("version") != VERSION:
        raise ResultsError(f"{file} has version {results.get('version')}; this afd reads {VERSION}")
    return results
