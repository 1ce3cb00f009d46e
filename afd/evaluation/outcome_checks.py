"""Checks that compare attacks with each other: the weaker of two must not find what the stronger cannot."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from afd.evaluation.checks import Check, judge, skipped
from afd.evaluation.outcome import Outcome
from afd.evaluation.protocol import Stage
from afd.evaluation.protocols import PROBED
from afd.evaluation.verification import Verification
from afd.extras import how_to_add

NEEDED = ("probe-noise", "probe-fgsm", "probe-pgd-20", "probe-pgd-40", "probe-far")  # stages of every protocol


def outcome_checks(outcome: Outcome, classes: int) -> list[Check]:
    """All checks that the stages of an outcome allow, in points of accuracy (hundredths of the images)."""
    seen = Probes(outcome)
    return [
        _far(seen, classes),
        _one_step(seen),
        _label_leak(seen),
        _doubling(seen),
        _noise(seen),
        _square(seen),
        _transfer(seen),
        _illegal(outcome),
        _blind(outcome),
        _infinite_attacked(outcome),
    ]


def finite_check(outcome: Outcome) -> Check:
    """Whether the model's outputs are finite on all clean images."""
    images = len(outcome.correct)
    return judge(
        "outputs not finite", outcome.counts["clean"]["not finite"], f"of {images} images", allowed=0, fails_above=0,
        meaning="NaN or infinite logits leave attacks without a loss to climb; an image with NaN counts as wrong",
    )  # fmt: skip


def verification_check(found: Verification) -> Check:
    """Whether saved adversarial images still fool the model."""
    share = 100 * found.standing / max(found.images, 1)
    return judge(
        "re-verification", share, f"% of {found.images} adversarial images", allowed=0, fails_above=0.5,
        one=100 / max(found.images, 1),
        meaning=f"shown again in batches of {found.batch_size}, in float32, these no longer fool the model",
    )  # fmt: skip


