"""Checks that need the model and a few clean images: what masks gradients often shows before any attack."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.attacks.engine import evaluating, loss_gradient
from afd.attacks.losses import cross_entropy
from afd.evaluation.checks import Check, judge
from afd.evaluation.subject import Subject
from afd.evaluation.target import BOUNDS

REPEATS = 3
ALONE = 8  # images that are also shown to the model one at a time


def model_checks(subject: Subject, x: Tensor, y: Tensor) -> list[Check]:
    """All checks of this file.

    Args:
        subject: the model.
        x: clean images [N, ...].
        y: their labels [N].
    """
    model = subject.model
    with evaluating(model):
        training = sum(module.training for module in model.modules())
        with torch.no_grad():
            outputs = torch.stack([model(x) for _ in range(REPEATS)])
            alone = torch.cat([model(image[None]) for image in x[:ALONE]])
        gradient, _, _ = loss_gradient(model, cross_entropy, x, y)
    logits = outputs[0]
    scale = float(logits.abs().amax().clamp(min=1e-12))
    return [
        _finite(logits),
        _random(outputs, scale),
        _batch_dependence(alone, logits[:ALONE], scale),
        _training(training, subject.training_modules),
        _probabilities(logits),
        _zero_gradients(gradient, logits.argmax(1) == y),
        _bounds(x),
    ]


def _finite(logits: Tensor) -> Check:
    bad = int((~logits.isfinite().all(1)).sum())
    return judge(
        "outputs not finite", bad, f"of {len(logits)} images", allowed=0, fails_above=0,
        meaning="NaN or infinite logits leave attacks without a loss to climb",
    )  # fmt: skip


def _random(outputs: Tensor, scale: float) -> Check:
    spread = float((outputs - outputs[0]).abs().amax()) / scale
    return judge(
        "random outputs", spread, "of the largest logit", allowed=1e-5, fails_above=1e-3,
        meaning="the model answers the same images differently each time; attacks need averaging (eot_iter)",
    )  # fmt: skip


def _batch_dependence(alone: Tensor, together: Tensor, scale: float) -> Check:
    difference = float((alone - together).abs().amax()) / scale
    return judge(
        "batch dependence", difference, "of the largest logit", allowed=1e-3, fails_above=1e-2,
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
    outside = ~((x >= BOUNDS[0]) & (x <= BOUNDS[1])).flatten(1).all(1)
    return judge(
        "inputs outside [0, 1]", int(outside.sum()), "images", allowed=0, fails_above=0,
        meaning="images leave the range that ε is stated in",
    )  # fmt: skip
