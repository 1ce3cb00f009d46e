"""Checks for self-deception, each with its number and a verdict. A figure with a failed one is not to be believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from afd.attacks import Square
from afd.attacks.engine import evaluating, judged, loss_gradient
from afd.attacks.external import inside
from afd.attacks.losses import cross_entropy
from afd.evaluation.attacks import Stage
from afd.evaluation.confirm import Confirmation
from afd.evaluation.model import Model
from afd.evaluation.outcome import Outcome
from afd.evaluation.protocol import PROBED
from afd.evaluation.runner import Verification
from afd.nn.modes import local

Verdict = Literal["pass", "warn", "fail", "skipped"]
SEVERITY: tuple[Verdict, ...] = ("skipped", "pass", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """One sign, looked for.

    Attributes:
        name: of the check.
        verdict: "pass", "warn", "fail", or "skipped" where something it needs is not there.
        number: what was measured; None if skipped.
        unit: of the number.
        allowed: the largest number that passes.
        meaning: what a number above that says, or why the check was skipped.
    """

    name: str
    verdict: Verdict
    number: float | None
    unit: str
    allowed: float
    meaning: str

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def judge(
    name: str, number: float, unit: str, *, allowed: float, fails_above: float, meaning: str, one: float = 0.0
) -> Check:
    """A check whose verdict follows from its number.

    Args:
        name: of the check.
        number: what was measured.
        unit: of the number.
        allowed: up to here it passes.
        fails_above: above here it fails; between the two it warns.
        meaning: what a number above `allowed` says.
        one: what a single image weighs in the number: no more than that is never worse than a warning.
    """
    slack = 1e-9  # of sums of percentages
    if number <= allowed + slack:
        verdict: Verdict = "pass"
    elif number <= max(fails_above, one) + slack:
        verdict = "warn"
    else:  # NaN too
        verdict = "fail"
    return Check(name, verdict, number, unit, allowed, meaning)


def skipped(name: str, reason: str) -> Check:
    """A check that could not be made."""
    return Check(name, "skipped", None, "", 0.0, reason)


def overall(checks: Iterable[Check]) -> Verdict:
    """The worst verdict."""
    return max((check.verdict for check in checks), key=SEVERITY.index, default="skipped")


VERDICTS = {
    "pass": "Every check that could be made passed.",
    "warn": "Some checks warn: read them before quoting a figure.",
    "fail": "Checks failed: these figures are not evidence of robustness.",
    "skipped": "No check was made.",
}


# --- The model and a few clean images: what masks gradients often shows before any attack -----------------------------

REPEATS = 3
ALONE = 8  # images that are also shown to the model one at a time


def model_checks(model: Model, x: Tensor, y: Tensor) -> list[Check]:
    """All checks that need no attack.

    Args:
        model: under evaluation.
        x: clean images [N, ...].
        y: their labels [N].
    """
    network = local(model.network)
    with evaluating(network):
        training = sum(bool(getattr(module, "training", False)) for module in network.modules())
        outputs = torch.stack([judged(network, x) for _ in range(REPEATS)])
        alone = torch.cat([judged(network, image[None]) for image in x[:ALONE]])
        gradient, _, _ = loss_gradient(network, cross_entropy, x, y)
    logits = outputs[0]
    finite = outputs.isfinite().all(2).all(0)
    scale = float(logits[finite].abs().amax().clamp(min=1e-12)) if finite.any() else 1e-12
    return [
        _random(outputs[:, finite], scale),
        _batch_dependence(alone[finite[:ALONE]], logits[:ALONE][finite[:ALONE]], scale),
        _training(training, model.training_modules),
        _probabilities(logits),
        _zero_gradients(gradient, (logits.argmax(1) == y) & ~logits.isnan().any(1)),
        _bounds(x),
    ]


def _random(outputs: Tensor, scale: float) -> Check:
    name = "random outputs"
    if not outputs.numel():
        return skipped(name, "the model's outputs are not finite")
    spread = float((outputs - outputs[0]).abs().amax()) / scale
    return judge(
        name, spread, "of the largest logit", allowed=1e-5, fails_above=1e-3,
        meaning="the model answers the same images differently each time; attacks need averaging (eot_iter)",
    )  # fmt: skip


def _batch_dependence(alone: Tensor, together: Tensor, scale: float) -> Check:
    name = "batch dependence"
    if not alone.numel():
        return skipped(name, "the model's outputs are not finite")
    difference = float((alone - together).abs().amax()) / scale
    return judge(
        name, difference, "of the largest logit", allowed=1e-3, fails_above=1e-2,
        meaning="an image's output depends on its neighbours in the batch, as with BatchNorm on batch statistics",
    )  # fmt: skip


def _training(now: int, given: int) -> Check:
    if now:
        meaning = "modules stay in training mode although they are told to evaluate"
        return judge("training mode", now, "modules", allowed=0, fails_above=0, meaning=meaning)
    meaning = "the model was handed over in training mode; it was evaluated in evaluation mode"
    return judge("training mode", given, "modules", allowed=0, fails_above=float("inf"), meaning=meaning)


def _probabilities(logits: Tensor) -> Check:
    sums_to_one = (logits.sum(1) - 1).abs() < 1e-3
    inside = ((logits >= -1e-5) & (logits <= 1 + 1e-5)).all(1)
    share = 100 * float((sums_to_one & inside).float().mean())
    return judge(
        "probabilities instead of logits", share, "% of images", allowed=0, fails_above=50,
        meaning="outputs are probabilities: the cross-entropy takes a second softmax of them and its gradients vanish",
    )  # fmt: skip


def _zero_gradients(gradient: Tensor, correct: Tensor) -> Check:
    flat = gradient.flatten(1)
    useless = ((flat == 0).all(1) | ~flat.isfinite().all(1)) & correct
    count, images = int(useless.sum()), max(int(correct.sum()), 1)
    return judge(
        "zero gradients at start", count, f"of {images} images", allowed=0, fails_above=0.01 * images, one=1,
        meaning="the loss has no (finite) gradient at these images, so gradient attacks do not move: masked gradients",
    )  # fmt: skip


def _bounds(x: Tensor) -> Check:
    return judge(
        "inputs outside [0, 1]", int((~inside(x)).sum()), "images", allowed=0, fails_above=0,
        meaning="images leave the range that ε is stated in",
    )  # fmt: skip


# --- The outcome: the weaker of two attacks must not find what the stronger cannot ------------------------------------


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
    share = 100 * found.robust / max(found.images, 1)
    return judge(
        "re-verification", share, f"% of {found.images} adversarial images", allowed=0, fails_above=0.5,
        one=100 / max(found.images, 1),
        meaning=f"shown again in batches of {found.batch_size}, in float32, these no longer fool the model",
    )  # fmt: skip


def precision_check(found: Confirmation | None) -> Check:
    """Whether float32 breaks none of the images, of those drawn, that attacks in bfloat16 left; None where none ran."""
    name = "float32 beats bfloat16"
    if found is None:
        return skipped(name, "attacks ran in float32: this device does not multiply bfloat16 in hardware")
    return judge(
        name, found.fell, f"of {found.drawn} robust images", allowed=0, fails_above=0,
        meaning="in float32 these fell to the same attacks: bfloat16 misled them, or they had not converged",
    )  # fmt: skip


class Probes:
    """What each probe found on the first images."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.protocol = outcome, outcome.protocol
        self.images = min(PROBED, len(outcome.correct))
        self.correct = outcome.correct[: self.images]

    def stage(self, name: str) -> Stage:
        """A probe that was asked for before anything ran, or the stage that serves as it."""
        found = self.protocol.find(name)
        assert found is not None
        return found

    def adversarial(self, name: str) -> Tensor:
        """Of which of the first images, right when clean, a probe found an adversarial one."""
        return self.outcome.reached(self.stage(name), self.protocol.reference)[: self.images] & self.correct

    def points(self, mask: Tensor) -> float:
        """A share of the first images, in points."""
        return 100 * float(mask.sum()) / self.images

    @property
    def one(self) -> float:
        """What one image weighs."""
        return 100 / self.images

    def white_box(self) -> Tensor:
        """Where any gradient attack fooled the model at the reference radius or below it, in its norm."""
        found = self.outcome.white_box(self.protocol.norm, self.protocol.reference)
        return found[: self.images] & self.correct