class Probes:
    """What each probe found on the first images."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.protocol = outcome, outcome.protocol
        self.stages = {stage.name: stage for stage in outcome.protocol.stages}
        self.images = min(PROBED, len(outcome.correct))
        self.correct = outcome.correct[: self.images]

    def broken(self, name: str) -> Tensor:
        """Which of the first images, right when clean, a probe broke."""
        return self.outcome.found[name].any(0)[: self.images] & self.correct

    def points(self, mask: Tensor) -> float:
        """A share of the first images, in points."""
        return 100 * float(mask.sum()) / self.images

    @property
    def one(self) -> float:
        """What one image weighs."""
        return 100 / self.images

    def white_box(self) -> Tensor:
        """Which images any gradient attack broke at the reference radius or below it, in its norm."""
        found = torch.zeros_like(self.correct)
        for stage in self.stages.values():
            if stage.attack in BLACK_BOX or stage.role == "transfer" or stage.norm != self.protocol.norm:
                continue
            found |= self.reached(stage)[: self.images]
        return found & self.correct

    def reached(self, stage: Stage) -> Tensor:
        """Which images a stage broke at the reference radius or below it."""
        positions = [i for i, epsilon in enumerate(stage.epsilons) if epsilon <= self.protocol.reference]
        return self.outcome.found[stage.name][positions].any(0)


BLACK_BOX = ("noise", "square", "autoattack")


def _far(seen: Probes, classes: int) -> Check:
    stage = seen.stages["probe-far"]
    accuracy = 100 * seen.outcome.accuracies(stage)[-1]
    chance = 100 / classes
    return judge(
        f"accuracy at ε = {stage.epsilons[-1]}", accuracy, "%", allowed=chance + 5, fails_above=chance + 20,
        meaning="any image may become any other at this radius, so a working attack leaves chance at most",
    )  # fmt: skip


def _one_step(seen: Probes) -> Check:
    many, one = seen.broken("probe-pgd-20"), seen.broken("probe-fgsm")
    return judge(
        "one step beats many", max(0.0, seen.points(one) - seen.points(many)), "points", allowed=0.2, fails_above=1,
        one=seen.one, meaning="FGSM breaks more images than PGD-20: gradients mislead after the first step",
    )  # fmt: skip


def _label_leak(seen: Probes) -> Check:
    wrong = seen.outcome.found["probe-fgsm"][0][: seen.images]
    gain = seen.points(~wrong) - seen.points(seen.correct)
    return judge(
        "attack raises accuracy", max(0.0, gain), "points", allowed=0.2, fails_above=1, one=seen.one,
        meaning="the model is right more often under FGSM than when clean: it reads the label off the perturbation",
    )  # fmt: skip


def _doubling(seen: Probes) -> Check:
    change = seen.points(seen.broken("probe-pgd-40")) - seen.points(seen.broken("probe-pgd-20"))
    return judge(
        "doubling the steps", abs(change), "points", allowed=0.5, fails_above=3, one=seen.one,
        meaning="PGD-40 and PGD-20 disagree: the attack has not converged, and its figure is too high",
    )  # fmt: skip


def _noise(seen: Probes) -> Check:
    extra = seen.points(seen.broken("probe-noise") & ~seen.white_box())
    return judge(
        "random noise beats the attacks", extra, "points", allowed=0, fails_above=0.5, one=seen.one,
        meaning="uniform noise breaks images that no gradient attack breaks",
    )  # fmt: skip


def _square(seen: Probes) -> Check:
    name = "Square beats white-box"
    meaning = "a search without gradients breaks images that no gradient attack breaks: masked gradients"
    extra = []
    if "probe-square" in seen.stages:
        extra.append((seen.points(seen.broken("probe-square") & ~seen.white_box()), seen.one))
    if (last := seen.stages.get("square")) is not None:
        alone = seen.reached(last) & seen.outcome.correct
        for stage in seen.stages.values():
            if stage.attack not in BLACK_BOX and stage.role != "transfer" and stage.norm == last.norm:
                alone &= ~seen.reached(stage)
        extra.append((100 * float(alone.double().mean()), 100 / len(alone)))
    if not extra:
        return skipped(name, f"pyautoattack is not installed; add it with: {how_to_add('pyautoattack')}")
    points, one = max(extra)
    return judge(name, points, "points", allowed=0.2, fails_above=1, one=one, meaning=meaning)


def _transfer(seen: Probes) -> Check:
    name = "transfer beats white-box"
    transferred = [stage for stage in seen.stages.values() if stage.role == "transfer"]
    if not transferred:
        return skipped(name, "no second checkpoint; name one with --transfer-from and --protocol paper")
    extra = 0.0
    for stage in transferred:
        alone = seen.outcome.found[stage.name][0] & seen.outcome.correct
        for other in seen.stages.values():
            if other.norm == stage.norm and other.role != "transfer" and other.attack not in BLACK_BOX:
                reached = [i for i, epsilon in enumerate(other.epsilons) if epsilon <= stage.epsilons[0]]
                alone &= ~seen.outcome.found[other.name][reached].any(0)
        extra = max(extra, 100 * float(alone.double().mean()))
    return judge(
        name, extra, "points", allowed=0.2, fails_above=1, one=100 / len(seen.outcome.correct),
        meaning="images made on another model break what no attack on this model breaks: masked gradients",
    )  # fmt: skip


def _illegal(outcome: Outcome) -> Check:
    count = sum(counts["illegal"] for counts in outcome.counts.values())
    return judge(
        "attacked images out of bounds", count, "images", allowed=0, fails_above=0,
        meaning="an attack returned images outside of its ball or of [0, 1]; they were not counted as broken",
    )  # fmt: skip


def _blind(outcome: Outcome) -> Check:
    """Of the stages whose attack says what it saw, and of their radii, the one where most stand without being aimed at.

    Whether another stage aims at these images has no say: the figure of this one is too high by as much.
    """
    images = len(outcome.correct)
    shares = [
        (100 * blind / images, f"{stage.name} at ε = {epsilon}")
        for stage in outcome.protocol.stages
        for epsilon, blind in zip(stage.epsilons, outcome.blind(stage), strict=True)
        if stage.role == "score" and blind is not None
    ]
    name = "robust to a blind attack"
    if not shares:
        return skipped(name, "no attack that counts says what it saw of the model")
    share, where = max(shares, key=lambda one: one[0])
    return judge(
        name, share, "% of images", allowed=0, fails_above=1, one=100 / images,
        meaning=f"{where}: so many count as robust although no gradient there was finite and not zero, so that the "
        "attack could not aim: masked gradients",
    )  # fmt: skip


def _infinite_attacked(outcome: Outcome) -> Check:
    stages = [stage for stage in outcome.protocol.stages if stage.role == "score"]
    counts = [outcome.counts.get(stage.name, Counter()) for stage in stages]
    attacked, bad = (sum(count[name] for count in counts) for name in ("attacked", "not finite"))
    return judge(
        "not finite under attack", 100 * bad / max(attacked, 1), f"% of {attacked} attacked images", allowed=0,
        fails_above=1, one=100 / max(attacked, 1),
        meaning="a logit, loss or gradient on the way, or the output at the image that was judged, was NaN or infinite",
    )  # fmt: skip
