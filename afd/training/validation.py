"""Accuracy on validation images, each image seen by one process."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from afd.attacks import Attack
from afd.errors import InputError
from afd.evaluation import accuracy
from afd.training.distributed import Group
from afd.training.loaders import Loader, checked


def shared_accuracy(
    model: nn.Module,
    batches: Loader,
    attack: Attack | None,
    group: Group,
    device: torch.device,
    num_classes: int | None = None,
) -> float:
    """Share of images classified correctly, batches dealt out to the processes one by one.

    An attack starts at each image as it would in one process. All processes must ask.

    Args:
        model: images [N, ...] -> logits.
        batches: as described in `Loader`, the same in all processes.
        attack: on the model; None for clean images.
        group: of the processes.
        device: of the model.
        num_classes: labels are below it; None if nobody knows.

    Raises:
        InputError, InputTypeError: there are no images, or a batch is not as described in `Loader`.
    """
    correct, seen = 0.0, 0
    for number, item in enumerate(batches):
        x, y = checked("validation", item, num_classes, batches)
        if number % group.size == group.rank:
            started = None if attack is None else partial(_shifted, attack, seen)
            correct += accuracy(model, [(x.to(device), y.to(device))], started) * len(y)
        seen += len(y)
    if not seen:
        raise InputError("validation holds no images")
    return float(group.sum(torch.tensor(round(correct), dtype=torch.float64, device=device))) / seen


def _shifted(
    attack: Attack,
    offset: int,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    seed: int | None = None,
    first_sample: int = 0,
) -> torch.Tensor:
    return attack(x, y, seed=seed, first_sample=offset + first_sample)