def _far(seen: Probes, classes: int) -> Check:
    stage = seen.stage("probe-far")
    accuracy = 100 * seen.outcome.accuracies(stage)[-1]
    chance = 100 / classes
    return judge(
        f"accuracy at ε = {stage.epsilons[-1]}", accuracy, "%", allowed=chance + 5, fails_above=chance + 20,
        meaning="any image may become any other at this radius, so a working attack leaves chance at most",
    )  # fmt: skip


def _one_step(seen: Probes) -> Check:
    many, one = seen.adversarial("probe-pgd-20"), seen.adversarial("probe-fgsm")
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
    change = seen.points(seen.adversarial("probe-pgd-40") & ~seen.adversarial("probe-pgd-20"))
    return judge(
        "doubling the steps", change, "points", allowed=1, fails_above=3, one=seen.one,
        meaning="PGD-40 breaks what PGD-20 leaves: the attack has not converged, and its figure is too high",
    )  # fmt: skip


def _noise(seen: Probes) -> Check:
    extra = seen.points(seen.adversarial("probe-noise") & ~seen.white_box())
    return judge(
        "random noise beats the attacks", extra, "points", allowed=0, fails_above=0.5, one=seen.one,
        meaning="uniform noise breaks images that no gradient attack breaks",
    )  # fmt: skip


