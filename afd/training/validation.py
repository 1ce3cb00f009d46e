"""Accuracy on validation images, each image seen by one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from afd.attacks import Attack
from afd.attacks.watch import COULD_NOT_AIM
from afd.errors import InputError, ModelWarning, warn_caller
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
    each: Callable[[int], None] | None = None,
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
        each: called after each batch, in every process, with the number of its images.

    Raises:
        InputError, InputTypeError: there are no images, or a batch is not as described in `Loader`.
        ModelError: the model returned NaN.

    Warns:
        ModelWarning: images at which the attack could not aim, and which count as robust for that.
    """
    correct, seen, blind = 0.0, 0, 0
    for number, item in enumerate(batches):
        x, y = checked("validation", item, num_classes, batches)
        if number % group.size == group.rank:
            started = None if attack is None else partial(_shifted, attack, seen)
            with warnings.catch_warnings():  # said once for all batches, below
                warnings.filterwarnings("ignore", f".*{COULD_NOT_AIM}", ModelWarning)
                correct += accuracy(model, [(x.to(device), y.to(device))], started) * len(y)
            blind += _blind(attack)
        seen += len(y)
        if each is not None:
            each(len(y))
    if not seen:
        raise InputError("validation holds no images")
    counts = torch.tensor([round(correct), blind], dtype=torch.float64, device=device)
    right, blind = map(int, group.sum(counts).tolist())
    if blind and group.leads:
        warn_caller(
            f"for {blind} of {seen} images the gradient of the loss was exactly zero or NaN wherever the attack "
            f"looked, so {COULD_NOT_AIM}: that they withstand it shows no robustness",
            ModelWarning,
        )
    return right / seen


def _blind(attack: Attack | None) -> int:
    """At how many images an attack of ours could not aim in its last call."""
    report = getattr(attack, "report", None)
    return 0 if report is None else int(report.blind.sum())


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
