"""Accuracy on clean and on attacked images. Counts stay on the device until the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from afd.attacks import Attack
from afd.attacks.engine import evaluating
from afd.errors import InputError


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attack: Attack | None = None) -> float:
    """Share of images that the model, in evaluation mode, classifies correctly.

    Args:
        model: images -> logits [N, classes]; left as it was found.
        batches: (images [N, ...] in [0, 1], labels [N] int64).
        attack: applied to each batch first; its starts do not depend on the batch size.

    Returns:
        A share in [0, 1].

    Raises:
        InputError: there are no images.
    """
    seen = 0
    correct: list[Tensor] = []
    for x, y in batches:
        attacked = x if attack is None else attack(x, y, first_sample=seen)
        with evaluating(model), torch.no_grad():
            correct.append((model(attacked).argmax(1) == y).sum())
        seen += len(y)
    if not seen:
        raise InputError("batches holds no images; accuracy needs at least one")
    return float(torch.stack(correct).sum()) / seen


def accuracy_curve(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    epsilons: Sequence[float],
    attack: Callable[[float], Attack],
) -> list[float]:
    """Accuracy under attack(eps) for each eps; clean accuracy where eps is 0."""
    return [accuracy(model, batches, attack(eps) if eps else None) for eps in epsilons]