def _square(seen: Probes) -> Check:
    name = "Square beats white-box"
    outcome, extra = seen.outcome, []
    meaning = "a search without gradients breaks images that no gradient attack breaks: masked gradients"
    if any(stage.name == "probe-square" for stage in seen.protocol.stages):
        extra.append((seen.points(seen.adversarial("probe-square") & ~seen.white_box()), seen.one))
    for stage in seen.protocol.stages:
        if stage.attack == "square" and stage.role == "score":
            radius = seen.protocol.reference_in(stage.norm)
            alone = outcome.reached(stage, radius) & outcome.correct & ~outcome.white_box(stage.norm, radius)
            extra.append((100 * float(alone.double().mean()), 100 / len(alone)))
    if not extra:
        return skipped(name, f"no stage of the protocol runs Square, which knows the norms {', '.join(Square.known)}")
    points, one = max(extra)
    return judge(name, points, "points", allowed=0.2, fails_above=1, one=one, meaning=meaning)


def _transfer(seen: Probes) -> Check:
    name = "transfer beats white-box"
    outcome = seen.outcome
    transferred = [stage for stage in seen.protocol.stages if stage.role == "transfer"]
    if not transferred:
        return skipped(name, "no second model to transfer from")
    extra = 0.0
    for stage in transferred:
        alone = outcome.found[stage.name][0] & outcome.correct & ~outcome.white_box(stage.norm, stage.epsilons[0])
        extra = max(extra, 100 * float(alone.double().mean()))
    return judge(
        name, extra, "points", allowed=0.2, fails_above=1, one=100 / len(outcome.correct),
        meaning="images made on another model break what no attack on this model breaks: masked gradients",
    )  # fmt: skip


def _illegal(outcome: Outcome) -> Check:
    count = sum(counts["illegal"] for counts in outcome.counts.values())
    return judge(
        "attacked images out of bounds", count, "images", allowed=0, fails_above=0,
        meaning="an attack returned images outside of its ball or of [0, 1]; they were not counted as broken",
    )  # fmt: skip


def _blind(outcome: Outcome) -> Check:
    """Of the stages whose attack says what it saw, and of their radii, the one with most robust images never aimed at.

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
