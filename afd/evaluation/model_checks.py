"""Checks that need the model and a few clean images: what masks gradients often shows before any attack."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.attacks.engine import evaluating, judged, loss_gradient
from afd.attacks.losses import cross_entropy
from afd.attacks.strangers import inside
from afd.evaluation.checks import Check, judge, skipped
from afd.evaluation.subject import Subject
from afd.nn.modes import local

REPEATS = 3
ALONE = 8  # images that are also shown to the model one at a time


def model_checks(subject: Subject, x: Tensor, y: Tensor) -> list[Check]:
    """All checks of this file.

    Args:
        subject: the model.
        x: clean images [N, ...].
        y: their labels [N].
    """
    model = local(subject.model)
    with evaluating(model):
        training = sum(bool(getattr(module, "training", False)) for module in model.modules())
        outputs = torch.stack([judged(model, x) for _ in range(REPEATS)])
        alone = torch.cat([judged(model, image[None]) for image in x[:ALONE]])
        gradient, _, _ = loss_gradient(model, cross_entropy, x, y)
    logits = outputs[0]
    finite = outputs.isfinite().all(2).all(0)
    scale = float(logits[finite].abs().amax().clamp(min=1e-12)) if finite.any() else 1e-12
    return [
        _random(outputs[:, finite], scale),
        _batch_dependence(alone[finite[:ALONE]], logits[:ALONE][finite[:ALONE]], scale),
        _training(training, subject.training_modules),
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
