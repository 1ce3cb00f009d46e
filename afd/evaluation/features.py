"""Features: their dimension, and how far attacked ones lie from natural ones (Bashivan et al. 2021, sections 4-5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks.engine import evaluating
from afd.data import Batches, Images
from afd.errors import InputError, ModelWarning, warn_caller
from afd.evaluation.outcome import Outcome
from afd.nn.modes import local

EXPLAINED = 0.99


def feature_summary(model: nn.Module, images: Images, batch_size: int) -> dict[str, Any] | None:
    """Principal components for 99% of the variance of F(x), and how many features are never or always zero.

    Args:
        model: with a method ``features`` from images to [N, num_features], finite; for any other, the result is None.
        images: clean ones.
        batch_size: of the passes.
    """
    found = []
    for x, _ in Batches(images, batch_size):
        of_batch = features_of(model, x)
        if of_batch is None or not of_batch.isfinite().all():
            return None
        found.append(of_batch)
    features = torch.cat(found).double()
    return {
        "count": features.shape[1],
        "components": principal_components(features, EXPLAINED),
        "explained": EXPLAINED,
        "never_zero": int((features != 0).all(0).sum()),
        "always_zero": int((features == 0).all(0).sum()),
    }


def has_features(model: nn.Module, x: Tensor) -> bool:
    """Whether a model has features to speak of, which images x show.

    Warns:
        ModelWarning: it has a method ``features`` that images cannot be given to.
    """
    try:
        return features_of(model, x) is not None
    except Exception as error:  # a method of that name that was meant for something else
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn_caller(f"nothing is said of features, as the model's method of that name raises {reason}", ModelWarning)
        return False


def features_of(model: nn.Module, x: Tensor) -> Tensor | None:
    """F(x) [N, num_features], in evaluation mode; None for a model without, such as one whose features are maps."""
    inner = local(model)
    if not callable(getattr(inner, "features", None)):
        return None
    with evaluating(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found = inner.features(x.clone())  # type: ignore[operator]
    plain = isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 2 and len(found) == len(x)
    return found if plain else None


def principal_components(features: Tensor, share: float) -> int:
    """The smallest number of principal components that hold `share` of the variance of features [N, D]."""
    variances = torch.linalg.svdvals(features - features.mean(0)).square()
    total = variances.sum()
    if total == 0:
        return 0
    held = variances.cumsum(0) / total
    return int((held < share - 1e-12).sum()) + 1


class DomainCounter:
    """Counts how the discriminator takes images: the two shares that the HΔH distance is made of.

    Args:
        model: with a method ``features``.
        discriminator: (features [N, D], labels [N]) -> scores [N], high for natural.
    """

    def __init__(self, model: nn.Module, discriminator: nn.Module) -> None:
        self.model, self.discriminator = model, discriminator

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, int]:
        """How many of these images there are, and how many are taken for natural and for attacked ones."""
        features = features_of(self.model, x)
        if features is None:
            raise InputError("the model returns no features [N, D] for its discriminator")
        with evaluating(self.discriminator), torch.no_grad():
            scores = self.discriminator(features, y)
        return {"judged": len(y), "natural": int((scores > 0).sum()), "attacked": int((scores < 0).sum())}


def divergence(natural: Mapping[str, int], attacked: Mapping[str, int]) -> float | None:
    """The estimated HΔH distance 2 |α - 1|, α = P[D > 0 on natural] + P[D < 0 on attacked]; None without images."""
    if not natural.get("judged") or not attacked.get("judged"):
        return None
    alpha = natural["natural"] / natural["judged"] + attacked["attacked"] / attacked["judged"]
    return 2 * abs(alpha - 1)


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
